"""The image networks of keras.applications by family: names, what they do to pixels, where weights come from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tfxfer.sources.ranges import range_facts


@dataclasses.dataclass(frozen=True)
class Family:
    """What the networks of one paper have in common.

    Attributes:
        members: Name to the function in keras.applications and the side in pixels that ImageNet's weights are for.
        facts: `scale`, `offset` and `channel_order`: what `preprocess_input` and the network itself do to pixels.
        licence: Of ImageNet's weights, as Keras' documentation tells where they come from.
        paper: Authors, title, venue, year.
        min_image_size_px: The smallest side that Keras builds.
        inside: How the network scales pixels itself: "" (it does not), "argument" (unless include_preprocessing is
            False), "layers" (always).
        fixed_top: Whether the old output takes one side only.
    """

    members: Mapping[str, tuple[str, int]]
    facts: Mapping[str, Any]
    licence: str
    paper: str
    min_image_size_px: int = 32
    inside: str = ""
    fixed_top: bool = False


FAMILIES: dict[str, Family] = {
    "convnext": Family(
        {
            "convnext_tiny": ("ConvNeXtTiny", 224),
            "convnext_small": ("ConvNeXtSmall", 224),
            "convnext_base": ("ConvNeXtBase", 224),
            "convnext_large": ("ConvNeXtLarge", 224),
            "convnext_xlarge": ("ConvNeXtXLarge", 224),
        },
        range_facts("imagenet"),
        "MIT",
        "Z. Liu, H. Mao, C.-Y. Wu, C. Feichtenhofer, T. Darrell, S. Xie. A ConvNet for the 2020s. CVPR 2022.",
        inside="argument",
    ),
    "densenet": Family(
        {
            "densenet121": ("DenseNet121", 224),
            "densenet169": ("DenseNet169", 224),
            "densenet201": ("DenseNet201", 224),
        },
        range_facts("imagenet"),
        "BSD-3-Clause",
        "G. Huang, Z. Liu, L. van der Maaten, K. Q. Weinberger. Densely Connected Convolutional Networks. CVPR 2017.",
    ),
    "efficientnet": Family(
        {
            "efficientnet_b0": ("EfficientNetB0", 224),
            "efficientnet_b1": ("EfficientNetB1", 240),
            "efficientnet_b2": ("EfficientNetB2", 260),
            "efficientnet_b3": ("EfficientNetB3", 300),
            "efficientnet_b4": ("EfficientNetB4", 380),
            "efficientnet_b5": ("EfficientNetB5", 456),
            "efficientnet_b6": ("EfficientNetB6", 528),
            "efficientnet_b7": ("EfficientNetB7", 600),
        },
        range_facts("imagenet"),
        "Apache-2.0",
        "M. Tan, Q. V. Le. EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks. ICML 2019.",
        inside="layers",
    ),
    "efficientnet_v2_b": Family(
        {
            "efficientnet_v2_b0": ("EfficientNetV2B0", 224),
            "efficientnet_v2_b1": ("EfficientNetV2B1", 240),
            "efficientnet_v2_b2": ("EfficientNetV2B2", 260),
            "efficientnet_v2_b3": ("EfficientNetV2B3", 300),
        },
        range_facts("imagenet"),
        "Apache-2.0",
        "M. Tan, Q. V. Le. EfficientNetV2: Smaller Models and Faster Training. ICML 2021.",
        inside="argument",
    ),
    "efficientnet_v2": Family(
        {
            "efficientnet_v2_s": ("EfficientNetV2S", 384),
            "efficientnet_v2_m": ("EfficientNetV2M", 480),
            "efficientnet_v2_l": ("EfficientNetV2L", 480),
        },
        {"scale": (1 / 128,) * 3, "offset": (-1.0,) * 3, "channel_order": "rgb"},
        "Apache-2.0",
        "M. Tan, Q. V. Le. EfficientNetV2: Smaller Models and Faster Training. ICML 2021.",
        inside="argument",
    ),
    "inception_resnet_v2": Family(
        {"inception_resnet_v2": ("InceptionResNetV2", 299)},
        range_facts("-1..1"),
        "Apache-2.0",
        "C. Szegedy, S. Ioffe, V. Vanhoucke, A. Alemi. Inception-v4, Inception-ResNet and the Impact of Residual "
        "Connections on Learning. AAAI 2017.",
        min_image_size_px=75,
    ),
    "inception_v3": Family(
        {"inception_v3": ("InceptionV3", 299)},
        range_facts("-1..1"),
        "Apache-2.0",
        "C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna. Rethinking the Inception Architecture for Computer "
        "Vision. CVPR 2016.",
        min_image_size_px=75,
    ),
    "mobilenet": Family(
        {"mobilenet": ("MobileNet", 224)},
        range_facts("-1..1"),
        "Apache-2.0",
        "A. G. Howard et al. MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications. "
        "arXiv 1704.04861, 2017.",
    ),
    "mobilenet_v2": Family(
        {"mobilenet_v2": ("MobileNetV2", 224)},
        range_facts("-1..1"),
        "Apache-2.0",
        "M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen. MobileNetV2: Inverted Residuals and Linear "
        "Bottlenecks. CVPR 2018.",
    ),
    "mobilenet_v3": Family(
        {
            "mobilenet_v3_small": ("MobileNetV3Small", 224),
            "mobilenet_v3_large": ("MobileNetV3Large", 224),
        },
        range_facts("-1..1"),
        "Apache-2.0",
        "A. Howard et al. Searching for MobileNetV3. ICCV 2019.",
        inside="argument",
    ),
    "nasnet": Family(
        {
            "nasnet_mobile": ("NASNetMobile", 224),
            "nasnet_large": ("NASNetLarge", 331),
        },
        range_facts("-1..1"),
        "Apache-2.0",
        "B. Zoph, V. Vasudevan, J. Shlens, Q. V. Le. Learning Transferable Architectures for Scalable Image "
        "Recognition. CVPR 2018.",
    ),
    "resnet": Family(
        {
            "resnet50": ("ResNet50", 224),
            "resnet101": ("ResNet101", 224),
            "resnet152": ("ResNet152", 224),
        },
        range_facts("caffe"),
        "MIT",
        "K. He, X. Zhang, S. Ren, J. Sun. Deep Residual Learning for Image Recognition. CVPR 2016.",
    ),
    "resnet_v2": Family(
        {
            "resnet50_v2": ("ResNet50V2", 224),
            "resnet101_v2": ("ResNet101V2", 224),
            "resnet152_v2": ("ResNet152V2", 224),
        },
        range_facts("-1..1"),
        "Apache-2.0",
        "K. He, X. Zhang, S. Ren, J. Sun. Identity Mappings in Deep Residual Networks. ECCV 2016.",
    ),
    "vgg": Family(
        {
            "vgg16": ("VGG16", 224),
            "vgg19": ("VGG19", 224),
        },
        range_facts("caffe"),
        "CC-BY-4.0",
        "K. Simonyan, A. Zisserman. Very Deep Convolutional Networks for Large-Scale Image Recognition. ICLR 2015.",
        fixed_top=True,
    ),
    "xception": Family(
        {"xception": ("Xception", 299)},
        range_facts("-1..1"),
        "MIT",
        "F. Chollet. Xception: Deep Learning with Depthwise Separable Convolutions. CVPR 2017.",
        min_image_size_px=71,
    ),
}
MEMBERS = {name: family for family in FAMILIES.values() for name in family.members}
