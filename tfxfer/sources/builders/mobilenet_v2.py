"""MobileNetV2, width 1, padded as torchvision pads it.

Reference: M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen. MobileNetV2: Inverted Residuals and Linear
Bottlenecks. CVPR 2018.
"""

import keras

from tfxfer.sources.builders.inverted_residual import BlockGroup, build_network

GROUPS = (
    BlockGroup(expansion=1, kernel=3, stride=1, channels=16, repeats=1),
    BlockGroup(expansion=6, kernel=3, stride=2, channels=24, repeats=2),
    BlockGroup(expansion=6, kernel=3, stride=2, channels=32, repeats=3),
    BlockGroup(expansion=6, kernel=3, stride=2, channels=64, repeats=4),
    BlockGroup(expansion=6, kernel=3, stride=1, channels=96, repeats=3),
    BlockGroup(expansion=6, kernel=3, stride=2, channels=160, repeats=3),
    BlockGroup(expansion=6, kernel=3, stride=1, channels=320, repeats=1),
)


def build(image_size_px: int, *, include_top: bool = False, seed: int | None = None) -> keras.Model:
    """MobileNetV2 with random weights; the arguments of `build_network`.

    Example:
        >>> build(32).output_shape
        (None, 1280)
    """
    return build_network(
        image_size_px,
        GROUPS,
        name="mobilenet_v2",
        torch_padding=True,
        epsilon=1e-5,
        include_top=include_top,
        seed=seed,
    )


def torch_modules() -> dict[str, str]:
    """The modules of torchvision's state dict and the layers that take their weights."""
    modules = {
        "features.0.0": "stem_conv",
        "features.0.1": "stem_bn",
        "features.18.0": "top_conv",
        "features.18.1": "top_bn",
        "classifier.1": "logits",
    }
    for number in range(17):
        place, block = f"features.{number + 1}.conv", f"block_{number:02d}"
        step = 0
        if number > 0:  # the first block does not expand
            modules |= {f"{place}.0.0": f"{block}_expand", f"{place}.0.1": f"{block}_expand_bn"}
            step = 1
        modules |= {f"{place}.{step}.0": f"{block}_depthwise", f"{place}.{step}.1": f"{block}_depthwise_bn"}
        modules |= {f"{place}.{step + 1}": f"{block}_project", f"{place}.{step + 2}": f"{block}_project_bn"}
    return modules
