"""Input adaptation inside the graph: channels, value type and size, so that serving needs no code of its own."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="tfxfer")
class AdaptImage(keras.layers.Layer):
    """Turn images of any size and 1 to 4 channels into float32 RGB of one size.

    Grey is repeated to three channels; alpha is laid over white; the resize is bilinear with a triangle filter
    that widens when shrinking, in two passes that round to whole levels. That is what Pillow's
    `Image.resize(..., BILINEAR)` computes, to the same level but for a few pixels in a million, so it does not matter
    whether the data pipeline, a client or the graph resizes (rounded once less, probabilities moved by up to 0.16;
    `layers.Resizing` without antialiasing sees other pixels, with it its ONNX export does not run).

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
        # As Pillow: first along the width, (S, W) x (N*H, W, 3), then along the height, (S, H) x (N, H, S*3).
        x = ops.reshape(x, (shape[0] * shape[1], shape[2], 3))
        x = _weighted_levels(_triangle_weights(shape[2], self.size_px), x)
        x = ops.reshape(x, (shape[0], shape[1], self.size_px * 3))
        x = _weighted_levels(_triangle_weights(shape[1], self.size_px), x)
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
    laid = colour * alpha + 255.0 * (1.0 - alpha)
    return laid + has_alpha * (ops.floor(laid + 0.5) - laid)


# Pillow's weights are fractions of 2**22, its sums 30-bit integers. Halves of 11 bits each keep every product and sum
# exact in float32 (and in TensorFloat-32), in whatever order a runtime adds, so that all runtimes see the same pixels.
_HALF = 2.0**11


def _weighted_levels(weights, x):
    """Whole weights (S, L) of a 2**22th by whole levels (N, L, D), rounded to levels (N, S, D), halves upwards."""
    high = ops.floor(weights / _HALF)
    low = weights - high * _HALF
    carried = ops.floor(ops.matmul(low, x) / _HALF)
    return ops.clip(ops.floor((ops.matmul(high, x) + carried + _HALF / 2) / _HALF), 0.0, 255.0)


def _triangle_weights(size_in, size_out: int):
    """(size_out, size_in) whole numbers: an antialiased bilinear resize in units of a 2**22th."""
    extent = ops.cast(size_in, "float32")
    reach = 2.0 * ops.maximum(extent, size_out)
    centre = (2.0 * ops.arange(size_out, dtype="float32") + 1.0) * extent
    pixel = (2.0 * ops.cast(ops.arange(size_in), "float32") + 1.0) * size_out
    # Distances in half a `size_in * size_out`th: whole numbers, so only the division below rounds.
    weights = ops.maximum(reach - ops.abs(pixel[None, :] - centre[:, None]), 0.0)
    share = weights / ops.sum(weights, axis=1, keepdims=True)
    return ops.floor(share * _HALF**2 + 0.5)
