"""A time limit: what is left of it, what of that is kept back for later, and training that stops in time."""

import time
from collections.abc import Callable

import keras


class Clock:
    """Counts down.

    Args:
        limit_seconds: Wall time from `started`; 0 for no limit.
        started: What `now` gave at the beginning; by default what it gives.
        now: Seconds of a clock that never goes back.

    Example:
        >>> clock = Clock(60)
        >>> clock.keep_back("export", 15)
        >>> round(clock.remaining()), round(clock.left())
        (45, 60)
    """

    def __init__(
        self, limit_seconds: float = 0.0, started: float | None = None, now: Callable[[], float] = time.monotonic
    ):
        self.limit_seconds, self.now = limit_seconds, now
        self.started = now() if started is None else started
        self.kept_back: dict[str, float] = {}
        self.stopped = False  # set where something was cut short, which may be before the limit itself

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return bool(self.limit_seconds)

    def left(self) -> float:
        """Seconds to the limit itself; infinity without one."""
        if not self.limit_seconds:
            return float("inf")
        return self.limit_seconds - (self.now() - self.started)

    def remaining(self) -> float:
        """Seconds left for what is at work now: what is kept back for later is not among them."""
        return self.left() - sum(self.kept_back.values())

    def expired(self) -> bool:
        """Whether the time is over, or so nearly that something was left out."""
        return self.stopped or self.remaining() <= 0

    def keep_back(self, what: str, seconds: float) -> None:
        """Keep so many seconds for what comes later; an earlier figure for the same is replaced."""
        self.kept_back[what] = max(seconds, 0.0)

    def release(self, what: str) -> None:
        """It has come: its seconds are free."""
        self.kept_back.pop(what, None)

    def again(self) -> "Clock":
        """The same limit for another training, of which nothing has been cut short yet."""
        clock = Clock(self.limit_seconds, self.started, self.now)
        clock.kept_back = dict(self.kept_back)
        return clock


class StopOnTime(keras.callbacks.Callback):
    """Stop training before the batch that would pass the limit.

    Args:
        clock: The limit.
        held_seconds: What the end of an epoch takes, which follows a stop too.

    Attributes:
        stopped: Whether it did.
    """

    def __init__(self, clock: Clock, held_seconds: float = 0.0):
        super().__init__()
        self.clock, self.held_seconds, self.stopped = clock, held_seconds, False
        self._batch_began = self._batch_ended = 0.0

    def on_train_batch_begin(self, batch, logs=None):
        self._batch_began = self.clock.now()

    def on_train_batch_end(self, batch, logs=None):
        self._batch_ended = self.clock.now()
        if batch + 1 != self.params.get("steps"):  # of the last one the end of the epoch is coming anyway
            self._stop_unless_fits()

    def on_epoch_end(self, epoch, logs=None):
        self.held_seconds = max(self.held_seconds, self.clock.now() - self._batch_ended)
        if epoch + 1 != self.params.get("epochs"):
            self._stop_unless_fits()

    def _stop_unless_fits(self) -> None:
        if self.clock.remaining() < self._batch_ended - self._batch_began + self.held_seconds:
            self.model.stop_training = self.stopped = self.clock.stopped = True
