import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_networks import norm_model, pictures
from stopping import Stop, stop_after_saves
from test_loop import HELD, ROWS, ready
from test_stages import PROBE, STRONG, data, small_digits  # noqa: F401 (fixtures)
from test_step import batch, network

from tfxfer.errors import InputError
from tfxfer.methods.mixed_precision import LossScale
from tfxfer.specs import Plan, Recipe
from tfxfer.train import precision as precision_module
from tfxfer.train import trainers
from tfxfer.train.batches import Batch
from tfxfer.train.distribute import Devices
from tfxfer.train.journal import Journal
from tfxfer.train.precision import Precision, check_precision, choose_precision, judge_precision
from tfxfer.train.stages import run_stages
from tfxfer.train.step import TrainingStep


def dtypes_of(step) -> set[str]:
    graph = step._run.get_concrete_function().graph
    return {op.outputs[0].dtype.name for op in graph.get_operations() if op.type in ("MatMul", "Conv2D")}


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_a_step_computes_in_16_bits_and_keeps_weights_in_float32(precision, tolerance):
    plain, mixed = network("l2"), network("l2")
    one = TrainingStep(plain, keras.optimizers.SGD(0.5))
    other = TrainingStep(mixed, keras.optimizers.SGD(0.5), precision=precision)
    for rows in (slice(None), slice(3, 10)):
        expected, found = one(batch(rows)), other(batch(rows))
        np.testing.assert_allclose(found.sums, expected.sums, rtol=tolerance)
        assert found.finite and found.sums[0] != expected.sums[0]
    for a, b, start in zip(mixed.get_weights(), plain.get_weights(), network().get_weights(), strict=True):
        assert a.dtype == np.float32
        assert np.abs(a - b).max() < 0.1 * np.abs(b - start).max()  # the same way, nearly
    # The output layer stays float32, and nothing of it is left in the model.
    assert dtypes_of(other) == {precision, "float32"} and dtypes_of(one) == {"float32"}
    assert {layer.compute_dtype for layer in mixed.layers} == {"float32"}


def test_float16_gradients_that_overflow_cost_a_step_and_halve_the_scale():
    net = network()
    step = TrainingStep(net, keras.optimizers.SGD(0.1), clip_norm=None, precision="float16")
    step.loss_scale.value.assign(2.0**24)  # times gradients of this size: more than 65504
    weights = net.get_weights()
    large = Batch(batch().rows, batch().activations, batch().targets, batch().weights * 4)
    result = step(large)
    assert result.finite and np.isfinite(result.sums).all()  # nothing is wrong with the images
    assert all(np.array_equal(a, b) for a, b in zip(weights, net.get_weights(), strict=True))
    assert step.loss_scale.value.numpy() == 2.0**23
    for _ in range(12):
        step(large)
    assert any(not np.array_equal(a, b) for a, b in zip(weights, net.get_weights(), strict=True))
    assert all(np.isfinite(value).all() for value in net.get_weights())
    broken = Batch(batch().rows, batch().activations * np.float32(np.nan), batch().targets, batch().weights)
    assert not step(broken).finite


def test_small_gradients_survive_float16_by_the_scale():
    """A gradient of 1e-8 is zero in float16; times 2^15 it is none."""

    def moved(scale):
        net = network()
        step = TrainingStep(net, keras.optimizers.SGD(1e6), clip_norm=None, precision="float16")
        step.loss_scale.value.assign(scale)
        start = net.get_weights()
        step(Batch(batch().rows, batch().activations, batch().targets, batch().weights * np.float32(1e-6)))
        return np.abs(net.get_weights()[0] - start[0])

    plain = network()
    TrainingStep(plain, keras.optimizers.SGD(1e6), clip_norm=None)(
        Batch(batch().rows, batch().activations, batch().targets, batch().weights * np.float32(1e-6))
    )
    expected = np.abs(plain.get_weights()[0] - network().get_weights()[0])
    np.testing.assert_allclose(moved(2.0**15), expected, rtol=0.05, atol=1e-3 * expected.max())
    assert np.abs(moved(1.0) - expected).max() > 0.05 * expected.max()


def test_the_scale_doubles_after_long_enough_and_not_above_its_bound():
    scale = LossScale()
    for _ in range(LossScale.GROW_AFTER):
        scale.update(tf.constant(True))
    assert (scale.value.numpy(), scale.good_steps.numpy()) == (2 * LossScale.START, 0)
    scale.value.assign(LossScale.MOST)
    scale.good_steps.assign(LossScale.GROW_AFTER - 1)
    scale.update(tf.constant(True))
    assert scale.value.numpy() == LossScale.MOST
    scale.value.assign(1.0)
    scale.update(tf.constant(False))
    assert scale.value.numpy() == 1.0


@pytest.mark.parametrize("precision", [pytest.param("bfloat16", marks=pytest.mark.slow), "float16"])
def test_a_run_is_repeated_and_resumed_to_the_bit(tmp_path, precision):
    from tfxfer.train.loop import Trained

    def trainer():
        return ready(dropout=0.3, devices=Devices(precision=precision))[1]

    whole = trainer().run(ROWS, 3e-3, seed=7, held=HELD)
    plain = ready(dropout=0.3)[1].run(ROWS, 3e-3, seed=7, held=HELD)
    gaps = [np.abs(a - b).max() for a, b in zip(whole.weights, plain.weights, strict=True)]
    assert 0 < max(gaps) < 0.05

    def stopping(unit):
        stop_after_saves(unit, 3)
        return trainer().run(ROWS, 3e-3, seed=7, held=HELD, unit=unit).state()

    with pytest.raises(Stop):
        Journal(tmp_path, every_seconds=0.0).run("tune", stopping)
    again = trainer()
    if precision == "float16":
        again.step.loss_scale.value.assign(2.0)
    found = Journal(tmp_path).run("tune", lambda unit: again.run(ROWS, 3e-3, seed=7, held=HELD, unit=unit).state())
    found = Trained.of_state(*found)
    assert all(np.array_equal(a, b) for a, b in zip(whole.weights, found.weights, strict=True))


def test_what_is_measured_decides(monkeypatch):
    losses = np.array([2.0, 1.0])
    times = {"float32": 1.0, "bfloat16": 0.8}
    assert judge_precision("bfloat16", times, losses, losses * 1.01).used == "bfloat16"
    far = judge_precision("bfloat16", times, losses, losses * 1.05)
    assert far.used == "float32" and far.why == "the losses in bfloat16 differ by 5.0%, more than 2%"
    assert judge_precision("bfloat16", times, losses, losses * np.nan).used == "float32"
    slow = judge_precision("bfloat16", {"float32": 1.0, "bfloat16": 0.92}, losses, losses)
    assert slow.used == "float32" and slow.seconds_a_step == {"float32": 1.0, "bfloat16": 0.92}

    model, trainer = ready()
    before = [value.copy() for value in trainer.start]
    made = []

    def other(precision):
        made.append(precision)
        return ready(devices=Devices(precision=precision))[1]

    monkeypatch.setattr(precision_module, "reduced_precision", lambda: None)
    assert choose_precision(model, trainer, other, ROWS, 10**9, seed=0).why.endswith("no units for 16-bit types")
    monkeypatch.setattr(precision_module, "reduced_precision", lambda: "bfloat16")
    short = choose_precision(model, trainer, other, ROWS, 1, seed=0)
    assert short.used == "float32" and "too short" in short.why and made == []
    found = choose_precision(model, trainer, other, ROWS, 10**9, seed=0)
    assert made == ["bfloat16"] and 0 < found.loss_difference < 0.02 and set(found.seconds_a_step) == {"float32", *made}
    for value, start in zip(trainer.suffix.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, start)  # measuring moves nothing


def test_a_run_says_what_was_decided_and_is_float32_outside(data, tmp_path, monkeypatch):  # noqa: F811
    stage = dataclasses.replace(STRONG, epochs=2)

    def outcome_of(precision, journal=None):
        plan = Plan("small", Recipe("own", (PROBE, stage)), augment="none",
                    features="last", image_size=16, precision=precision)  # fmt: skip
        model = norm_model(4)
        return model, run_stages(model, plan, plan.recipe.stages, data, auto_depth=1, journal=journal)

    model, outcome = outcome_of("bfloat16")
    assert outcome.selection["precision"] == {"used": "bfloat16", "why": "asked for"}
    assert {variable.dtype for variable in model.weights} == {"float32"}
    images = pictures(3).astype("float32")
    copy = norm_model(4)
    copy.set_weights(model.get_weights())
    np.testing.assert_array_equal(model.predict(images, verbose=0), copy.predict(images, verbose=0))

    asked = []
    decide = trainers.choose_precision
    monkeypatch.setattr(precision_module, "reduced_precision", lambda: "bfloat16")
    monkeypatch.setattr(trainers, "choose_precision", lambda *args, **kw: asked.append(1) or decide(*args, **kw))
    for _ in range(2):
        _, outcome = outcome_of("auto", Journal(tmp_path))
        assert outcome.selection["precision"]["used"] == "float32"
        assert "too short to measure" in outcome.selection["precision"]["why"]
    assert asked == [1]  # a resumed run takes what was measured then


def test_where_16_bits_lose_training_is_as_if_they_had_not_been_tried(data, monkeypatch):  # noqa: F811
    """Two trainers of one suffix: the rates must reach the optimizer of the one that trains."""
    stage = dataclasses.replace(STRONG, epochs=1, learning_rates=(1e-2, 1e-5))

    def outcome_of(precision):
        plan = Plan("small", Recipe("own", (PROBE, stage)), augment="none", features="last", image_size=16,
                    precision=precision)  # fmt: skip
        model = norm_model(4)
        return run_stages(model, plan, plan.recipe.stages, data, auto_depth=1)

    def slower(model, trainer, other, *args, **options):
        other("bfloat16").try_rates(ROWS, np.zeros(2), seed=0, goes_on=lambda loss: True)
        return Precision("float32", "slower")

    expected = outcome_of("float32")
    monkeypatch.setattr(trainers, "choose_precision", slower)
    found = outcome_of("auto")
    assert found.selection["precision"]["why"] == "slower"
    assert found.selection["tune"]["rates"] == expected.selection["tune"]["rates"]
    assert found.history == expected.history


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="float16 is for GPUs, and TensorFlow finds none here"):
        check_precision("float16", norm_model())
    with pytest.raises(InputError, match="Precision must be one of auto, float32, bfloat16, float16, not 'half'"):
        Plan("small", Recipe("own", (PROBE,)), precision="half")
