import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_networks import norm_model

from tfxfer.errors import InputError
from tfxfer.features.cut import cut_model
from tfxfer.methods.optimizers import BlockwiseAdamW, blockwise_factors
from tfxfer.model.freeze import freeze
from tfxfer.sources.kerashub_layer import HubBackbone

FACTORS = {"a": 0.25, "b": 1.0}
X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = X[:, :3] ** 2
# Keras takes the betas through float32; these are exact in it.
EXACT = {"beta_1": 0.875, "beta_2": 0.75, "epsilon": 1e-12}


def network(seed: int = 0) -> keras.Model:
    """Two layers; "sequential/a/kernel" here is "a/kernel" once it was saved and loaded."""
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(5, activation="tanh", name="a"), keras.layers.Dense(3, name="b")]
    return keras.Sequential([keras.Input((4,)), *layers])


def fitted(optimizer, model=None) -> keras.Model:
    model = model or network()
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model


def walked(optimizer, *, batch_size: int = 8, model=None) -> list[list[np.ndarray]]:
    """The weights after each step of one eager epoch."""
    model, seen = model or network(), []
    for start in range(0, len(X), batch_size):
        rows = slice(start, start + batch_size)
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((model(X[rows]) - Y[rows]) ** 2)
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)
        seen.append(model.get_weights())
    return seen


def two_variables() -> list[keras.Variable]:
    layers = [keras.layers.Dense(2, name=name, dtype="float64") for name in "ab"]
    for layer in layers:
        layer.build((None, 2))
    return [layer.kernel for layer in layers]


def numpy_adamw(values, gradients, rates, *, weight_decay, beta_1, beta_2):
    """Loshchilov and Hutter, algorithm 2, each variable at its own rate, without epsilon."""
    first = second = 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = beta_1 * first + (1 - beta_1) * gradient
        second = beta_2 * second + (1 - beta_2) * gradient**2
        update = (first / (1 - beta_1**step)) / np.sqrt(second / (1 - beta_2**step))
        values = values - rate * (update + weight_decay * values)
    return values


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("graph", [False, True])
def test_steps_are_those_of_adamw_by_hand_each_variable_at_its_own_rate(steps, graph):
    variables = two_variables()
    starts = [variable.numpy() for variable in variables]
    gradients = np.random.default_rng(1).normal(0, 1, (steps, 2, 2, 2)) + 0.1
    rate = keras.optimizers.schedules.ExponentialDecay(0.25, 1, 0.5)
    optimizer = BlockwiseAdamW(rate, factors=FACTORS, weight_decay=0.5, **EXACT)
    optimizer.build(variables)
    apply = tf.function(optimizer.apply) if graph else optimizer.apply
    for gradient in gradients:
        apply([tf.constant(value) for value in gradient])
    rates = 0.25 * 0.5 ** np.arange(steps)
    for index, factor in enumerate((0.25, 1.0)):
        expected = numpy_adamw(
            starts[index], gradients[:, index], factor * rates, weight_decay=0.5, beta_1=0.875, beta_2=0.75
        )
        np.testing.assert_allclose(variables[index].numpy(), expected, rtol=1e-7)


def test_one_step_by_hand():
    """At step one Adam's update is the sign of the gradient: w - f lr (sign(g) + wd w)."""
    variables = two_variables()
    for variable in variables:
        variable.assign([[1.0, -2.0], [0.5, 4.0]])
    optimizer = BlockwiseAdamW(0.5, factors=FACTORS, weight_decay=0.25, **EXACT)
    optimizer.apply([tf.constant([[3.0, -0.01], [7.0, 1.0]], tf.float64)] * 2, variables)
    np.testing.assert_allclose(variables[1], [[0.375, -1.25], [-0.0625, 3.0]], rtol=1e-7)
    np.testing.assert_allclose(variables[0], [[0.84375, -1.8125], [0.359375, 3.75]], rtol=1e-7)


def test_scaling_the_gradient_does_nothing_and_the_factor_scales_the_update():
    gradient = np.random.default_rng(2).normal(0, 1, (2, 2)) + 0.1
    moves = []
    for scale, factor in ((1.0, 1.0), (1000.0, 1.0), (1.0, 1e-3)):
        variables = two_variables()
        start = variables[0].numpy()
        optimizer = BlockwiseAdamW(0.1, factors={"a": factor, "b": 1.0}, weight_decay=0.0, **EXACT)
        optimizer.apply([tf.constant(scale * gradient), tf.constant(gradient)], variables)
        moves.append(variables[0].numpy() - start)
    np.testing.assert_allclose(moves[1], moves[0], rtol=1e-6)
    np.testing.assert_allclose(moves[2], 1e-3 * moves[0], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "global_clipnorm": 0.5}, {"clipnorm": 0.1}])
def test_with_factors_of_one_it_is_the_adamw_of_keras_bit_for_bit(options):
    plain = keras.optimizers.AdamW(0.05, weight_decay=0.3, **options)
    plain.exclude_from_weight_decay(var_names=["bias"])
    ours = BlockwiseAdamW(0.05, factors={"": 1}, no_decay=["bias"], weight_decay=0.3, **options)
    one, two = (walked(optimizer) for optimizer in (ours, plain))
    for found, expected in zip(one[-1], two[-1], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_no_decay_goes_by_the_last_part_of_the_path_and_keras_exclusions_hold_too():
    gradients = [tf.zeros((3, 3)), tf.zeros(3)] * 2
    layers = [keras.layers.Dense(3, name=name, bias_initializer="ones") for name in ("bias_free", "other")]
    for layer in layers:
        layer.build((None, 3))
    variables = [variable for layer in layers for variable in layer.variables]
    before = [variable.numpy() for variable in variables]
    optimizer = BlockwiseAdamW(0.5, factors={"": 1.0}, no_decay=["bias"], weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[layers[1].kernel])
    optimizer.apply(gradients, variables)
    shrunk = [np.allclose(v.numpy(), 0.75 * start) for v, start in zip(variables, before, strict=True)]
    stayed = [np.array_equal(v.numpy(), start) for v, start in zip(variables, before, strict=True)]
    assert shrunk == [True, False, False, False] and stayed == [False, True, True, True]


def test_accumulated_halves_of_a_batch_are_the_batch():
    options = {"factors": FACTORS, "weight_decay": 0.3, "no_decay": ["bias"]}
    whole = walked(BlockwiseAdamW(0.05, **options), batch_size=16)
    halves = walked(BlockwiseAdamW(0.05, gradient_accumulation_steps=2, **options), batch_size=8)
    for one, two in zip(halves[-1], whole[-1], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    for one, two in zip(halves[0], network().get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)  # nothing moves, nor decays, at half a batch


def test_the_moving_average_of_keras_follows_the_scaled_steps():
    options = {"factors": FACTORS, "weight_decay": 0.3}
    expected, *seen = walked(BlockwiseAdamW(0.05, **options))
    for weights in seen:
        expected = [0.6 * old + 0.4 * new for old, new in zip(expected, weights, strict=True)]
    optimizer, model = BlockwiseAdamW(0.05, use_ema=True, ema_momentum=0.6, **options), network()
    walked(optimizer, model=model)
    optimizer.finalize_variable_values(model.trainable_variables)
    for one, two in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_the_config_says_all():
    optimizer = BlockwiseAdamW(0.02, factors=FACTORS, no_decay=["bias", "gamma"], weight_decay=0.1, clipnorm=2.0)
    optimizer.build(network().trainable_variables)
    config = json.loads(json.dumps(optimizer.get_config()))
    again = BlockwiseAdamW.from_config(config)
    assert again.get_config() == optimizer.get_config()
    assert config["factors"] == FACTORS and config["no_decay"] == ["bias", "gamma"] and config["clipnorm"] == 2.0
    restored = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(restored) is BlockwiseAdamW and restored.get_config() == optimizer.get_config()
    assert keras.saving.get_registered_name(BlockwiseAdamW) == "tfxfer>BlockwiseAdamW"


def test_a_saved_model_goes_on_as_if_it_had_never_stopped(tmp_path):
    rate = keras.optimizers.schedules.CosineDecay(0.05, 30)
    model = fitted(BlockwiseAdamW(rate, factors=FACTORS, no_decay=["bias"], weight_decay=0.3))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is BlockwiseAdamW
    assert loaded.trainable_variables[0].path != model.trainable_variables[0].path  # or this test shows less
    before = model.get_weights()
    for each in (model, loaded):
        each.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for one, two, old in zip(loaded.get_weights(), model.get_weights(), before, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)
        assert np.abs(two - old).max() > 1e-3


def test_a_checkpoint_of_tensorflow_brings_its_state_back(tmp_path):
    variables = two_variables()
    optimizer = BlockwiseAdamW(0.1, factors=FACTORS)
    optimizer.apply([tf.ones((2, 2), tf.float64)] * 2, variables)
    path = tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "state"))
    other = BlockwiseAdamW(0.1, factors=FACTORS)
    other.build(two_variables())
    tf.train.Checkpoint(optimizer=other).read(path).expect_partial()
    for one, two in zip(other.variables, optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


@pytest.mark.parametrize(
    ("path", "factor"),
    [
        ("conv/kernel", 0.1),
        ("net/conv/kernel", 0.1),
        ("net/conv/bias", 0.2),  # the longer of two that begin at one place
        ("conv_2/kernel", 0.9),
        ("block/conv/kernel", 0.3),  # the one that begins first
        ("block", 0.3),
        ("reconv/kernel", 0.9),
    ],
)
def test_names_match_whole_parts_of_a_path(path, factor):
    optimizer = BlockwiseAdamW(factors={"": 0.9, "conv": 0.1, "conv/bias": 0.2, "block": 0.3})
    assert optimizer.factor_of(path) == factor


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf"), "1", None])
def test_a_factor_that_is_none_is_refused(factor):
    with pytest.raises(InputError, match="factor of 'a'"):
        BlockwiseAdamW(factors={"a": factor})


def test_a_variable_without_a_factor_is_named_before_anything_moves():
    model = network()
    before = model.get_weights()
    with pytest.raises(InputError, match=r"'sequential.*/b/kernel'"):
        fitted(BlockwiseAdamW(factors={"a": 1.0}), model)
    for one, two in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_factor_of_zero_stands_still():
    last = walked(BlockwiseAdamW(0.1, factors={"a": 0.0, "b": 1.0}, weight_decay=0.5))[-1]
    moved = [not np.array_equal(one, two) for one, two in zip(last, network().get_weights(), strict=True)]
    assert moved == [False, False, True, True]


MIRRORED = """
import sys
import keras, numpy as np, tensorflow as tf
from tfxfer.methods.optimizers import BlockwiseAdamW
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, "tests/methods")
from test_optimizers import FACTORS, fitted, network
results = []
for strategy in (tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.get_strategy()):
    with strategy.scope():
        options = dict(weight_decay=0.3, no_decay=["bias"], global_clipnorm=0.3, use_ema=True, ema_momentum=0.8)
        model = fitted(BlockwiseAdamW(0.05, factors=FACTORS, **options))
    results.append(model.get_weights())
    print("replicas", strategy.num_replicas_in_sync)
print("moved", max(np.abs(a - b).max() for a, b in zip(results[0], network().get_weights())))
print("apart", max(np.abs(a - b).max() for a, b in zip(*results)))
"""


def test_two_replicas_train_as_one_device_does():
    """In a process of its own: the logical devices must be made before TensorFlow is used."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MIRRORED], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "replicas 2" in done.stdout and "replicas 1" in done.stdout
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("moved", "apart")))
    assert float(found["moved"]) > 0.05 and float(found["apart"]) < 1e-6, done.stdout


def factor_by_variable(model, decay=0.5):
    optimizer = BlockwiseAdamW(factors=blockwise_factors(model, decay))
    return {variable.path: optimizer.factor_of(variable.path) for variable in model.trainable_variables}


def test_each_block_has_decay_times_the_rate_of_the_next_and_the_head_has_it_whole():
    """BEiT: decay ** (L + 1 - l) for layer l of L; the head is layer L + 1."""
    model = freeze(norm_model(), 0)
    assert blockwise_factors(model, 0.5) == {
        **dict.fromkeys(("a_conv", "a_bn"), 0.125),
        **dict.fromkeys(("b_conv", "b_bn"), 0.25),
        **dict.fromkeys(("c_conv", "c_bn"), 0.5),
        "logits": 1.0,
    }
    assert set(blockwise_factors(model, 1.0).values()) == {1.0}


@pytest.mark.parametrize("batch_norm", ["affine", "train", "frozen"])
def test_frozen_blocks_do_not_count(batch_norm):
    found = factor_by_variable(freeze(norm_model(), "a_conv", batch_norm=batch_norm))
    assert {path.split("/")[0]: factor for path, factor in found.items() if "conv" in path or "logits" in path} == {
        "b_conv": 0.25,
        "c_conv": 0.5,
        "logits": 1.0,
    }
    assert found.get("b_bn/gamma") == (None if batch_norm == "frozen" else 0.25)


def test_a_gap_of_frozen_blocks_is_stepped_over():
    model = freeze(norm_model(), lambda layer: layer.name.startswith("b_"))
    assert factor_by_variable(model)["a_conv/kernel"] == 0.25
    assert factor_by_variable(freeze(norm_model())) == {"logits/kernel": 1.0, "logits/bias": 1.0}


def test_the_suffix_of_a_cut_model_has_the_same_factors():
    model = freeze(norm_model(), 1)
    suffix = cut_model(model, 1).suffix
    optimizer = BlockwiseAdamW(factors=blockwise_factors(model, 0.5))
    found = {variable.path: optimizer.factor_of(variable.path) for variable in suffix.trainable_variables}
    assert found == factor_by_variable(model)


def test_blocks_of_a_layer_that_holds_a_program_go_by_their_variables():
    inputs = keras.Input((4,))
    inner = [keras.layers.Dense(4, name=f"block_{index}") for index in (1, 2)]
    x = inputs
    for layer in inner:
        x = layer(x)
    holder = HubBackbone(keras.Model(inputs, x, name="inner"), name="holder")
    inputs = keras.Input((4,))
    backbone = keras.Model(inputs, holder(inputs), name="backbone")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(backbone(inputs)))
    assert {path.split("/")[0]: factor for path, factor in factor_by_variable(model).items()} == {
        "block_1": 0.25,
        "block_2": 0.5,
        "head": 1.0,
    }


def test_layers_of_a_nested_model_have_the_factor_of_their_block():
    """Their paths lack its name; one of them is called as a layer behind it."""
    x = entry = keras.Input((4,))
    for name in ("inner", "middle"):
        x = keras.layers.Dense(4, name=name)(x)
    nested = keras.Model(entry, x, name="outer")
    inputs = keras.Input((4,))
    wide = keras.Sequential([keras.layers.Dense(16, name="middle")], name="second")
    model = keras.Model(inputs, keras.layers.Dense(16, name="last")(wide(nested(inputs))))
    factors = {path: factor for path, factor in factor_by_variable(model).items() if path.endswith("kernel")}
    assert factors == {"inner/kernel": 0.25, "middle/kernel": 0.25, "second/middle/kernel": 0.5, "last/kernel": 1.0}


def test_blocks_that_paths_do_not_tell_apart_are_refused():
    def inner():
        entry = keras.Input((4,))
        return entry, keras.layers.Dense(4, name="same")(entry)

    inputs = keras.Input((4,))
    nested = [keras.Model(*inner(), name=name) for name in ("one", "two")]
    model = keras.Model(inputs, keras.layers.Dense(16, name="last")(nested[1](nested[0](inputs))))
    with pytest.raises(InputError, match="same path 'same/kernel'"):
        blockwise_factors(model, 0.5)


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(InputError, match="decay must lie"):
        blockwise_factors(network(), decay)
