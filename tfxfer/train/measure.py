"""What a training step and a pass over held-out images take, and what of a stage therefore fits into the time left."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tfxfer.train.batches import Batch, EpochBatches
from tfxfer.train.budget import LEFT_OUT, Pace, Work, plan_stage, priced, shared
from tfxfer.train.clock import Clock
from tfxfer.train.loop import HELD_BATCH, SuffixTrainer

NUM_STEPS = 3
# After the last run: temperatures, the bootstrap, and passes over the held-out images, one for each blend.
CHOOSING_SECONDS, CHOOSING_PASSES = 0.5, 5


def measured_plan(
    trainer: SuffixTrainer,
    works: Sequence[Work],
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    clock: Clock,
    *,
    later_seconds: float = 0.0,
    compile_seconds: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a stage, and plan what of it is done in its share of the time that is left.

    Args:
        trainer: Of the stage.
        works: All of this stage, and of those behind it.
        splits: (rows, held-out rows) of each fold.
        clock: The time limit; what choosing takes at the end is kept back of it.
        later_seconds: Promised to the refit of stages before.
        compile_seconds: What compiling is sure to take: where not even that is left, nothing is measured.
        seed: Of the batches.

    Returns:
        For a journal: `plan` and `pace` as dicts, `told` and `does` in words, `seconds_left`, and `whole_seconds`, what
        all of the stage would take.
    """
    left = clock.remaining() - later_seconds
    if left <= compile_seconds:
        told = f"{max(left, 0.0):.1f} s are left, too few to measure a step"
        nothing = {"plan": dataclasses.asdict(LEFT_OUT), "pace": dataclasses.asdict(Pace(0.0, 0.0))}
        return {"told": told, "does": "left out", "seconds_left": left, **nothing}
    pace = measure_pace(trainer, *splits[0], seed=seed)
    judged = sum(len(held) for _, held in splits)
    clock.keep_back("choosing", CHOOSING_SECONDS + CHOOSING_PASSES * judged * pace.held_seconds)
    left = clock.remaining() - later_seconds
    plan = plan_stage(works[0], pace, shared(left, works, pace)) if left > 0 else LEFT_OUT
    whole = priced(works[0], pace, works[0].epochs, works[0].num_rates, len(splits), True)
    counts = ((plan.num_rates, "rate"), (plan.epochs, "epoch"), (plan.num_folds, "fold"))
    does = ", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
    if plan.left_out:
        does = "left out"
    elif not plan.refit:
        does += ", no refit"
    told = f"{does}, about {plan.seconds + plan.refit_seconds:.1f} s" if plan.epochs else "not one epoch fits"
    return {
        "told": f"{told}; {max(left, 0.0):.1f} s are left at {pace.step_seconds:.3f} s a step", "does": does,
        "seconds_left": left, "whole_seconds": whole.seconds + whole.refit_seconds,
        "plan": dataclasses.asdict(plan), "pace": dataclasses.asdict(pace),
    }  # fmt: skip


def measure_pace(trainer: SuffixTrainer, rows, held, *, seed: int = 0) -> Pace:
    """Time real steps and a real pass; every variable is then as it was.

    Args:
        trainer: Its step is compiled by this where it was not yet.
        rows: Images to step on.
        held: Images that are judged after an epoch, at least one.
        seed: Of the batches.

    Returns:
        The pace: the mean of three steps behind the one that compiles, and the second of two passes.
    """
    averages = trainer.average.averages if trainer.average else ()
    every = (*trainer.trained.variables, *trainer.step.variables, *averages)
    before = [variable.numpy() for variable in every]
    trainer.step.push()
    steps, passes = [], []
    following = _whole_batches(trainer.batches(rows, seed), trainer.batch_size)
    try:
        for index in range(1 + NUM_STEPS):
            began = time.perf_counter()
            trainer.step(next(following))
            if trainer.average:
                trainer.average.update(index)
            steps.append(time.perf_counter() - began)
        some = np.asarray(held)[:HELD_BATCH]
        for _ in range(2):
            began = time.perf_counter()
            trainer.log_probabilities(some)
            passes.append(time.perf_counter() - began)
    finally:
        for variable, value in zip(every, before, strict=True):
            variable.assign(value)
        trainer.step.push()
    step = float(np.mean(steps[1:]))
    return Pace(step, passes[1] / len(some), max(steps[0] - step, 0.0))


def _whole_batches(batches: EpochBatches, size: int) -> Iterator[Batch]:
    """Without end, read ahead as in training, without the rest that ends an epoch, which is quicker."""
    for epoch in itertools.count():
        for batch in batches.epoch(epoch):
            if len(batch.rows) == size or len(batches) == 1:
                yield batch
