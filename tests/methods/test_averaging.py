import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfxfer.errors import InputError
from tfxfer.methods.averaging import WeightAverage, kept_share, start_average, update_average


def walk(steps: int, shape=(3, 2), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (steps, *shape))


def averaged(values: np.ndarray, start: np.ndarray, decay: float) -> np.ndarray:
    """The average in double precision, by its definition."""
    average = start
    for step, value in enumerate(values):
        kept = min(decay, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * value
    return average


def test_the_first_steps_by_hand():
    """v <- d v + (1 - d) w with d = min(decay, (1 + t) / (10 + t)): 1/10, 2/11, 3/12, then decay = 0.25."""
    average = start_average([np.array([4.0])])
    average = update_average(average, [np.array([14.0])], 0, 0.25)
    assert float(average[0][0]) == pytest.approx(0.1 * 4 + 0.9 * 14)  # 13
    average = update_average(average, [np.array([2.0])], 1, 0.25)
    assert float(average[0][0]) == pytest.approx(2 / 11 * 13 + 9 / 11 * 2)  # 4
    average = update_average(average, [np.array([8.0])], 2, 0.25)
    assert float(average[0][0]) == pytest.approx(7)
    average = update_average(average, [np.array([7.0])], 3, 0.25)
    assert float(average[0][0]) == pytest.approx(7)
    average = update_average(average, [np.array([3.0])], 1000, 0.25)
    assert float(average[0][0]) == pytest.approx(4)


def test_the_warm_up_ends_where_decay_begins():
    assert float(kept_share(8990, 0.999)) == pytest.approx(8991 / 9000)  # (1 + t) / (10 + t) = 0.999 at t = 8990
    assert float(kept_share(10**6, 0.999)) == pytest.approx(0.999)
    assert float(kept_share(89, 0.999)) == pytest.approx(90 / 99)


def test_a_uniform_average_is_the_mean_of_what_was_given():
    """Izmailov et al., algorithm 1: w <- (w n + w_i) / (n + 1), n = 0 at first."""
    values = walk(30)
    average = start_average([np.full((3, 2), 1e6)])
    for step, value in enumerate(values):
        average = update_average(average, [value], step, uniform=True)
    np.testing.assert_allclose(average[0], values.mean(0), atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("traced", [False, True])
def test_the_class_averages_variables_step_by_step_eagerly_and_traced(decay, traced):
    values = walk(20)
    weight = keras.Variable(values[0], dtype="float32", name="kernel")
    average = WeightAverage([weight], decay)
    traces = []

    def step_on(step):
        traces.append(step)
        average.update(step)

    run = tf.function(step_on) if traced else step_on
    for step, value in enumerate(values[1:]):
        weight.assign(value)
        run(tf.constant(step, tf.int64))
    np.testing.assert_allclose(average.state()[0], averaged(values[1:], values[0], decay), rtol=1e-5, atol=1e-6)
    assert len(traces) == (1 if traced else 19)


@pytest.mark.parametrize("uniform", [False, True])
def test_one_graph_for_all_steps_has_the_bits_of_the_formula_op_by_op(uniform):
    random = np.random.default_rng(0)
    kinds = ((3, "float32"), (1001, "float32"), (70, "float16"), (70, "bfloat16"), (9, "float64"), (2, "int64"))
    weights = [keras.Variable(np.ones(size), dtype=dtype) for size, dtype in kinds]
    average, expected = WeightAverage(weights, 0.3, uniform=uniform), start_average(weights)
    for step in range(30):
        for weight in weights:
            weight.assign(keras.ops.cast(random.normal(0, 3, weight.shape), weight.dtype))
        average.update(step if step % 2 else tf.constant(step))
        expected = update_average(expected, weights, step, 0.3, uniform=uniform)
        for found, value in zip(average.state(), expected, strict=True):
            assert found.tobytes() == value.numpy().tobytes(), (step, value.dtype)
    assert average._graph.experimental_get_tracing_count() == 1


def test_small_steps_do_not_drown_in_half_precision():
    """With decay 0.999 a float16 average of 1 could not take in 1.001: the step is below its rounding."""
    weight = keras.Variable(np.full(2, 1.001), dtype="float16")
    held = float(weight.numpy()[0])
    average = WeightAverage([weight], 0.999)
    average.restore([np.ones(2, np.float32)])
    for step in range(20000, 20500):
        average.update(step)
    assert average.state()[0].dtype == np.float32
    assert average.state()[0][0] == pytest.approx(1 + (held - 1) * (1 - 0.999**500), abs=1e-5)


def test_counters_and_seeds_are_copied_and_weights_that_stand_still_are_kept_bit_for_bit():
    kernel = keras.Variable(walk(1)[0], dtype="float32")
    counter = keras.Variable(np.array(3), dtype="int64", trainable=False)
    flag = keras.Variable(np.array(False), dtype="bool", trainable=False)
    seeds = keras.random.SeedGenerator(7)
    average = WeightAverage([kernel, counter, flag, seeds.state], 0.9)
    counter.assign(11)
    flag.assign(True)
    seeds.next()
    for step in range(5):
        average.update(step)
    found = average.state()
    assert found[0].tobytes() == kernel.numpy().tobytes()
    assert found[1] == 11 and bool(found[2]) is True
    np.testing.assert_array_equal(found[3], seeds.state.numpy())
    assert [value.dtype for value in found] == [v.numpy().dtype for v in average.variables]


def test_a_run_goes_on_from_its_state_bit_for_bit():
    values = walk(12)
    weight, other = (keras.Variable(values[0], dtype="float32") for _ in range(2))
    whole = WeightAverage([weight], 0.5)
    for step, value in enumerate(values):
        weight.assign(value)
        whole.update(step)
        if step == 5:
            state = whole.state()
    resumed = WeightAverage([other], 0.5)
    resumed.restore(state)
    for step in range(6, 12):
        other.assign(values[step])
        resumed.update(step)
    assert resumed.state()[0].tobytes() == whole.state()[0].tobytes()
    assert state[0].tobytes() != whole.state()[0].tobytes()  # a copy, not a view


def test_a_state_of_another_model_is_refused():
    average = WeightAverage([keras.Variable(np.ones(3)), keras.Variable(np.ones((2, 2)))])
    for state in ([np.ones(3)], [np.ones(3), np.ones(4)], [np.ones((2, 2)), np.ones(3)]):
        with pytest.raises(InputError, match="another model"):
            average.restore(state)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(InputError, match="decay"):
        WeightAverage([], decay)


def test_the_averages_go_into_the_variables_in_their_dtypes():
    weights = [
        keras.Variable(np.ones(2), dtype=dtype) for dtype in ("float32", "float16", "bfloat16", "float64", "int32")
    ]
    average = WeightAverage(weights, uniform=True)
    for step, value in enumerate((1.0, 2.0, 6.0)):
        for weight in weights:
            weight.assign(np.full(2, value))
        average.update(step)
    average.copy_to_variables()
    for weight in weights:
        expected = 6 if weight.dtype == "int32" else 3  # whole numbers are copied
        np.testing.assert_array_equal(keras.ops.cast(weight, "float32"), [expected, expected])
    assert [variable.dtype for variable in average.averages] == ["float32", "float32", "float32", "float64", "int32"]


def test_it_follows_a_traced_training_step():
    """With BatchNorm's statistics and dropout's seed among the variables."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    layers = [keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    floats = [index for index, variable in enumerate(model.variables) if variable.dtype == "float32"]
    assert 0 < len(floats) < len(model.variables)
    average = WeightAverage(model.variables, 0.3)
    expected = [v.numpy().astype(np.float64) for v in model.variables]
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step_on(step):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(model(x, training=True) ** 3)
        optimizer.apply(tape.gradient(loss, [v.value for v in model.trainable_variables]))
        average.update(step)

    for step in range(6):
        step_on(tf.constant(step))
        kept = min(0.3, (1 + step) / (10 + step))
        for index, variable in enumerate(model.variables):
            new = variable.numpy()
            expected[index] = kept * expected[index] + (1 - kept) * new if index in floats else new
    for found, value in zip(average.state(), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


MIRRORED = """
import sys
import keras, numpy as np, tensorflow as tf
from tfxfer.methods.averaging import WeightAverage
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, "tests/methods")
from test_averaging import averaged, walk
strategy, values = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), walk(6)
for where in ("in replicas", "in a condition", "across"):
    with strategy.scope():
        weight = keras.Variable(values[0], dtype="float32", aggregation="mean")
        counter = keras.Variable(0, dtype="int64", trainable=False, aggregation="only_first_replica")
        average = WeightAverage([weight, counter], 0.5)
    def replica_step(step, value):
        weight.assign(value)
        counter.assign_add(1)
        if where == "in replicas":
            average.update(step)
        elif where == "in a condition":
            tf.cond(step >= 0, lambda: average.update(step), lambda: None)
    @tf.function
    def step_on(step, value):
        strategy.run(replica_step, (step, value))
        if where == "across":
            average.update(step)
    for step, value in enumerate(values[1:]):
        step_on(tf.constant(step), tf.constant(value, tf.float32))
    state = average.state()
    kept = [copy.numpy() for copy in average.averages[0].value.values]
    average.restore(state)
    average.copy_to_variables()
    apart = np.abs(state[0] - averaged(values[1:], values[0], 0.5)).max()
    restored = all(np.array_equal(copy.numpy(), state[0]) for copy in weight.value.values)
    print(len(kept), np.array_equal(*kept), int(state[1]), apart, restored)
"""


def test_it_follows_the_variables_of_two_replicas():
    """Updated in each replica, there under a condition, and outside; logical devices need a process of their own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MIRRORED], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines()[-3:]:
        replicas, alike, counter, apart, restored = line.split()
        assert (replicas, alike, counter, restored) == ("2", "True", "5", "True") and float(apart) < 1e-6, done.stdout
