"""Stages under a time limit, on a clock that goes on by hand: a second a batch, or more."""

import dataclasses

import keras
import numpy as np
import pytest
from PIL import Image
from small_networks import SIZE_PX, norm_model

from tfxfer.methods.schedule import warmup_cosine
from tfxfer.specs import Plan, Recipe, Stage
from tfxfer.train import measure, precision, trainers
from tfxfer.train.budget import Pace
from tfxfer.train.clock import Clock
from tfxfer.train.outcome import TrainingData
from tfxfer.train.stages import run_stages

PROBE = Stage("probe", solver="convex", freeze_depth="all", epochs=0)
# Two steps an epoch, and four of the refit: 12 s a rate, then 8 s; 0.5 s are kept back for choosing.
TUNE = Stage(
    "tune", freeze_depth=1, epochs=6, learning_rates=(3e-2, 1e-2, 3e-3), weight_decay=0.0, min_steps=False, patience=0
)  # fmt: skip


class ByHand(Clock):
    """A clock that goes on only where it is told."""

    def __init__(self, seconds: float):
        self.at = 0.0
        super().__init__(seconds, now=lambda: self.at)


class Ticks(keras.callbacks.Callback):
    """Seconds of the clock a batch; learning rates as they are seen."""

    def __init__(self, clock: ByHand, seconds: float = 1.0):
        super().__init__()
        self.clock, self.seconds, self.rates = clock, seconds, []

    def on_train_batch_begin(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))
        self.clock.at += self.seconds


@pytest.fixture(autouse=True)
def a_second_a_step(monkeypatch):
    monkeypatch.setattr(measure, "measure_pace", lambda *arguments, **options: Pace(1.0, 0.0))


@pytest.fixture(scope="module")
def small_digits(digits):
    images, labels = digits
    kept = np.random.default_rng(0).permutation(np.flatnonzero(labels < 4))[:128]
    small = [np.asarray(Image.fromarray(image).resize((SIZE_PX, SIZE_PX))) for image in images[kept]]
    return np.stack(small), labels[kept]


def run(small_digits, clock, *stages, seconds=1.0, may_pool=False, before=lambda outcome: None, **plan):
    images, labels = small_digits
    data = TrainingData(
        parts=(images[:64], images[64:]), labels=labels, weights=np.ones(128), groups=tuple(map(str, range(128))),
        rows=np.arange(64), held=np.arange(64, 128), num_classes=4, may_pool=may_pool,
    )  # fmt: skip
    plan = {"augment": "none", "batch_size": 32, "features": "last", "image_size": SIZE_PX} | plan
    ticks, model = Ticks(clock, seconds), norm_model(4)
    outcome = run_stages(
        model, Plan("small", Recipe("own", stages), **plan), stages, data, auto_depth=1, callbacks=(ticks,),
        clock=clock, before_tuning=before,
    )  # fmt: skip
    if not may_pool and outcome.chosen != "probe" and "refit" in outcome.left_out:
        np.testing.assert_allclose(model.predict(images[64:], verbose=0), outcome.held_probabilities, atol=1e-4)
    return outcome, ticks


def epochs_of(outcome, stage):
    return [entry for entry in outcome.history if entry["stage"] == stage]


@pytest.mark.parametrize(
    ("limit", "does"),
    [
        (49, "3 rates, 6 epochs, 1 fold"),  # 1.1 * (3 * 12 + 8) + 0.5
        (36, "2 rates, 6 epochs, 1 fold"),
        (22.6, "1 rate, 6 epochs, 1 fold"),
        (15, "2 epochs"),  # 1.1 * (2 * 2 + 8) + 0.5
        (8, "3 epochs, 1 fold, no refit"),  # 1.1 * 3 * 2 + 0.5
        (3, "1 epoch, 1 fold, no refit"),
    ],
)
def test_a_stage_does_what_fits_and_ends_in_time(small_digits, limit, does):
    clock = ByHand(limit)
    outcome, ticks = run(small_digits, clock, PROBE, TUNE)
    (plan,) = outcome.selection["time_plan"]
    assert does in plan["does"] and plan["stage"] == "tune" and plan["seconds_left"] == pytest.approx(limit - 0.5)
    assert clock.at <= limit and not clock.stopped
    assert plan["whole_seconds"] == pytest.approx(44) and len(ticks.rates) == clock.at
    planned = plan["plan"]
    tried = [float(rate) for rate in outcome.selection["tune"]["rates"]]
    assert tried == [3e-2, 1e-2, 3e-3][: len(tried)] if planned["num_rates"] > 1 else tried == [1e-2]
    # The schedule is short as a whole: it climbs, and comes down to zero over what is really run.
    steps = 2 * planned["epochs"]
    first = [tried[0] * warmup_cosine(step, steps, 0.2) for step in range(steps)]
    np.testing.assert_allclose(ticks.rates[:steps], first, rtol=1e-5)
    assert ("refit" in " ".join(outcome.left_out)) == (not planned["refit"] and outcome.chosen != "probe")


def test_a_stage_of_which_no_epoch_fits_is_left_out_and_the_probe_stays(small_digits):
    outcome, ticks = run(small_digits, ByHand(2.6), PROBE, TUNE)  # 2 s are an epoch, 2.1 s are left
    assert ticks.rates == [] and outcome.chosen == "probe" and outcome.out_of_time
    assert list(outcome.left_out) == ["tune"] and "not one epoch fits" in outcome.left_out["tune"]


def test_what_is_kept_back_before_tuning_is_not_planned_with(small_digits):
    clock = ByHand(122.6)
    seen = []

    def before(outcome):
        seen.append(outcome.selection["probe"]["solver"])
        clock.keep_back("export", 100)

    outcome, _ = run(small_digits, clock, PROBE, TUNE, before=before)
    assert seen == ["convex"]
    assert outcome.selection["time_plan"][0]["does"] == "1 rate, 6 epochs, 1 fold" and clock.at <= 22.6


def test_steps_that_are_slower_than_they_were_stop_at_a_batch(small_digits):
    clock = ByHand(22.6)
    outcome, ticks = run(small_digits, clock, PROBE, TUNE, seconds=3.0)
    assert outcome.selection["time_plan"][0]["does"] == "1 rate, 6 epochs, 1 fold"
    assert len(ticks.rates) == 7 and clock.at == 21.0  # an eighth batch would end at 24 s
    assert clock.stopped and outcome.out_of_time and len(outcome.history) == 4


def test_a_later_stage_that_does_not_fit_is_left_out_by_name(small_digits):
    clock = ByHand(50)
    second = dataclasses.replace(TUNE, name="more", freeze_depth=0)
    outcome, _ = run(small_digits, clock, PROBE, TUNE, second, seconds=4.0)
    first, later = outcome.selection["time_plan"]
    # The stages are alike, so each has half of the time; the first takes more than its share.
    assert first["does"] == "1 rate, 6 epochs, 1 fold" and later["does"] == "left out"
    assert "more" in outcome.left_out and clock.at <= 50
    assert epochs_of(outcome, "tune") and not epochs_of(outcome, "more")
    assert "fine_tune_against_probe" in outcome.selection  # the first stage is judged, and kept where it is better


def test_a_later_stage_is_planned_anew_with_what_is_left(small_digits):
    second = dataclasses.replace(TUNE, name="more", freeze_depth=0)
    outcome, _ = run(small_digits, ByHand(46), PROBE, TUNE, second)
    first, later = outcome.selection["time_plan"]
    assert first["does"] == "1 rate, 6 epochs, 1 fold"  # half of 45.5 s
    taken = 2 * len([entry for entry in outcome.history if entry["stage"] == "tune"])
    assert later["seconds_left"] == pytest.approx(45.5 - taken)


def test_fewer_folds_are_judged_on_their_own_images(small_digits):
    clock = ByHand(67)
    # A fold is trained on 85 images, three steps: 18 s. The refit takes four steps an epoch: 24 s.
    outcome, _ = run(small_digits, clock, PROBE, TUNE, may_pool=True)  # 1.1 * (2 * 18 + 24) + 0.5
    (plan,) = outcome.selection["time_plan"]
    assert plan["does"] == "1 rate, 6 epochs, 2 folds" and plan["whole_seconds"] == pytest.approx(5 * 18 + 24)
    if outcome.chosen != "probe":
        assert len(outcome.held) == len(outcome.held_probabilities) == pytest.approx(2 / 3 * 128, abs=3)


def test_where_hardly_any_time_is_left_further_passes_over_the_images_are_left_out(small_digits):
    options = {"augment": "auto", "features": "auto"}
    outcome, _ = run(small_digits, ByHand(1e-7), PROBE, TUNE, **options)
    assert list(outcome.left_out) == ["the probe on several blocks", "the mirrored view", "tune"]
    assert outcome.selection["mirror"] == {"used": False} and outcome.chosen == "probe"
    outcome, _ = run(small_digits, ByHand(1e6), PROBE, TUNE, **options)
    assert outcome.left_out == {} and "features" in outcome.selection and "log_loss_rise" in outcome.selection["mirror"]


def test_with_time_for_everything_the_run_is_the_one_without_a_limit(small_digits):
    limited, _ = run(small_digits, ByHand(1e6), PROBE, TUNE)
    free, _ = run(small_digits, ByHand(0), PROBE, TUNE)
    assert "time_plan" not in free.selection and not free.out_of_time and not limited.out_of_time
    assert [entry["learning_rate"] for entry in limited.history] == [entry["learning_rate"] for entry in free.history]
    losses = [[entry["loss"] for entry in outcome.history] for outcome in (limited, free)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize(("limit", "fits"), [(7.4, False), (7.6, True)])
def test_a_deeper_cut_that_takes_more_than_a_fifth_of_the_time_left_is_not_made(small_digits, monkeypatch, limit, fits):
    made, go_deeper = [], trainers.go_deeper
    monkeypatch.setattr(trainers, "go_deeper", lambda *given: made.append(given[2]) or go_deeper(*given))
    first = dataclasses.replace(TUNE, epochs=1, learning_rates=(1e-2,))
    second = dataclasses.replace(first, name="more", freeze_depth=0)

    def before(outcome):  # 128 images in a second, behind half a second of tracing: 1.5 s
        outcome.images_per_second, outcome.graph_seconds = 128.0, 0.5

    outcome, _ = run(small_digits, ByHand(limit), PROBE, first, second, before=before)
    assert (1 in made) == fits == ("deeper" in outcome.cache)
    told = {"tune": "what crosses behind 1 blocks takes about 1.5 s, and 7.4 s are left"}
    assert outcome.cache.get("not_deeper") == (None if fits else told)
    assert epochs_of(outcome, "tune")  # it trains, from the shallow cut


@pytest.mark.parametrize(("limit", "fits"), [(0.05, False), (39.9, False), (40.1, True)])
def test_a_precision_is_measured_in_no_more_than_a_tenth_of_the_time_left(small_digits, monkeypatch, limit, fits):
    measured, timed = [], precision._timed
    monkeypatch.setattr(precision, "_timed", lambda *given: measured.append(1) or timed(*given))
    monkeypatch.setattr(precision, "reduced_precision", lambda: "bfloat16")

    def before(outcome):
        # In two precisions five steps of 32 images, each three passes long, and three graphs: 1 s and 6 times 0.5 s.
        outcome.images_per_second, outcome.graph_seconds = 960.0, 0.5

    outcome, _ = run(small_digits, ByHand(limit), PROBE, TUNE, before=before)
    found = outcome.selection["precision"]
    assert found["used"] == "float32" and bool(measured) == fits
    told = "training takes less than 60 s" if fits else f"{limit:.1f} s are left, too few to measure another"
    assert told in found["why"]
