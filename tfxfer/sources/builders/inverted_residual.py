"""The network that MobileNetV2 and EfficientNet-Lite share: a stem, inverted residual blocks, a wide 1x1 convolution.

Reference: M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen. MobileNetV2: Inverted Residuals and Linear
Bottlenecks. CVPR 2018.
"""

import dataclasses
from collections.abc import Sequence

import keras
from keras import layers


@dataclasses.dataclass(frozen=True)
class BlockGroup:
    """Blocks of one width: the first has the stride, all but the first are residual.

    Attributes:
        expansion: Channels inside a block, as a multiple of those that come in.
        kernel: Side of the depthwise kernel, in pixels.
        stride: Of the first block.
        channels: That go out.
        repeats: Number of blocks.
    """

    expansion: int
    kernel: int
    stride: int
    channels: int
    repeats: int


@dataclasses.dataclass
class _Maker:
    """Makes the layers of one network; holds what all of them share."""

    torch_padding: bool
    epsilon: float
    seed: int | None
    num_kernels: int = 0

    def initializer(self) -> keras.initializers.Initializer:
        # Each kernel its own seed: Keras gives equal values to equal shapes under one seed.
        seed = None if self.seed is None else self.seed * 1000 + self.num_kernels
        self.num_kernels += 1
        return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal", seed=seed)

    def padded(self, x, kernel: int, stride: int, name: str):
        """`x` and the padding the convolution needs; torch pads stride 2 on both sides, Keras' "same" need not."""
        if stride == 1 or not self.torch_padding:
            return x, "same"
        return layers.ZeroPadding2D(kernel // 2, name=name)(x), "valid"

    def normalised(self, x, name: str):
        # Momentum 0.9: target sets are small, at 0.99 the moving statistics would need hundreds of steps.
        return layers.BatchNormalization(momentum=0.9, epsilon=self.epsilon, name=name)(x)

    def conv(self, x, filters: int, name: str, *, bn_name: str, kernel: int = 1, stride: int = 1):
        x, padding = self.padded(x, kernel, stride, f"{name.rpartition('_')[0]}_pad")
        x = layers.Conv2D(
            filters, kernel, stride, padding, use_bias=False, kernel_initializer=self.initializer(), name=name
        )(x)
        return self.normalised(x, bn_name)

    def block(self, x, group: BlockGroup, stride: int, name: str):
        channels_in = x.shape[-1]
        y = x
        if group.expansion != 1:
            y = self.conv(y, channels_in * group.expansion, f"{name}_expand", bn_name=f"{name}_expand_bn")
            y = layers.ReLU(6.0, name=f"{name}_expand_relu")(y)
        y, padding = self.padded(y, group.kernel, stride, f"{name}_pad")
        y = layers.DepthwiseConv2D(
            group.kernel,
            stride,
            padding,
            use_bias=False,
            depthwise_initializer=self.initializer(),
            name=f"{name}_depthwise",
        )(y)
        y = self.normalised(y, f"{name}_depthwise_bn")
        y = layers.ReLU(6.0, name=f"{name}_depthwise_relu")(y)
        y = self.conv(y, group.channels, f"{name}_project", bn_name=f"{name}_project_bn")
        if stride == 1 and channels_in == group.channels:
            y = layers.Add(name=f"{name}_add")([x, y])
        return y


def build_network(
    image_size_px: int,
    groups: Sequence[BlockGroup],
    *,
    name: str,
    torch_padding: bool,
    epsilon: float,
    include_top: bool = False,
    seed: int | None = None,
) -> keras.Model:
    """Build the network with random weights.

    Args:
        image_size_px: Side of the input, at least 1.
        groups: The blocks, in order.
        name: Of the model.
        torch_padding: Pad stride 2 on both sides as torch does; otherwise TensorFlow's "same".
        epsilon: Of every BatchNorm.
        include_top: End with the logits of the 1000 ImageNet classes; otherwise with the pooled features.
        seed: Of the initial kernels; None: Keras' global seed.

    Returns:
        A functional model, (N, S, S, 3) float32, normalised, to (N, 1280) features or (N, 1000) logits.
    """
    make = _Maker(torch_padding, epsilon, seed)
    images = keras.Input((image_size_px, image_size_px, 3), name="images")
    x = make.conv(images, 32, "stem_conv", bn_name="stem_bn", kernel=3, stride=2)
    x = layers.ReLU(6.0, name="stem_relu")(x)
    number = 0
    for group in groups:
        for repeat in range(group.repeats):
            x = make.block(x, group, group.stride if repeat == 0 else 1, f"block_{number:02d}")
            number += 1
    x = make.conv(x, 1280, "top_conv", bn_name="top_bn")
    x = layers.ReLU(6.0, name="top_relu")(x)
    x = layers.GlobalAveragePooling2D(name="top_pool")(x)
    if include_top:
        x = layers.Dense(1000, kernel_initializer=make.initializer(), name="logits")(x)
    return keras.Model(images, x, name=name)
