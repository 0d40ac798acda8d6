import dataclasses
import itertools
import subprocess
import sys

import pytest

from tfxfer.errors import InputError
from tfxfer.sources import KINDS
from tfxfer.sources.builders import BUILDERS, TORCH_MODULES
from tfxfer.sources.catalog import class_names_of, get_source, list_sources, load_backbone

# With the old output; by torch (mobilenet_v2, efficientnet-lite) and by hand for the tutorial's network.
NUM_PARAMETERS = {
    "digits_cnn": 122_570,
    "efficientnet_lite0_imagenet": 4_652_008,
    "efficientnet_lite1_imagenet": 5_416_680,
    "efficientnet_lite2_imagenet": 6_092_072,
    "mobilenet_v2_imagenet": 3_504_872,
}
NAMES = tuple(NUM_PARAMETERS)


def test_the_catalogue_lists_the_sources_without_tensorflow():
    code = (
        "import sys; from tfxfer.sources.catalog import list_sources; "
        "print(*[source.name for source in list_sources()], 'tensorflow' in sys.modules, 'keras' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [*NAMES, "False", "False"]


@pytest.mark.parametrize("source", list_sources(), ids=lambda source: source.name)
def test_a_card_is_complete_and_true(source):
    assert source.kind in KINDS and source.architecture in BUILDERS
    assert len(source.weights["sha256"]) == 64 and source.weights["file"]
    assert source.licence in {"Apache-2.0", "BSD-3-Clause", "MIT"} and source.paper and source.title
    assert len(source.scale) == len(source.offset) == 3
    assert source.min_image_size_px <= source.image_size_px
    names = class_names_of(source)
    assert len(names) == len(set(names)) == source.num_classes

    model = load_backbone(source, weights=False)
    size_px = source.image_size_px
    assert model.input_shape == (None, size_px, size_px, 3) and model.output_shape == (None, source.features)
    top = load_backbone(source, weights=False, include_top=True)
    assert top.output_shape == (None, source.num_classes) and top.name == source.architecture
    assert sum(int(weight.shape.num_elements()) for weight in top.trainable_weights) == NUM_PARAMETERS[source.name]


@pytest.mark.parametrize("source", list_sources(), ids=lambda source: source.name)
def test_each_layer_belongs_to_one_block_in_the_order_of_the_network(source):
    model = load_backbone(source, weights=False)
    owners = []
    for layer in model.layers[1:]:  # all but the input
        owner = [block for block in source.blocks if layer.name == block or layer.name.startswith(f"{block}_")]
        assert len(owner) == 1, layer.name
        owners += owner
    assert tuple(block for block, _ in itertools.groupby(owners)) == source.blocks


def test_every_torch_source_says_how_its_modules_are_called():
    needed = {source.architecture for source in list_sources() if source.kind == "torch_checkpoint"}
    assert needed == set(TORCH_MODULES)


def test_an_unknown_source_is_refused_with_near_matches():
    with pytest.raises(InputError, match=r"Unknown source 'mobilenet_v2'. Did you mean 'mobilenet_v2_imagenet'\?"):
        get_source("mobilenet_v2")
    with pytest.raises(InputError, match=r"Unknown kind of source 'kreas' in .*\. Did you mean 'keras'"):
        load_backbone("kreas:MobileNetV2")
    with pytest.raises(InputError, match=r"A source is its name or its card, not 7"):
        load_backbone(7)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "mobilenet_v2_imagenet",
            31,
            "Images of 31 px are smaller than mobilenet_v2_imagenet can take.* at least 32 px",
        ),
        ("efficientnet_lite0_imagenet", 0, "Images of 0 px are smaller than efficientnet_lite0_imagenet can take"),
        ("digits_cnn", 28, "digits_cnn takes images of 32 px only, not of 28 px"),
        ("digits_cnn", 64, "digits_cnn takes images of 32 px only, not of 64 px"),
        ("mobilenet_v2_imagenet", 96.0, "whole number of pixels, not 96.0"),
        ("mobilenet_v2_imagenet", True, "whole number of pixels, not True"),
    ],
)
def test_an_image_size_that_the_network_cannot_take_is_refused(name, size, message):
    with pytest.raises(InputError, match=message):
        load_backbone(name, image_size=size)


def test_the_smallest_image_size_works():
    assert load_backbone("mobilenet_v2_imagenet", image_size=32, weights=False).input_shape == (None, 32, 32, 3)


def test_imagenet_names_are_in_torch_order_and_told_apart():
    names = class_names_of("efficientnet_lite0_imagenet")
    assert names == class_names_of("mobilenet_v2_imagenet")
    # Index and meaning as in ImageNet-1k; the two pairs that share one word in the list of names.
    assert (names[0], names[388], names[954], names[999]) == ("tench", "giant panda", "banana", "toilet paper")
    assert (names[657], names[744]) == ("missile", "missile (projectile)")
    assert (names[836], names[837]) == ("sunglasses (sunglass)", "sunglasses")
    assert class_names_of("digits_cnn") == tuple("0123456789")


def test_a_card_with_unknown_parts_is_refused():
    card = get_source("digits_cnn")
    with pytest.raises(InputError, match=r"Unknown architecture 'digits_rnn'. Did you mean 'digits_cnn'"):
        load_backbone(dataclasses.replace(card, architecture="digits_rnn"))
    with pytest.raises(InputError, match=r"Unknown source kind 'keras_h6'. Did you mean 'keras_h5'"):
        load_backbone(dataclasses.replace(card, kind="keras_h6"))
    with pytest.raises(InputError, match=r"architecture for a torch checkpoint 'digits_cnn'"):
        load_backbone(dataclasses.replace(card, kind="torch_checkpoint", weights=get_source(NAMES[1]).weights))
    with pytest.raises(InputError, match=r"Unknown set of class names 'imagenet22k'. Did you mean 'imagenet'"):
        class_names_of(dataclasses.replace(card, class_names="imagenet22k"))
