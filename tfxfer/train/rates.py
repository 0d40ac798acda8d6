"""The learning-rate range test: train a few steps at rates that grow, and look at what the loss does.

From a probe's solution on, what a step gains is far less than what batches differ by. So each batch's loss is compared
with that of the same batch, view and dropout under the start weights: what is left is what training did.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tfxfer.train.loop import SuffixTrainer

NUM_STEPS = 100
LOWEST, HIGHEST = 1e-6, 1.0
KEPT_SHARE = 0.9  # of the smoothed loss, from step to step
STOP_AT = 4.0  # times the least smoothed loss: it has gone astray
SKIPPED = 5  # first steps, of which the smoothed loss is hardly smooth


@dataclasses.dataclass(frozen=True)
class RateTest:
    """What was seen.

    Attributes:
        stage: Its name.
        rates: (n,) of the steps.
        losses: (n,) of the batches, before each step.
        start_losses: (n,) of the same batches under the start weights.
    """

    stage: str
    rates: np.ndarray
    losses: np.ndarray
    start_losses: np.ndarray

    @property
    def smoothed(self) -> np.ndarray:
        """(n,) the mean loss at the start, and how much less it has become."""
        return self.start_losses.mean() + smooth(self.losses - self.start_losses)

    @property
    def suggestions(self) -> dict[str, float]:
        return suggest(self.rates, self.smoothed)


def growing_rates(num_steps: int = NUM_STEPS, lowest: float = LOWEST, highest: float = HIGHEST) -> np.ndarray:
    """Rates that grow by the same factor from step to step.

    Example:
        >>> growing_rates(3, 0.01, 1.0).round(6).tolist()
        [0.01, 0.1, 1.0]
    """
    return np.geomspace(lowest, highest, num_steps)


def smooth(losses, kept_share: float = KEPT_SHARE) -> np.ndarray:
    """The running mean that forgets, `m_i = kept_share m_(i-1) + (1 - kept_share) loss_i`, without its bias to zero.

    Example:
        >>> smooth([2.0, 2.0, 4.0], 0.5).round(4).tolist()
        [2.0, 2.0, 3.1429]
    """
    mean, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = kept_share * mean + (1 - kept_share) * loss
        found.append(mean / (1 - kept_share**count))
    return np.asarray(found)


def suggest(rates, smoothed) -> dict[str, float]:
    """Rates to train with, read from a range test.

    Args:
        rates: (n,) rising.
        smoothed: (n,) losses.

    Returns:
        `minimum_tenth`, a tenth of the rate at which the smoothed loss is least; `steepest`, where before that it falls
        fastest with the logarithm of the rate, left out where it never falls; `rate`, what is trained with: the first,
        which is the steadier of the two.

    Example:
        >>> rates = growing_rates(100)
        >>> found = suggest(rates, (np.log10(rates) + 2) ** 2)
        >>> round(found["rate"], 4)
        0.001

    Reference:
        Smith. Cyclical Learning Rates for Training Neural Networks. WACV 2017 (section 3.3). Exponential growth,
        smoothing and both readings as in Howard, Gugger. fastai: A Layered API for Deep Learning. Information, 2020.
    """
    rates, smoothed = np.asarray(rates), np.asarray(smoothed)
    first = min(SKIPPED, len(rates) - 1)
    least = first + int(np.argmin(smoothed[first:]))
    found = {"minimum_tenth": float(rates[least] / 10)}
    if least > first + 1:
        slopes = np.gradient(smoothed[first : least + 1], np.log(rates[first : least + 1]))
        if slopes.min() < 0:
            found["steepest"] = float(rates[first + int(np.argmin(slopes))])
    return {**found, "rate": found["minimum_tenth"]}


def measure_rates(
    trainer: SuffixTrainer,
    rows: np.ndarray,
    *,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    rates: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Train from the start weights at growing rates until the loss goes astray; the start weights are there again then.

    Args:
        trainer: Of the stage.
        rows: Images trained on.
        seed: Of shuffle, views and dropout.
        stop: Asked after each step whether to end, for want of time.
        rates: Of the steps; `growing_rates()` by default.

    Returns:
        `rates`, `losses` and `start_losses` for a journal.

    Raises:
        NotFinite: Where the first batch has no loss that is a number.
    """
    rates = growing_rates() if rates is None else rates
    starts: list[float] = []
    losses: list[float] = []

    def note_start(loss: float) -> bool:
        starts.append(loss)
        return not stop() or len(starts) <= SKIPPED

    def goes_on(loss: float) -> bool:
        losses.append(loss)
        smoothed = np.mean(starts) + smooth(np.subtract(losses, starts[: len(losses)]))
        return not stop() and (len(losses) <= SKIPPED or smoothed[-1] <= STOP_AT * smoothed.min())

    trainer.try_rates(rows, np.zeros(len(rates)), seed=seed, goes_on=note_start)
    trainer.try_rates(rows, rates[: len(starts)], seed=seed, goes_on=goes_on)
    count = len(losses)
    return {"rates": rates[:count], "losses": np.asarray(losses), "start_losses": np.asarray(starts[:count])}, {}
