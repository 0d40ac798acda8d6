"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation and with ReLU6, padded as TensorFlow pads.

Reference: M. Tan, Q. V. Le. EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks. ICML 2019.
The Lite variants: github.com/tensorflow/tpu, models/official/efficientnet/lite, 2020.
"""

import dataclasses
import math

import keras

from tfxfer.sources.builders.inverted_residual import BlockGroup, build_network

# Factors of width and depth; Lite0 is the network that the groups below say.
VARIANTS = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
GROUPS = (
    BlockGroup(expansion=1, kernel=3, stride=1, channels=16, repeats=1),
    BlockGroup(expansion=6, kernel=3, stride=2, channels=24, repeats=2),
    BlockGroup(expansion=6, kernel=5, stride=2, channels=40, repeats=2),
    BlockGroup(expansion=6, kernel=3, stride=2, channels=80, repeats=3),
    BlockGroup(expansion=6, kernel=5, stride=1, channels=112, repeats=3),
    BlockGroup(expansion=6, kernel=5, stride=2, channels=192, repeats=4),
    BlockGroup(expansion=6, kernel=3, stride=1, channels=320, repeats=1),
)


def build(
    image_size_px: int, *, variant: str = "efficientnet_lite0", include_top: bool = False, seed: int | None = None
) -> keras.Model:
    """An EfficientNet-Lite with random weights; the arguments of `build_network` and the entry of `VARIANTS`.

    Example:
        >>> build(32, include_top=True).output_shape
        (None, 1000)
    """
    return build_network(
        image_size_px,
        groups_of(variant),
        name=variant,
        torch_padding=False,
        epsilon=1e-3,
        include_top=include_top,
        seed=seed,
    )


def groups_of(variant: str) -> tuple[BlockGroup, ...]:
    """The blocks of a variant: channels times width, in eights, and repeats times depth, rounded up. In the Lite
    networks the first and the last group keep their repeats, as stem and top keep their channels.

    Example:
        >>> [(group.channels, group.repeats) for group in groups_of("efficientnet_lite2")]
        [(16, 1), (24, 3), (48, 3), (88, 4), (120, 4), (208, 5), (352, 1)]
    """
    width, depth = VARIANTS[variant]
    ends = GROUPS[0], GROUPS[-1]
    return tuple(
        dataclasses.replace(
            group,
            channels=_in_eights(group.channels * width),
            repeats=group.repeats if group in ends else math.ceil(group.repeats * depth),
        )
        for group in GROUPS
    )


def torch_modules(variant: str = "efficientnet_lite0") -> dict[str, str]:
    """The modules of efficientnet_lite_pytorch's state dict and the layers that take their weights."""
    modules = {
        "_conv_stem": "stem_conv",
        "_bn0": "stem_bn",
        "_conv_head": "top_conv",
        "_bn1": "top_bn",
        "_fc": "logits",
    }
    for number in range(sum(group.repeats for group in groups_of(variant))):
        place, block = f"_blocks.{number}", f"block_{number:02d}"
        if number > 0:  # the first block does not expand
            modules |= {f"{place}._expand_conv": f"{block}_expand", f"{place}._bn0": f"{block}_expand_bn"}
        modules |= {f"{place}._depthwise_conv": f"{block}_depthwise", f"{place}._bn1": f"{block}_depthwise_bn"}
        modules |= {f"{place}._project_conv": f"{block}_project", f"{place}._bn2": f"{block}_project_bn"}
    return modules


def _in_eights(channels: float) -> int:
    """The nearest multiple of eight that is not less than nine tenths."""
    found = max(8, int(channels + 4) // 8 * 8)
    return found if found >= 0.9 * channels else found + 8
