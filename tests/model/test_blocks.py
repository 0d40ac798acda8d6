import keras
import pytest
from small_networks import BLOCKS, norm_backbone, norm_model, skip_backbone

from tfxfer.errors import InputError
from tfxfer.features.cut import cut_model
from tfxfer.model.blocks import backbone_of, list_blocks, resolve_depth
from tfxfer.sources.catalog import get_source, list_sources, load_backbone
from tfxfer.specs import Block

THREE = (Block("stem", ("stem_conv",), 1), Block("block_1", ("block_1_a", "block_1_b"), 2), Block("top", ("top",), 3))


@pytest.mark.parametrize("name", [card.name for card in list_sources()])
def test_the_card_s_blocks_hold_every_layer_once_and_every_parameter(name):
    card = get_source(name)
    backbone = load_backbone(name, weights=False, image_size=None if card.fixed_size else 64)
    blocks = list_blocks(backbone)
    assert tuple(block.name for block in blocks) == card.blocks
    held = [layer for block in blocks for layer in block.layers]
    assert sorted(held) == sorted(layer.name for layer in backbone.layers[1:])
    assert sum(block.num_parameters for block in blocks) == backbone.count_params()
    for block in blocks:
        assert all(layer == block.name or layer.startswith(f"{block.name}_") for layer in block.layers)


def test_where_there_is_no_card_each_layer_with_weights_but_batch_norm_begins_a_block():
    blocks = list_blocks(norm_backbone())
    assert [block.name for block in blocks] == list(BLOCKS)
    assert [block.layers[:3] for block in blocks] == [
        tuple(f"{n}_{kind}" for kind in ("conv", "bn", "relu")) for n in "abc"
    ]
    assert blocks[-1].layers[3:] == ("pool",)
    assert [block.num_parameters for block in blocks] == [27 * 4 + 4 * 4, 36 * 6 + 4 * 6, 54 * 5 + 4 * 5]
    assert [block.name for block in list_blocks(skip_backbone())] == ["block_1", "block_2", "block_3"]


def test_a_model_has_the_blocks_of_its_backbone():
    model = norm_model()
    assert backbone_of(model).name == "norm_backbone"
    assert list_blocks(model) == list_blocks(norm_backbone())


def test_a_cut_model_keeps_the_names_of_the_blocks_left():
    from tfxfer.model.build import build_model

    cut = cut_model(build_model("digits_cnn", 3, weights=False), 2)
    assert [block.name for block in list_blocks(cut.suffix)] == ["conv3", "dense1"]


def test_two_nested_models_leave_open_which_is_meant():
    inputs = keras.Input((4,))
    nested = [keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)], name=name) for name in ("one", "two")]
    model = keras.Model(inputs, nested[1](nested[0](inputs)), name="pair")
    with pytest.raises(InputError, match=r"'pair' holds several nested models \(one, two\)"):
        backbone_of(model)


def test_a_layer_outside_all_blocks_of_the_card_is_named():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="stray")(keras.layers.Dense(4, name="conv1")(inputs))
    with pytest.raises(InputError, match=r"Layers stray belong to no block"):
        list_blocks(keras.Model(inputs, x, name="digits_cnn"))


@pytest.mark.parametrize(
    ("depth", "count"),
    [(0, 0), (2, 2), (3, 3), ("all", 3), ("0", 0), ("2", 2), ("3", 3), ("stem", 1), ("block_1", 2), ("top", 3)],
)
def test_depth_is_a_count_a_name_or_all(depth, count):
    assert resolve_depth(THREE, depth) == count


@pytest.mark.parametrize("depth", [-1, 4, "4", "-1", 1.5, "1.5", True])
def test_a_depth_out_of_range_is_refused(depth):
    with pytest.raises(
        InputError, match=r"out of range: there are 3 blocks; give 0 to 3, a share between 0 and 1, or all"
    ):
        resolve_depth(THREE, depth)


@pytest.mark.parametrize("depth", ["block_2", "ALL", "", "1.5x"])
def test_an_unknown_name_is_refused_with_the_names_there_are(depth):
    with pytest.raises(InputError, match=r"No block is named '.*'; .* one of stem, block_1, top"):
        resolve_depth(THREE, depth)
