"""The table of recipe `auto`, and that a run does what it says."""

import dataclasses
import itertools

import numpy as np
import pytest
from small_networks import SIZE_PX, norm_model

from tfxfer.specs import Plan
from tfxfer.train.auto import FAR_SHARE, TABLE, asked_of, shift_of, size_of, told, tuning_stage
from tfxfer.train.journal import Journal
from tfxfer.train.outcome import TrainingData
from tfxfer.train.recipes import get_recipe
from tfxfer.train.stages import run_stages

AUTO = get_recipe("auto")


def test_every_size_and_shift_has_a_rule():
    assert set(TABLE) == set(itertools.product(("few", "some", "many"), ("near", "far")))


@pytest.mark.parametrize(("count", "size"), [(10, "few"), (11, "some"), (100, "some"), (101, "many")])
def test_sizes_go_by_the_median_class(count, size):
    assert size_of(np.repeat([0, 1, 2], [3, count, 5000])) == (size, count)


def test_far_is_where_several_blocks_explain_that_much_more_of_the_entropy():
    labels, weights = np.repeat([0, 1], [30, 10]), np.ones(40)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    for factor, shift in ((0.9, "near"), (1.1, "far")):
        found = {"log_loss_last": 0.2, "gain": factor * FAR_SHARE * (entropy - 0.2), "standard_error": 0.01}
        facts = shift_of(found, labels, weights)
        assert facts["shift"] == shift and facts["share"] == pytest.approx(factor * FAR_SHARE)
        assert facts["standard_error"] == pytest.approx(0.01 / (entropy - 0.2))
    assert shift_of({"log_loss_last": 0.7, "gain": 0.0, "standard_error": 0.1}, labels, weights)["shift"] == "far"
    # Weights that make the classes equal: the entropy is that of a coin.
    even = shift_of({"log_loss_last": 0.2, "gain": 0.0, "standard_error": 0.1}, labels, np.where(labels, 2.0, 2 / 3))
    assert even["explained"] == pytest.approx(np.log(2) - 0.2)


def test_what_is_asked_for_wins_over_the_table():
    probe, stage = AUTO.stages
    assert asked_of(AUTO.stages, AUTO.stages) == {}
    mine = dataclasses.replace(stage, epochs=3, batch_norm="frozen")
    asked = asked_of((probe, mine), AUTO.stages)
    assert asked == {"epochs": 3, "batch_norm": "frozen"}
    far = tuning_stage(TABLE["some", "far"], asked, mine, wanted=False)
    assert (far.epochs, far.batch_norm, far.freeze_depth, far.layer_decay) == (3, "frozen", 0, 0.8)
    few = TABLE["few", "near"]
    assert tuning_stage(few, {}, stage, wanted=False) is None
    assert tuning_stage(few, {}, stage, wanted=True) == stage
    assert tuning_stage(few, asked, mine, wanted=False) == mine


def test_the_rule_is_told_in_one_line():
    facts = {"labels_a_class": 65.0, "size": "some", "shift": "near", "why": "measured"}
    sentence = told(facts | {"share": 0.0333, "standard_error": 0.006, "explained": 1.5}, TABLE["some", "near"], {})
    assert sentence == (
        "auto: 65 labels a class (some), near (several blocks explain +3.3% more, standard error 0.6%): "
        "a probe, the last blocks tuned from it, blended"
    )


def digits_of(digits, each: int) -> TrainingData:
    images, labels = digits
    rows = np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(4)])
    rows = np.random.default_rng(0).permutation(rows)
    held = len(rows) // 4
    pixels = images[rows][:, ::2, ::2]
    return TrainingData(
        parts=(pixels[held:], pixels[:held]), labels=labels[rows[[*range(held, len(rows)), *range(held)]]],
        weights=np.ones(len(rows)), groups=tuple(map(str, range(len(rows)))), rows=np.arange(len(rows) - held),
        held=np.arange(len(rows) - held, len(rows)), num_classes=4, may_pool=True,
    )  # fmt: skip


def run(data, recipe=AUTO, journal=None, **plan):
    plan = Plan("small", recipe, batch_size=32, augment="none", image_size=SIZE_PX, **plan)
    return run_stages(norm_model(4), plan, recipe.stages, data, auto_depth=1, journal=journal)


def test_few_labels_end_with_a_probe_and_a_resumed_run_reads_the_rule_back(digits, tmp_path):
    data = digits_of(digits, 10)
    outcome = run(data, journal=Journal(tmp_path))
    found = outcome.selection["auto"]
    assert (found["size"], found["labels_a_class"]) == ("few", 10.0) and not outcome.history
    assert found["shift"] == ("far" if found["share"] > FAR_SHARE else "near")
    assert outcome.selection["features"]["used"] == "multi" or found["shift"] == "near"
    again = Journal(tmp_path)
    resumed = run(data, journal=again)
    assert "rule of auto" in again.resumed and resumed.selection == outcome.selection
    for ours, theirs in zip(outcome.model.get_weights(), resumed.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_of_several_solvers_the_one_with_the_least_held_out_loss(digits, monkeypatch):
    monkeypatch.setitem(TABLE, ("few", "far"), TABLE["few", "near"])
    data = digits_of(digits, 10)
    losses = {}
    for solver in TABLE["few", "near"].probes:
        probe = dataclasses.replace(AUTO.stages[0], solver=solver)
        recipe = dataclasses.replace(AUTO, stages=(probe,), by_table=False)
        losses[solver] = run(data, recipe, features="last").selection["probe"]["log_loss"]
    assert run(data, features="last").selection["probe"]["solver"] == min(losses, key=losses.get)


def test_what_is_asked_for_is_tuned_even_with_few_labels(digits):
    stage = dataclasses.replace(AUTO.stages[1], epochs=2, min_steps=False, learning_rates=(1e-8,))
    outcome = run(digits_of(digits, 10), dataclasses.replace(AUTO, stages=(AUTO.stages[0], stage)), features="last")
    assert outcome.selection["auto"]["asked"] == ["epochs", "learning_rates", "min_steps"]
    assert outcome.selection["auto"]["why"] == "not measured" and "fine_tune_against_probe" in outcome.selection
