"""Learning-rate schedules: functions of the step, so that one compiled training step serves every rate tried."""

import math
from collections.abc import Callable, Sequence

from tfxfer.specs import Stage


def warmup_cosine(step: int, total_steps: int, warmup_share: float) -> float:
    """The share of the peak rate at a step: a linear climb, then half a cosine to zero.

    Args:
        step: 0 for the first.
        total_steps: Of the whole stage.
        warmup_share: Share of the steps that climb, in [0, 1).

    Example:
        >>> [round(warmup_cosine(step, 4, 0.5), 2) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]

    Reference:
        Loshchilov, Hutter. SGDR: Stochastic Gradient Descent with Warm Restarts. ICLR 2017.
    """
    warmup = round(total_steps * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(total_steps - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def slanted(step: int, total_steps: int, warmup_share: float, ratio: float = 32.0) -> float:
    """The share of the peak rate at a step: a line from 1/`ratio` up to 1, then one down to where it began.

    Args:
        step: 0 for the first.
        total_steps: Of the whole stage.
        warmup_share: Share of the steps that climb, in [0, 1); the paper's is 0.1.
        ratio: Of the peak to the ends.

    Example:
        >>> [slanted(step, 8, 0.25) for step in (0, 2, 8)]
        [0.03125, 1.0, 0.03125]

    Reference:
        Howard, Ruder. Universal Language Model Fine-tuning for Text Classification. ACL 2018 (equation 3).
    """
    top = math.floor(total_steps * warmup_share)
    climbed = step / top if step < top else 1 - (step - top) / max(total_steps - top, 1)
    return (1 + climbed * (ratio - 1)) / ratio


def staircase(step: int, total_steps: int, warmup_share: float, decay_at: Sequence[float]) -> float:
    """The share of the peak rate at a step: a linear climb from zero, then a tenth less behind each of some points.

    Args:
        step: 0 for the first.
        total_steps: Of the whole stage.
        warmup_share: Share of the steps that climb, in [0, 1).
        decay_at: Shares of the steps after which a tenth is left.

    Example:
        >>> [round(staircase(step, 10, 0.2, (0.3, 0.6)), 3) for step in (0, 1, 2, 3, 4, 7)]
        [0.0, 0.5, 1.0, 1.0, 0.1, 0.01]

    Reference:
        Kolesnikov et al. Big Transfer (BiT): General Visual Representation Learning. ECCV 2020; `get_lr` of their code.
    """
    warmup = total_steps * warmup_share
    if step < warmup:
        return step / warmup
    # Rounded, or 0.3 of ten steps were a little less than three.
    return 0.1 ** sum(step > round(total_steps * share, 6) for share in decay_at)


SCHEDULES: dict[str, Callable[[int, int, Stage], float]] = {
    "cosine": lambda step, total, stage: warmup_cosine(step, total, stage.warmup_share),
    "slanted": lambda step, total, stage: slanted(step, total, stage.warmup_share),
    "steps": lambda step, total, stage: staircase(step, total, stage.warmup_share, stage.decay_at),
}
