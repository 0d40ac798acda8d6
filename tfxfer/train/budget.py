"""How much of a fine-tuning stage fits into the time that is left, by what a step was measured to take.

What does not fit is shed in this order: rates that are tried, folds, the refit to a third of the epochs where it only
goes on, epochs, the refit itself, the stage. Epochs go late: a schedule is shortened as a whole, warm-up and cosine
to zero over what is really run, but too few of them move nothing.
"""

import dataclasses
from collections.abc import Iterator, Sequence

SAFETY = 1.1  # later steps are slower than the first few: other processes, heat, checkpoints
MIN_EPOCHS_SHARE = 1 / 3  # below that share of the epochs the refit is shed before more epochs are


@dataclasses.dataclass(frozen=True)
class Pace:
    """What was measured.

    Attributes:
        step_seconds: Of one training step.
        held_seconds: Of an image that is judged after an epoch.
        compile_seconds: Of the first step, which is compiled, beyond what a step takes.
    """

    step_seconds: float
    held_seconds: float
    compile_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage does where time does not matter.

    Attributes:
        epochs: Of its schedule.
        num_rates: Learning rates to try on the first fold.
        folds: (images trained on, images judged) of each; one where there is a validation part.
        num_all: Images of the refit.
        batch_size: Images a step.
        goes_on: Whether a refit goes on from the end for a third of the epochs, or begins anew.
        num_test_steps: What a range test of the rate takes, in training steps.
        recompiles: Whether a refit compiles its step anew.
    """

    epochs: int
    num_rates: int
    folds: Sequence[tuple[int, int]]
    num_all: int
    batch_size: int
    goes_on: bool = True
    num_test_steps: int = 0
    recompiles: bool = False


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What of it is done.

    Attributes:
        epochs: Of each run, 0 where the stage is left out.
        num_rates, num_folds: As many are tried and trained.
        refit: Whether there is one on everything.
        seconds: Predicted, without the refit.
        refit_seconds: Predicted of that.
    """

    epochs: int
    num_rates: int
    num_folds: int
    refit: bool
    seconds: float
    refit_seconds: float

    @property
    def left_out(self) -> bool:
        """Whether nothing is done."""
        return self.epochs == 0


LEFT_OUT = StagePlan(0, 0, 0, False, 0.0, 0.0)


def priced(work: Work, pace: Pace, epochs: int, num_rates: int, num_folds: int, refit: bool) -> StagePlan:
    """A plan with what it takes.

    Example:
        >>> work = Work(epochs=4, num_rates=2, folds=((64, 10),), num_all=96, batch_size=32)
        >>> plan = priced(work, Pace(step_seconds=1.0, held_seconds=0.1), 4, 2, 1, True)
        >>> plan.seconds, plan.refit_seconds  # 2 runs of 4 epochs of 2 s and 1 s, judged once more; 2 epochs of 3 s
        (26.0, 6.0)
    """
    runs = [0] * num_rates + list(range(1, num_folds))
    seconds = work.num_test_steps * pace.step_seconds
    for fold in runs:
        trained, held = work.folds[fold]
        judged = held * pace.held_seconds
        seconds += epochs * (_steps(trained, work) * pace.step_seconds + judged) + judged
    again = 0.0
    if refit:
        length = max(2, round(epochs / 3)) if work.goes_on else epochs
        again = length * _steps(work.num_all, work) * pace.step_seconds + work.recompiles * pace.compile_seconds
    return StagePlan(epochs, num_rates, num_folds, refit, seconds, again)


def plan_stage(work: Work, pace: Pace, seconds: float) -> StagePlan:
    """The most of a stage that fits.

    Args:
        work: All of it.
        pace: Measured.
        seconds: That there are; infinite for no limit.

    Example:
        >>> work = Work(epochs=4, num_rates=2, folds=((64, 10),), num_all=96, batch_size=32)
        >>> pace = Pace(step_seconds=1.0, held_seconds=0.1)
        >>> for seconds in (60, 25, 8, 3):
        ...     plan = plan_stage(work, pace, seconds)
        ...     print(plan.num_rates, plan.epochs, plan.refit)
        2 4 True
        1 4 True
        1 2 False
        0 0 False
    """
    for choice in _choices(work):
        plan = priced(work, pace, *choice)
        if (plan.seconds + plan.refit_seconds) * SAFETY <= seconds:
            return plan
    return LEFT_OUT


def shared(seconds: float, works: Sequence[Work], pace: Pace) -> float:
    """Of the seconds that there are for several stages, those of the first: its share of what all would take."""
    whole = [priced(work, pace, work.epochs, work.num_rates, len(work.folds), True) for work in works]
    prices = [plan.seconds + plan.refit_seconds for plan in whole]
    return seconds * prices[0] / sum(prices)


def planned_rates(rates: Sequence[float], count: int) -> tuple[float, ...]:
    """So many of the rates, from the highest down: the one in the middle, then those beside it, the higher first.

    Example:
        >>> planned_rates((1e-4, 3e-4, 1e-3), 2), planned_rates((1e-4, 3e-4, 1e-3), 1)
        ((0.001, 0.0003), (0.0003,))
    """
    high = sorted(rates, reverse=True)
    middle = len(high) // 2
    near = sorted(range(len(high)), key=lambda index: (abs(index - middle), index))
    return tuple(high[index] for index in sorted(near[:count]))


def _choices(work: Work) -> Iterator[tuple[int, int, int, bool]]:
    """(epochs, rates, folds, refit), the best first."""
    num_folds, full = len(work.folds), work.epochs
    for num_rates in range(work.num_rates, 0, -1):
        yield full, num_rates, num_folds, True
    for fewer in range(num_folds - 1, 0, -1):
        yield full, 1, fewer, True
    least = max(1, round(full * MIN_EPOCHS_SHARE))
    for epochs in range(full - 1, least - 1, -1):
        yield epochs, 1, 1, True
    # Models of folds are worth nothing without the refit.
    for epochs in range(full if work.goes_on else least - 1, 0, -1):
        yield epochs, 1, 1, not work.goes_on


def _steps(count: int, work: Work) -> int:
    return -(-count // work.batch_size)
