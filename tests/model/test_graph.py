import keras
import numpy as np
import pytest
from keras import layers

from tfxfer.model.blocks import list_blocks
from tfxfer.model.graph import segments, tensors_behind


def names(runs):
    return [[layer.name for layer in run] for run in runs]


def residual_network() -> keras.Model:
    """A stem, a residual unit whose sum is no layer, a unit that merges in a layer, a top."""
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="stem")(inputs)
    y = layers.Dense(4, name="left")(x)
    z = layers.Dense(4, name="right")(layers.ReLU(name="relu")(y))
    x = x + z
    y = layers.Dense(4, name="up")(x)
    x = layers.Add(name="merged")([x, layers.Dense(4, name="down")(y)])
    return keras.Model(inputs, layers.Dense(2, name="top")(x))


def test_a_run_ends_where_one_tensor_alone_goes_on():
    network = residual_network()
    assert names(segments(network)) == [["stem"], ["left", "relu", "right"], ["up", "down", "merged"], ["top"]]
    assert [block.name for block in list_blocks(network)] == ["stem", "right", "merged", "top"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_network_can_be_parted_behind_each_block_even_behind_a_plain_sum(count):
    network = residual_network()
    held = [layer for block in list_blocks(network)[:count] for layer in block.layers]
    (tensor,) = tensors_behind(network, held)
    front, back = keras.Model(network.input, tensor), keras.Model(tensor, network.output)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(back(front(x)), network(x), atol=1e-6)


def test_inside_a_residual_unit_two_tensors_cross():
    found = tensors_behind(residual_network(), ["stem", "left"])
    assert len(found) == 2 and {tensor.shape for tensor in found} == {(None, 4)}


def test_what_is_frozen_behind_what_is_not_cannot_be_cut():
    assert tensors_behind(residual_network(), ["stem", "right"]) is None  # "left" stands between
    assert tensors_behind(residual_network(), ["right"]) is None


def test_the_cut_goes_where_the_fewest_numbers_cross():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="held")(inputs)
    x = layers.ReLU(name="relu")(x)
    x = layers.MaxPooling2D(4, name="pool")(x)
    padded = layers.ZeroPadding2D(1, name="pad")(x)
    x = layers.Dropout(0.5, name="drop")(padded)
    network = keras.Model(inputs, layers.Conv2D(2, 3, name="trained")(x))
    (tensor,) = tensors_behind(network, ["held"])
    assert tensor.shape == (None, 2, 2, 4)  # behind "pool", before "pad" makes it larger again
    (tensor,) = tensors_behind(network, ["held", "relu", "pool", "pad"])
    assert tensor is padded  # and what was asked for is held


def test_a_dense_unit_whose_every_output_is_read_later():
    inputs = keras.Input((4,))
    found = [layers.Dense(4, name="block_0")(inputs)]
    for unit in range(1, 4):
        joined = layers.Concatenate(name=f"join_{unit}")(found) if len(found) > 1 else found[0]
        found.append(layers.Dense(2, name=f"block_{unit}")(joined))
    network = keras.Model(inputs, layers.Dense(2, name="top")(layers.Concatenate(name="all")(found)))
    held = ["block_0", "block_1", "join_2", "block_2"]
    crossing = tensors_behind(network, held)
    # Three tensors of 4 + 2 + 2 numbers, or their concatenation, which is as large and is computed already.
    assert sum(tensor.shape[-1] for tensor in crossing) == 8
    front, back = keras.Model(network.input, crossing), keras.Model(crossing, network.output)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(back(front(x)), network(x), atol=1e-6)


def test_a_shared_layer_keeps_what_lies_between_its_calls_together():
    inputs = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    x = layers.Dense(4, name="between")(shared(inputs))
    network = keras.Model(inputs, layers.Dense(2, name="top")(shared(x)))
    assert ["shared", "between"] in names(segments(network)) or ["between", "shared"] in names(segments(network))


def test_units_in_names_make_one_block_of_several_runs():
    network = keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4, name=f"block_{unit}_{part}") for unit in (1, 2) for part in "ab")]
    )
    assert [(block.name, block.layers) for block in list_blocks(network)] == [
        ("block_1", ("block_1_a", "block_1_b")),
        ("block_2", ("block_2_a", "block_2_b")),
    ]


def test_what_has_no_weights_belongs_to_what_it_follows_and_the_first_to_the_first_block():
    network = keras.Sequential(
        [keras.Input((4,)), layers.Rescaling(2.0, name="scale"), layers.Dense(4, name="a"), layers.ReLU(name="r"),
         layers.BatchNormalization(name="bn"), layers.Dense(4, name="b")]
    )  # fmt: skip
    assert [(block.name, block.layers) for block in list_blocks(network)] == [
        ("a", ("scale", "a", "r", "bn")),
        ("b", ("b",)),
    ]
