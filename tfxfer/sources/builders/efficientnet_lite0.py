"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation and with ReLU6, padded as TensorFlow pads.

Reference: M. Tan, Q. V. Le. EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks. ICML 2019.
The Lite variants: github.com/tensorflow/tpu, models/official/efficientnet/lite, 2020.
"""

import keras

from tfxfer.sources.builders.inverted_residual import BlockGroup, build_network

GROUPS = (
    BlockGroup(expansion=1, kernel=3, stride=1, channels=16, repeats=1),
    BlockGroup(expansion=6, kernel=3, stride=2, channels=24, repeats=2),
    BlockGroup(expansion=6, kernel=5, stride=2, channels=40, repeats=2),
    BlockGroup(expansion=6, kernel=3, stride=2, channels=80, repeats=3),
    BlockGroup(expansion=6, kernel=5, stride=1, channels=112, repeats=3),
    BlockGroup(expansion=6, kernel=5, stride=2, channels=192, repeats=4),
    BlockGroup(expansion=6, kernel=3, stride=1, channels=320, repeats=1),
)


def build(image_size_px: int, *, include_top: bool = False, seed: int | None = None) -> keras.Model:
    """EfficientNet-Lite0 with random weights; the arguments of `build_network`.

    Example:
        >>> build(32, include_top=True).output_shape
        (None, 1000)
    """
    return build_network(
        image_size_px,
        GROUPS,
        name="efficientnet_lite0",
        torch_padding=False,
        epsilon=1e-3,
        include_top=include_top,
        seed=seed,
    )


def torch_modules() -> dict[str, str]:
    """The modules of efficientnet_lite_pytorch's state dict and the layers that take their weights."""
    modules = {
        "_conv_stem": "stem_conv",
        "_bn0": "stem_bn",
        "_conv_head": "top_conv",
        "_bn1": "top_bn",
        "_fc": "logits",
    }
    for number in range(16):
        place, block = f"_blocks.{number}", f"block_{number:02d}"
        if number > 0:  # the first block does not expand
            modules |= {f"{place}._expand_conv": f"{block}_expand", f"{place}._bn0": f"{block}_expand_bn"}
        modules |= {f"{place}._depthwise_conv": f"{block}_depthwise", f"{place}._bn1": f"{block}_depthwise_bn"}
        modules |= {f"{place}._project_conv": f"{block}_project", f"{place}._bn2": f"{block}_project_bn"}
    return modules
