"""Images with other than three channels: the first convolution of a backbone made wider or narrower."""

import dataclasses

import keras
import numpy as np

from tfxfer.errors import InputError
from tfxfer.sources.weights_file import adapt_channels
from tfxfer.specs import Source


def with_channels(backbone: keras.Model, channels: int) -> keras.Model:
    """A copy of a backbone that takes images of another number of channels.

    The kernels that read the images get the mean over the old channels for each new one, scaled so that where all
    channels show the same they give what they gave; above three the first three keep their own kernels (red, green
    and blue of a multispectral image), scaled likewise. One channel gets the sum. Everything else is copied.

    Args:
        backbone: Functional, on (N, S, S, 3).
        channels: Of the new input, at least 1.

    Raises:
        InputError: Where what reads the images is no convolution, or the network cannot be built anew.

    Example:
        >>> net = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3), keras.layers.GlobalAvgPool2D()])
        >>> with_channels(net, 5).input_shape
        (None, 8, 8, 5)
    """
    if isinstance(channels, bool) or channels < 1:
        raise InputError(f"The number of channels must be at least 1, not {channels!r}.")
    if channels == backbone.input_shape[-1]:
        return backbone
    inputs = keras.Input((*backbone.input_shape[1:-1], channels), name="images")
    try:
        wider = keras.models.clone_model(backbone, input_tensors=inputs)
    except (ValueError, TypeError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(f"{backbone.name!r} cannot be built for {channels} channels: {line}") from None
    changed = [
        (new, old.numpy()) for new, old in zip(wider.weights, backbone.weights, strict=True) if new.shape != old.shape
    ]
    plain = {
        id(variable)
        for layer in wider._flatten_layers()
        if isinstance(layer, keras.layers.Conv2D)
        for variable in layer.weights
    }
    for new, old in changed:
        if id(new) not in plain or old.ndim != 4 or new.shape[:2] != old.shape[:2] or new.shape[-1] != old.shape[-1]:
            raise InputError(
                f"{backbone.name!r} cannot take {channels} channels: its weights {new.path} change from {old.shape} to "
                f"{tuple(new.shape)}, which is no convolution of the image."
            )
    widened = {id(new): _widened(old, channels) for new, old in changed}
    for new, old in zip(wider.weights, backbone.weights, strict=True):
        new.assign(widened.get(id(new), old.numpy()))
    return wider


def card_for_channels(card: Source, channels: int) -> Source:
    """The card with a scale and an offset for each channel: the first three keep their own, others get the mean."""
    if channels == 3:
        return card
    if card.channel_order != "rgb":
        raise InputError(
            f"{card.name!r} takes its channels turned round (BGR), so it cannot be fed {channels} of them."
        )

    def spread(values: tuple[float, ...]) -> tuple[float, ...]:
        mean = float(np.mean(values))
        return (*values, *(mean,) * (channels - 3)) if channels > 3 else (mean,) * channels

    return dataclasses.replace(card, scale=spread(card.scale), offset=spread(card.offset))


def _widened(kernel: np.ndarray, channels: int) -> np.ndarray:
    wide = adapt_channels(kernel, channels)
    if channels > kernel.shape[-2] == 3:
        wide[..., :3, :] = kernel * (3 / channels)
    return wide
