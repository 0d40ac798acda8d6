"""Architectures as functional Keras models on already preprocessed images."""

from typing import Any


def _digits_cnn(image_size_px: int, **options: Any) -> Any:
    from tfxfer.sources.builders import digits_cnn

    return digits_cnn.build(image_size_px, **options)


def _efficientnet_lite0(image_size_px: int, **options: Any) -> Any:
    from tfxfer.sources.builders import efficientnet_lite0

    return efficientnet_lite0.build(image_size_px, **options)


def _mobilenet_v2(image_size_px: int, **options: Any) -> Any:
    from tfxfer.sources.builders import mobilenet_v2

    return mobilenet_v2.build(image_size_px, **options)


def _efficientnet_lite0_modules() -> dict[str, str]:
    from tfxfer.sources.builders import efficientnet_lite0

    return efficientnet_lite0.torch_modules()


def _mobilenet_v2_modules() -> dict[str, str]:
    from tfxfer.sources.builders import mobilenet_v2

    return mobilenet_v2.torch_modules()


# Each: (image_size_px, *, include_top=False, seed=None) -> keras.Model, (N, S, S, 3) float32 to pooled features (N, F)
# or, with the top, to logits (N, K). A layer of block B is named B or starts with "B_".
BUILDERS = {
    "digits_cnn": _digits_cnn,
    "efficientnet_lite0": _efficientnet_lite0,
    "mobilenet_v2": _mobilenet_v2,
}

# Architectures that a torch checkpoint fits: () -> {module of the state dict: Keras layer}.
TORCH_MODULES = {
    "efficientnet_lite0": _efficientnet_lite0_modules,
    "mobilenet_v2": _mobilenet_v2_modules,
}
