import re

import keras
import numpy as np
import pytest
from small_networks import SIZE_PX, around, moved, norm_backbone, norm_model, pictures, values

from tfxfer.errors import CheckError, InputError
from tfxfer.model.build import build_model
from tfxfer.model.freeze import (
    adapt_batch_norm,
    audit_frozen,
    digest_frozen,
    freeze,
    frozen_variables,
    leading_blocks,
    list_layers,
    unfreeze,
    units_of,
)
from tfxfer.specs import BATCH_NORM_STATES

IMAGES, LABELS = pictures(24), np.arange(24) % 3
HEAD = {"logits/kernel", "logits/bias"}
KERNELS = {"b_conv/kernel", "c_conv/kernel"}
AFFINE = {f"{name}_bn/{part}" for name in "bc" for part in ("gamma", "beta")}
STATISTICS = {f"{name}_bn/moving_{part}" for name in "bc" for part in ("mean", "variance")}
# What a fit may move behind one frozen block, by the state of BatchNorm.
MOVES = {
    "frozen": KERNELS | HEAD,
    "affine": KERNELS | HEAD | AFFINE,
    "adapt": KERNELS | HEAD,
    "train": KERNELS | HEAD | AFFINE | STATISTICS,
}


def fit(model: keras.Model) -> None:
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="sparse_categorical_crossentropy")
    model.fit(IMAGES, LABELS, epochs=2, batch_size=8, verbose=0)


def trainable(model) -> set[str]:
    return {variable.path for variable in model.trainable_variables}


@pytest.mark.parametrize(
    ("depth", "count"),
    [(0, 0), (1, 1), (3, 3), ("2", 2), ("all", 3), ("a_conv", 1), ("b_conv", 2), ("c_conv", 3)],
)
def test_the_leading_blocks_freeze_and_the_rest_trains(depth, count):
    model = freeze(norm_model(), depth)
    blocks = [{f"{name}_conv/kernel", f"{name}_bn/gamma", f"{name}_bn/beta"} for name in "abc"]
    assert trainable(model) == HEAD.union(*blocks[count:])


@pytest.mark.parametrize("depth", [-1, 4, "4", "b_bn", 1.5])
def test_what_matches_no_block_is_refused_and_changes_nothing(depth):
    model = freeze(norm_model(), 1)
    before = trainable(model)
    with pytest.raises(InputError, match=r"(out of range: there are 3 blocks|No block is named 'b_bn')"):
        freeze(model, depth)
    assert trainable(model) == before


def test_an_unknown_state_of_batch_norm_is_refused_with_a_near_match():
    with pytest.raises(InputError, match=r"Unknown batch_norm 'affin'\. Did you mean 'affine'"):
        freeze(norm_model(), 1, batch_norm="affin")


@pytest.mark.parametrize("state", BATCH_NORM_STATES)
def test_freezing_sets_the_state_and_does_not_add_to_it(state):
    fresh = freeze(norm_model(), 1, batch_norm=state)
    model = norm_model()
    for earlier in BATCH_NORM_STATES:
        freeze(model, 0, batch_norm=earlier)
        for _ in range(2):
            freeze(model, 1, batch_norm=state)
            assert trainable(model) == trainable(fresh)
            assert set(frozen_variables(model)) == set(frozen_variables(fresh))
    assert trainable(unfreeze(model)) == trainable(freeze(norm_model(), 0))


def test_the_last_of_many_states_is_what_a_fit_obeys():
    model = norm_model()
    for depth, state in ((0, "affine"), ("all", "frozen"), (0, "train"), (2, "adapt"), (0, "affine"), (1, "affine")):
        freeze(model, depth, batch_norm=state)
    before = values(model)
    fit(model)
    assert moved(before, model) == MOVES["affine"]


@pytest.mark.parametrize("state", BATCH_NORM_STATES)
def test_each_state_moves_what_it_says_and_nothing_else_also_after_saving(state, tmp_path):
    model = freeze(norm_model(), 1, batch_norm=state)
    before, digests = values(model), digest_frozen(model)
    assert set(digests) == set(before) - MOVES[state]
    fit(model)
    assert moved(before, model) == MOVES[state]
    assert audit_frozen(model, digests)["bit_identical"] is True

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_array_equal(loaded.predict(IMAGES, verbose=0), model.predict(IMAGES, verbose=0))
    before = values(loaded)
    # Keras saves the flags of layers, not of variables: "affine" comes back as "frozen" until freeze is called again.
    kept = MOVES["frozen" if state == "affine" else state]
    assert set(digest_frozen(loaded)) == set(before) - kept
    fit(loaded)
    assert moved(before, loaded) == kept
    freeze(loaded, 1, batch_norm=state)
    assert set(digest_frozen(loaded)) == set(before) - MOVES[state]


def test_a_call_in_training_mode_moves_no_frozen_statistic():
    model = freeze(norm_model(), "all", batch_norm="train")
    before = values(model)
    model(IMAGES, training=True)
    assert moved(before, model) == set()


def test_adapted_statistics_are_the_means_over_the_batches_of_what_reaches_the_layer():
    model = freeze(norm_model(), 0, batch_norm="adapt")
    before = values(model)
    adapt_batch_norm(model, IMAGES[:20], batch_size=8)  # batches of 8, 8 and 4
    assert moved(before, model) == STATISTICS | {"a_bn/moving_mean", "a_bn/moving_variance"}

    def convolve(name, x):
        return keras.ops.convert_to_numpy(keras.ops.conv(x, before[f"{name}/kernel"], strides=2, padding="valid"))

    expected = {"a": [], "b": []}
    for start in (0, 8, 16):
        x = IMAGES[start : min(start + 8, 20)].astype(np.float32) / 255
        for name, statistics in expected.items():
            x = convolve(f"{name}_conv", x)
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            statistics.append([mean, variance])
            x = (x - mean) / np.sqrt(variance + 1e-3) * before[f"{name}_bn/gamma"] + before[f"{name}_bn/beta"]
            x = np.maximum(x, 0)
    after = values(model)
    for name, statistics in expected.items():
        mean, variance = np.mean(statistics, axis=0)
        np.testing.assert_allclose(after[f"{name}_bn/moving_mean"], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(after[f"{name}_bn/moving_variance"], variance, rtol=1e-4, atol=1e-6)


def test_adapting_leaves_frozen_blocks_and_the_state_alone():
    model = freeze(norm_model(), "a_conv", batch_norm="adapt")
    before, state = values(model), trainable(model)
    adapt_batch_norm(model, IMAGES)
    assert moved(before, model) == STATISTICS
    x = before["a_conv/kernel"]
    x = keras.ops.conv(IMAGES.astype(np.float32) / 255, x, strides=2)
    x = keras.ops.batch_normalization(
        x,
        before["a_bn/moving_mean"],
        before["a_bn/moving_variance"],
        -1,
        before["a_bn/beta"],
        before["a_bn/gamma"],
        1e-3,
    )
    x = keras.ops.convert_to_numpy(keras.ops.conv(keras.ops.relu(x), before["b_conv/kernel"], strides=2))
    np.testing.assert_allclose(values(model)["b_bn/moving_mean"], x.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(values(model)["b_bn/moving_variance"], x.var((0, 1, 2)), rtol=1e-4)
    assert trainable(model) == state
    adapted = values(model)
    fit(model)
    assert moved(adapted, model) == MOVES["adapt"]


@pytest.mark.parametrize("name", ["a_conv/kernel", "a_bn/moving_variance", "c_bn/moving_mean", "b_bn/gamma"])
def test_the_audit_names_a_frozen_variable_that_was_changed(name):
    model = freeze(norm_model(), 1, batch_norm="frozen")
    before = digest_frozen(model)
    assert audit_frozen(model, before)["bit_identical"] is True
    variable = next(v for v in model.weights if v.path == name)
    value = variable.numpy()
    value.flat[0] = np.nextafter(value.flat[0], np.float32(9))  # the last bit
    variable.assign(value)
    with pytest.raises(
        CheckError, match=rf"1 of 13 frozen variables changed during training, the first is {name}"
    ) as e:
        audit_frozen(model, before)
    assert e.value.exit_status == 1


def test_the_audit_counts_what_is_frozen():
    model = freeze(norm_model(), 1, batch_norm="frozen")
    audit = audit_frozen(model, digest_frozen(model))
    assert audit["num_variables"] == 1 + 3 * 4  # the kernel of the first block, four of each BatchNorm
    assert audit["num_parameters"] == 3 * 3 * 3 * 4 + 4 * (4 + 6 + 5)
    other = freeze(norm_model(seed=1), 1, batch_norm="frozen")
    assert audit["sha256"] != audit_frozen(other, digest_frozen(other))["sha256"]


@pytest.mark.parametrize("kind", ["backbone", "nested", "called with training=False"])
def test_statistics_hold_in_any_model_of_keras_while_gamma_trains(kind):
    """In `fit` Keras calls nested models in training mode, also where `training=False` was asked for."""
    model = norm_backbone()
    if kind != "backbone":
        inputs = keras.Input((SIZE_PX, SIZE_PX, 3))
        training = {"training": False} if kind != "nested" else {}
        model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(model(inputs, **training)))
    before = values(model)
    freeze(model, 1, batch_norm="affine")
    assert set(digest_frozen(model)) == {
        "a_conv/kernel",
        *(path for path in before if "a_bn" in path or "moving" in path),
    }
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    model.fit(IMAGES, np.eye(5)[LABELS], batch_size=8, verbose=0)
    assert moved(before, model) == KERNELS | AFFINE | (HEAD if kind != "backbone" else set())


def test_one_step_with_a_card_s_blocks_leaves_everything_frozen_bit_identical():
    model = freeze(build_model("digits_cnn", 3), "conv3")
    before = values(model)
    model.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
    model.fit(pictures(4, size_px=32), np.array([0, 1, 2, 0]), verbose=0)
    assert moved(before, model) == HEAD | {"dense1/kernel", "dense1/bias"}


def test_the_head_s_names_do_not_matter():
    model = freeze(around(norm_backbone(), ["cat", "dog"]), "all")
    assert trainable(model) == HEAD


# -- freezing by share, pattern and predicate ----------------------------------------------------------------------


def frozen_layers(model) -> set[str]:
    return {state.layer for state in list_layers(model) if not state.num_trainable}


@pytest.mark.parametrize(
    ("depth", "frozen"),
    [
        (0.34, {"a_conv", "a_bn"}),
        (0.5, {"a_conv", "a_bn", "b_conv", "b_bn"}),  # 1.5 blocks round to 2
        (re.compile("^b_"), {"b_conv", "b_bn"}),  # a gap: what lies before it trains
        ("re:^[ac]_", {"a_conv", "a_bn", "c_conv", "c_bn"}),
        ("re:b_conv", {"b_conv", "b_bn"}),  # the block's name is that of its first layer
        ("re:c_bn$", {"c_bn"}),
        (lambda layer: isinstance(layer, keras.layers.Conv2D), {"a_conv", "b_conv", "c_conv"}),
    ],
)
def test_what_is_frozen_stays_and_all_else_moves(depth, frozen):
    model = freeze(norm_model(), depth, batch_norm="train")
    assert frozen_layers(model) == frozen
    before = values(model)
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(pictures(8), np.arange(8) % 3, epochs=2, verbose=0)
    still = {path.rpartition("/")[0].split("/")[-1] for path in set(before) - moved(before, model)}
    assert still == frozen


@pytest.mark.parametrize("depth", [re.compile("nothing"), "re:nothing", lambda layer: False])
def test_what_matches_no_layer_is_refused(depth):
    with pytest.raises(InputError, match=r"matches no layer of 'norm_backbone'"):
        freeze(norm_model(), depth)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"The freeze pattern 're:\(' is not a regular expression"):
        freeze(norm_model(), "re:(")


@pytest.mark.parametrize(("depth", "leading"), [(2, 2), ("re:^[ac]_", 1), ("re:^b_", 0), ("re:conv", 3), ("all", 3)])
def test_only_leading_blocks_that_are_frozen_whole_can_be_computed_once(depth, leading):
    assert leading_blocks(norm_model(), depth) == leading


def test_layers_of_nested_models_are_frozen_one_by_one():
    norm = keras.layers.BatchNormalization(name="bn")
    tail = keras.Sequential([keras.Input((9,)), keras.layers.Dense(4, name="x"), norm, keras.layers.Dense(3, name="y")])
    tail.name = "tail"
    inputs = keras.Input((50,))
    whole = keras.Model(inputs, tail(keras.layers.Dense(9, name="wide")(inputs)))
    assert [name for name, _ in units_of(whole)] == ["wide", "tail/x", "tail/bn", "tail/y"]
    freeze(whole, "re:tail/[xb]", batch_norm="train")
    assert [layer.trainable for layer in tail.layers] == [False, False, True]
    freeze(whole, 1, batch_norm="affine")
    assert [layer.trainable for layer in tail.layers] == [True, False, True]
    assert norm.gamma.trainable and not norm.moving_mean.trainable


def test_a_frozen_spectral_normalisation_holds_its_kernel_and_a_trained_one_moves_it():
    """Keras assigns its kernel anew in each training step, whatever `trainable` says (keras 3.15)."""
    dense = keras.layers.Dense(4, name="dense")
    norm = keras.layers.SpectralNormalization(dense, name="spectral")
    net = keras.Sequential([keras.Input((6,)), norm, keras.layers.Dense(2, name="top")])
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    for frozen in (True, False, True):
        freeze(net, 1 if frozen else 0)
        net.compile("sgd", "mse")
        before = [values.copy() for values in norm.get_weights()]
        net.fit(x, x[:, :2], epochs=2, verbose=0)
        same = [np.array_equal(one, other) for one, other in zip(before, norm.get_weights(), strict=True)]
        assert all(same) == frozen and any(same) == frozen


def test_a_copy_s_flags_are_its_own():
    """The mistake of the classic tutorial: the source is frozen after the target was made from a copy of it."""
    source = norm_backbone()
    target = keras.models.clone_model(source)
    source.trainable = False
    assert target.trainable_variables and frozen_layers(target) == set()


def test_the_listing_adds_up():
    model = freeze(norm_model(), 1, batch_norm="affine")
    states = {state.layer: state for state in list_layers(model)}
    assert sum(state.num_parameters for state in states.values()) == model.count_params()
    assert (states["b_bn"].block, states["b_bn"].num_parameters, states["b_bn"].num_trainable) == ("b_conv", 24, 12)
    assert (states["logits"].block, states["logits"].num_trainable) == ("head", 18)


def test_statistics_are_adapted_where_nothing_is_frozen_and_nowhere_else():
    model = freeze(norm_model(), "re:^b_bn$|^a_", batch_norm="adapt")
    before = values(model)
    adapt_batch_norm(model, IMAGES)
    assert moved(before, model) == {"c_bn/moving_mean", "c_bn/moving_variance"}


def test_statistics_are_not_adapted_to_images_that_were_divided_by_255():
    model = freeze(norm_model(), 1, batch_norm="adapt")
    before = values(model)
    with pytest.raises(InputError, match="multiply them by 255"):
        adapt_batch_norm(model, pictures(8) / 255.0)
    assert moved(before, model) == set()
