"""Trials from shared features against the same training from features of their own."""

import dataclasses

import numpy as np
import pytest
from small_networks import norm_backbone, pictures

from tfxfer.data import load_data
from tfxfer.errors import InputError
from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze
from tfxfer.specs import Plan, Recipe, Stage
from tfxfer.train.loop import SuffixTrainer
from tfxfer.train.training_data import training_data
from tfxfer.tuning.shared import SharedFeatures
from tfxfer.tuning.trials import history_of, run_trial

PROBE = Stage("probe", solver="convex", freeze_depth="all", epochs=0)


def plan_at(depth, *, augment="none", **changes):
    changes = {"learning_rates": (3e-3,), **changes}
    stage = Stage("tune", freeze_depth=depth, epochs=2, min_steps=False, **changes)
    return Plan("small", Recipe("own", (PROBE, stage)), image_size=16, dropout=0.0, batch_size=8, augment=augment)


@pytest.fixture(scope="module")
def data():
    labels = np.arange(60) % 3
    images = pictures(60)
    images[..., 0] = images[..., 0] // 4 + labels[:, None, None].astype(np.uint8) * 60
    dataset = load_data({"train": (images[:40], labels[:40]), "val": (images[40:], labels[40:])}, test_fraction=0.0)
    return training_data(dataset, plan_at(1))


def fresh_model():
    return build_model(norm_backbone(), 3, image_size=16, input_range="-1..1", dropout=0.0)


def shared_of(data):
    return SharedFeatures(fresh_model(), data)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_crosses_deeper_is_the_same_from_pixels_and_from_a_shallower_cut(data, depth):
    shared, direct = shared_of(data), shared_of(data)
    shared.at(0)
    found, expected = shared.at(depth), direct.at(depth)
    rows = np.arange(len(data.labels))
    np.testing.assert_allclose(found.activations[0, rows], expected.activations[0, rows], atol=1e-5)
    np.testing.assert_allclose(found.features[0], expected.features[0], atol=1e-5)
    assert shared.passes.computed == 2 * len(rows) and direct.passes.computed == len(rows)


@pytest.mark.parametrize("augment", ["none", "mirror"])
def test_a_trial_is_the_training_that_shares_nothing(data, augment):
    """The same weights as a trainer on features of its own, from the same head.

    By SGD: Adam's first steps are the signs of gradients, and where one is zero its rounding decides.
    """
    plan, shared = plan_at(2, augment=augment, solver="sgd", learning_rates=(0.02,)), shared_of(data)
    run_trial(fresh_model(), plan_at(1), shared, 1)  # so that the second depth starts from the first
    trial = run_trial(fresh_model(), plan, shared, 1)

    model = fresh_model()
    freeze(model, 2, batch_norm="frozen")
    cut = cut_model(model, 2)
    views = ("plain",) if augment == "none" else ("plain", "mirror")
    extracted = extract(FrozenPrefix(cut), data.parts, views)
    trainer = SuffixTrainer(cut.suffix, extracted, data.labels, data.weights, plan.recipe.stages[-1], 8)
    head = shared.probe(views, "convex").head(data.rows)
    trainer.start = [*trainer.start[:-2], head.kernel, head.bias]
    expected = trainer.run(data.rows, 0.02, held=data.held, seed=plan.seed)
    for ours, theirs in zip(trial.weights, expected.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    np.testing.assert_allclose(trial.held_probabilities, np.exp(expected.held_log_probabilities), atol=2e-4)
    assert trial.freeze_depth == 2 and len(trial.history) == 2


def test_frozen_blocks_stay_bit_identical(data):
    model = fresh_model()
    before = [weight.numpy() for weight in model.weights]
    run_trial(model, plan_at(2), shared_of(data), 1)
    changed = {w.path.split("/")[-2] for w, old in zip(model.weights, before, strict=True) if np.any(w.numpy() != old)}
    assert changed == {"c_conv", "logits"}


def test_what_was_computed_and_what_it_saved_is_counted(data):
    shared = shared_of(data)
    first, second = (run_trial(fresh_model(), plan_at(2), shared, 1) for _ in range(2))
    images = len(data.labels)
    assert (first.passes.computed, second.passes.computed) == (images, 0)
    assert first.passes.wanted == second.passes.wanted == 2 * images
    assert second.passes.seconds == 0 and second.passes.wanted_seconds > 0
    assert second.passes.saved_seconds == second.passes.wanted_seconds


def test_going_on_from_an_epoch_keeps_the_weights_and_the_number_of_epochs(data):
    """At a rate of almost nothing the weights stay; a trial from the start takes the probe's head instead."""
    model, shared, still = fresh_model(), shared_of(data), plan_at(2, learning_rates=(1e-9,))
    run_trial(model, plan_at(2), shared, 1, epochs=2)
    head = model.get_layer("logits").get_weights()[0]
    second = run_trial(model, still, shared, 1, epochs=5, initial_epoch=2)
    assert [epoch["epoch"] for epoch in second.history] == [2, 3, 4]
    np.testing.assert_allclose(model.get_layer("logits").get_weights()[0], head, atol=1e-6)
    run_trial(model, still, shared, 1, epochs=2)
    assert np.abs(model.get_layer("logits").get_weights()[0] - head).max() > 1e-3


def test_of_several_stages_the_last_has_the_epochs_and_the_first_come_before_it(data):
    plan = plan_at(2)
    before = dataclasses.replace(plan.recipe.stages[-1], name="head", freeze_depth=3)
    several = dataclasses.replace(plan, recipe=Recipe("two", (PROBE, before, plan.recipe.stages[-1])))
    shared = shared_of(data)
    trial = run_trial(fresh_model(), several, shared, 1, epochs=4)
    assert len(trial.history) == 4 and trial.passes.wanted == 6 * len(data.labels)


def test_the_history_has_every_number_of_the_validation_part(data):
    trial = run_trial(fresh_model(), plan_at(2), shared_of(data), 1)
    history = history_of(trial.history)
    assert history.epoch == [0, 1]
    names = {"val_loss", "val_accuracy", "val_macro_f1", "val_balanced_accuracy", "val_log_loss"}
    assert names < set(history.history)
    predicted = trial.held_probabilities.argmax(1)
    best = int(np.argmin(history.history["val_loss"]))
    assert history.history["val_accuracy"][best] == pytest.approx(np.mean(predicted == data.labels[data.held]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rates": (1e-3, 1e-4)}, "must have one learning rate"),
        ({"find_rate": True}, "must have one learning rate"),
        ({"batch_norm": "adapt"}, "batch_norm 'adapt'"),
        ({"regularizer": "lwf"}, "no regularizer 'lwf'"),
    ],
)
def test_a_plan_that_leaves_something_open_is_no_trial(data, change, told):
    plan = plan_at(2)
    stage = dataclasses.replace(plan.recipe.stages[-1], **change)
    with pytest.raises(InputError, match=told):
        run_trial(
            fresh_model(), dataclasses.replace(plan, recipe=Recipe("own", (PROBE, stage))), shared_of(data), 1
        )  # fmt: skip


def test_a_plan_without_training_or_with_other_augmentation_is_none_either(data):
    plan = plan_at(2)
    with pytest.raises(InputError, match="only solves a head"):
        run_trial(fresh_model(), dataclasses.replace(plan, recipe=Recipe("own", (PROBE,))), shared_of(data), 1)
    with pytest.raises(InputError, match="augment 'none' or 'mirror'"):
        run_trial(fresh_model(), dataclasses.replace(plan, augment="rand"), shared_of(data), 1)
