"""Input adaptation inside the graph: channels, value type and size, so that serving needs no code of its own."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="tfxfer")
class AdaptImage(keras.layers.Layer):
    """Turn images of any size and 1 to 4 channels into float32 RGB of one size.

    Grey is repeated to three channels; alpha is laid over white; the resize is bilinear with a triangle filter
    that widens when shrinking. That is what Pillow's `Image.resize(..., BILINEAR)` computes, so an image resized
    by the data pipeline and one resized here agree to the rounding of uint8 (`layers.Resizing` does not: without
    antialiasing it sees other pixels, with it the ONNX export does not run, and it leaks training mode).

    Args:
        size_px: Side of the square output, in pixels.

    Call arguments:
        images: (N, H, W, C), uint8 or float in 0..255, C in 1..4.

    Returns:
        (N, size_px, size_px, 3) float32 in 0..255.

    Example:
        >>> import numpy as np
        >>> AdaptImage(4)(np.full((1, 8, 6, 1), 7, "uint8")).shape
        TensorShape([1, 4, 4, 3])
    """

    def __init__(self, size_px: int, **kwargs):
        kwargs.setdefault("trainable", False)
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.size_px = size_px

    def call(self, images):
        x = ops.cast(images, "float32")
        return self._resize(_to_rgb(x))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.size_px, self.size_px, 3)

    def get_config(self):
        return {**super().get_config(), "size_px": self.size_px}

    def _resize(self, x):
        height, width = x.shape[1], x.shape[2]
        if height == self.size_px and width == self.size_px:
            return x
        shape = ops.shape(x)
        rows = _triangle_weights(shape[1], self.size_px)
        columns = _triangle_weights(shape[2], self.size_px)
        # (S, H) x (N, H, W*3), then (S, W) x (N*S, W, 3): two plain matrix products that every runtime has.
        x = ops.reshape(x, (shape[0], shape[1], shape[2] * 3))
        x = ops.matmul(rows, x)
        x = ops.reshape(x, (shape[0] * self.size_px, shape[2], 3))
        x = ops.matmul(columns, x)
        return ops.reshape(x, (shape[0], self.size_px, self.size_px, 3))


def _to_rgb(x):
    """(N, H, W, C) float32 to (N, H, W, 3); C may be known only when the graph runs."""
    channels = x.shape[-1]
    if channels == 3:
        return x
    count = ops.shape(x)[-1]
    index = ops.arange(3) * ops.cast(count >= 3, "int32")
    colour = ops.take(x, index, axis=-1)
    has_alpha = ops.cast((count == 2) | (count == 4), "float32")
    alpha = 1.0 - has_alpha + has_alpha * x[..., -1:] / 255.0
    return colour * alpha + 255.0 * (1.0 - alpha)


def _triangle_weights(size_in, size_out: int):
    """(size_out, size_in) matrix of an antialiased bilinear resize; rows sum to one."""
    extent = ops.cast(size_in, "float32")
    scale = extent / size_out
    centre = (ops.arange(size_out, dtype="float32") + 0.5) * scale
    support = ops.maximum(scale, 1.0)
    pixel = ops.cast(ops.arange(size_in), "float32") + 0.5
    weights = ops.maximum(1.0 - ops.abs(pixel[None, :] - centre[:, None]) / support, 0.0)
    return weights / ops.sum(weights, axis=1, keepdims=True)
