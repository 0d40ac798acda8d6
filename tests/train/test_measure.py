import dataclasses
import time

import numpy as np
import pytest
from small_networks import norm_model, pictures

from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.model.freeze import freeze
from tfxfer.specs import Stage
from tfxfer.train.budget import LEFT_OUT, Work
from tfxfer.train.clock import Clock
from tfxfer.train.loop import SuffixTrainer
from tfxfer.train.measure import measure_pace, measured_plan

IMAGES, LABELS = pictures(40), np.arange(40) % 3
ROWS, HELD = np.arange(28), np.arange(28, 40)
STAGE = Stage("tune", epochs=2, learning_rates=(3e-3,), batch_norm="train", average=0.5)
WORK = Work(epochs=2, num_rates=1, folds=((28, 12),), num_all=40, batch_size=8)


def trainer_of(stage=STAGE):
    model = freeze(norm_model(dropout=0.3), 1, batch_norm=stage.batch_norm)
    extracted = extract(FrozenPrefix(cut_model(model, 1), 8), (IMAGES,))
    suffix = cut_model(model, 1).suffix
    return SuffixTrainer(suffix, extracted, LABELS, np.ones(40), stage, 8)


def variables(trainer):
    averages = trainer.average.averages if trainer.average else ()
    return [np.array(v) for v in (*trainer.suffix.variables, *trainer.suffix.optimizer.variables, *averages)]


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_measuring_leaves_everything_as_it_was(average):
    trainer = trainer_of(dataclasses.replace(STAGE, average=average))
    before = variables(trainer)
    pace = measure_pace(trainer, ROWS, HELD)
    for old, new in zip(before, variables(trainer), strict=True):
        np.testing.assert_array_equal(old, new)
    assert pace.step_seconds > 0 and pace.held_seconds > 0 and pace.compile_seconds > 0


def test_a_run_after_measuring_is_the_run_without():
    measured, plain = trainer_of(), trainer_of()
    measure_pace(measured, ROWS, HELD, seed=3)
    found, expected = (trainer.run(ROWS, 3e-3, held=HELD, seed=1) for trainer in (measured, plain))
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


class Slow:
    """The real step and a known time beside it; the first takes longer, as where it is compiled."""

    def __init__(self, step):
        self.step, self.calls = step, 0
        self.variables = step.variables

    def push(self):
        self.step.push()

    def __call__(self, batch):
        self.calls += 1
        time.sleep(0.5 if self.calls == 1 else 0.1)
        assert len(batch.rows) == 8  # a rest of four images would be quicker
        return self.step(batch)


def test_the_pace_is_that_of_whole_batches_behind_the_first():
    trainer = trainer_of()
    trainer.step = Slow(trainer.step)
    pace = measure_pace(trainer, ROWS, HELD)
    assert trainer.step.calls == 4
    assert pace.step_seconds >= 0.1 and pace.compile_seconds >= 0.4 - (pace.step_seconds - 0.1)


def test_fewer_images_than_a_batch_are_measured_too():
    assert measure_pace(trainer_of(), ROWS[:5], HELD[:3]).step_seconds > 0


def test_a_plan_says_what_it_does_and_what_all_would_take():
    clock = Clock(1e6)
    facts = measured_plan(trainer_of(), [WORK], [(ROWS, HELD)], clock)
    assert facts["does"] == "1 rate, 2 epochs, 1 fold" and facts["told"].startswith(facts["does"])
    pace, plan = facts["pace"], facts["plan"]
    by_hand = 2 * (4 * pace["step_seconds"] + 12 * pace["held_seconds"]) + 12 * pace["held_seconds"]
    refit = 2 * 5 * pace["step_seconds"]
    assert (plan["seconds"], plan["refit_seconds"]) == pytest.approx((by_hand, refit))
    assert facts["whole_seconds"] == pytest.approx(by_hand + refit)
    kept = clock.kept_back["choosing"]
    assert kept == pytest.approx(0.5 + 5 * 12 * pace["held_seconds"])


def test_where_no_epoch_fits_the_stage_is_left_out():
    trainer = trainer_of()
    trainer.step = Slow(trainer.step)  # an epoch of four steps takes 0.4 s at least; 0.5 s are kept back for choosing
    facts = measured_plan(trainer, [WORK], [(ROWS, HELD)], Clock(0.9, now=lambda: 0.0))
    assert facts["plan"] == dataclasses.asdict(LEFT_OUT) and "not one epoch fits" in facts["told"]


def test_where_compiling_would_pass_the_limit_nothing_is_measured():
    trainer = trainer_of()
    trainer.step = None
    facts = measured_plan(trainer, [WORK], [(ROWS, HELD)], Clock(60), later_seconds=57.0, compile_seconds=4.0)
    assert facts["plan"] == dataclasses.asdict(LEFT_OUT)
    assert facts["told"].endswith("s are left, too few to measure a step")
