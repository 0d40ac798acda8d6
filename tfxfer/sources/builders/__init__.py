"""Architectures as functional Keras models on already preprocessed images."""

import functools
from collections.abc import Callable
from typing import Any

from tfxfer.registry import lookup
from tfxfer.specs import Source


def _digits_cnn(image_size_px: int, **options: Any) -> Any:
    from tfxfer.sources.builders import digits_cnn

    return digits_cnn.build(image_size_px, **options)


def _efficientnet_lite(variant: str, image_size_px: int, **options: Any) -> Any:
    from tfxfer.sources.builders import efficientnet_lite

    return efficientnet_lite.build(image_size_px, variant=variant, **options)


def _mobilenet_v2(image_size_px: int, **options: Any) -> Any:
    from tfxfer.sources.builders import mobilenet_v2

    return mobilenet_v2.build(image_size_px, **options)


def _efficientnet_lite_modules(variant: str) -> dict[str, str]:
    from tfxfer.sources.builders import efficientnet_lite

    return efficientnet_lite.torch_modules(variant)


def _mobilenet_v2_modules() -> dict[str, str]:
    from tfxfer.sources.builders import mobilenet_v2

    return mobilenet_v2.torch_modules()


# Each: (image_size_px, *, include_top=False, seed=None) -> keras.Model, (N, S, S, 3) float32 to pooled features (N, F)
# or, with the top, to logits (N, K). A layer of block B is named B or starts with "B_".
BUILDERS: dict[str, Callable[..., Any]] = {
    "digits_cnn": _digits_cnn,
    "efficientnet_lite0": functools.partial(_efficientnet_lite, "efficientnet_lite0"),
    "efficientnet_lite1": functools.partial(_efficientnet_lite, "efficientnet_lite1"),
    "efficientnet_lite2": functools.partial(_efficientnet_lite, "efficientnet_lite2"),
    "mobilenet_v2": _mobilenet_v2,
}

# Architectures that a torch checkpoint fits: () -> {module of the state dict: Keras layer}.
TORCH_MODULES: dict[str, Callable[[], dict[str, str]]] = {
    "efficientnet_lite0": functools.partial(_efficientnet_lite_modules, "efficientnet_lite0"),
    "efficientnet_lite1": functools.partial(_efficientnet_lite_modules, "efficientnet_lite1"),
    "efficientnet_lite2": functools.partial(_efficientnet_lite_modules, "efficientnet_lite2"),
    "mobilenet_v2": _mobilenet_v2_modules,
}


def build_network(card: Source, size_px: int, *, include_top: bool, seed: int) -> Any:
    """The network of a card's architecture with random weights.

    Raises:
        InputError: Where there is no builder for it.
    """
    return lookup(BUILDERS, card.architecture, "architecture")(size_px, include_top=include_top, seed=seed)
