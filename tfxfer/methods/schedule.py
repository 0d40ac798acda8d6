"""Learning-rate schedules: functions of the step, so that one compiled training step serves every rate tried."""

import math


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
