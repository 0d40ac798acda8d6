"""Input adaptation inside the graph: channels, value type and size, so that serving needs no code of its own."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="tfxfer")
class AdaptImage(keras.layers.Layer):
    """Turn images of any size and 1 to 4 channels into float32 RGB of one size.

    Grey is repeated to three channels; alpha is laid over white; the resize is bilinear with a triangle filter
    that widens when shrinking, in two passes that round to whole levels. That is what Pillow's
    `Image.resize(..., BILINEAR)` computes, so it does not matter whether the data pipeline, a client or the graph
    resizes (rounded once less, probabilities moved by up to 0.16; `layers.Resizing` without antialiasing sees other
    pixels, with it its ONNX export does not run). Images of the right size, where the graph knows it, pass untouched;
    where pixels are rounded, no gradient passes.

    Args:
        size_px: Side of the square output, in pixels.
        channel_order: "rgb", or "bgr" for networks that want the channels turned round.
        channels: 3; or any other number that images must have then, which are resized and nothing else.

    Call arguments:
        images: (N, H, W, C), uint8 or float in 0..255, C in 1..4.

    Returns:
        (N, size_px, size_px, 3) float32 in 0..255.

    Example:
        >>> import numpy as np
        >>> AdaptImage(4)(np.full((1, 8, 6, 1), 7, "uint8")).shape
        TensorShape([1, 4, 4, 3])
    """

    def __init__(self, size_px: int, channel_order: str = "rgb", channels: int = 3, **kwargs):
        kwargs.setdefault("trainable", False)
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.size_px = size_px
        self.channel_order = channel_order
        self.channels = channels

    def call(self, images):
        x = ops.cast(images, "float32")
        x = self._resize(_to_rgb(x) if self.channels == 3 else x)
        return ops.flip(x, axis=-1) if self.channel_order == "bgr" else x

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.size_px, self.size_px, self.channels)

    def get_config(self):
        return {
            **super().get_config(),
            "size_px": self.size_px,
            "channel_order": self.channel_order,
            "channels": self.channels,
        }

    def _resize(self, x):
        height, width = x.shape[1], x.shape[2]
        if height == self.size_px and width == self.size_px:
            return x
        # As Pillow, first along the width; each pass one matrix product with the axis to shrink in front.
        x = _along_first(ops.transpose(x, (0, 2, 1, 3)), self.size_px, self.channels)
        return _along_first(ops.transpose(x, (0, 2, 1, 3)), self.size_px, self.channels)


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


# Pillow's weights are whole 2**22nds and its sums 30-bit integers. In halves of 11 bits the products and, while one
# output pixel covers at most sixteen, the sums are exact in float32 (and in TensorFloat-32), in whatever order a
# runtime adds. Beyond that an addition may round, by less than a thousandth of a level.
_HALF = 2.0**11


def _along_first(x, size_out: int, channels: int):
    """(N, L, M, C) levels to (N, size_out, M, C) levels, rounded, halves upwards."""
    shape = ops.shape(x)
    weights = _triangle_weights(shape[1], size_out)
    sums = ops.matmul(weights, ops.reshape(x, (shape[0], shape[1], shape[2] * channels)))
    high, low = sums[:, :size_out], sums[:, size_out:]
    levels = ops.floor((high + ops.floor(low / _HALF) + _HALF / 2) / _HALF)
    return ops.reshape(ops.clip(levels, 0.0, 255.0), (shape[0], size_out, shape[2], channels))


def _triangle_weights(size_in, size_out: int):
    """(2 * size_out, size_in): an antialiased bilinear resize in 2**22nds, above the high and below the low 11 bits."""
    extent = ops.cast(size_in, "float32")
    reach = 2.0 * ops.maximum(extent, size_out)
    centre = (2.0 * ops.arange(size_out, dtype="float32") + 1.0) * extent
    pixel = (2.0 * ops.cast(ops.arange(size_in), "float32") + 1.0) * size_out
    # Distances in half a `size_in * size_out`th are whole numbers. So is every term of the division, which is done by
    # hand, eleven bits at a time: in one step float32 would be off by a 2**22nd now and then.
    weights = _HALF * ops.maximum(reach - ops.abs(pixel[None, :] - centre[:, None]), 0.0)
    whole = ops.sum(weights, axis=1, keepdims=True) / _HALF
    high = ops.floor(weights / whole)
    low = ops.floor((weights - high * whole) * _HALF / whole + 0.5)
    return ops.concatenate([high, low], axis=0)
