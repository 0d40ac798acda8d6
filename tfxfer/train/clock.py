"""A time limit that is kept between epochs."""

import time

import keras


class Clock:
    """Counts down.

    Args:
        limit_seconds: Wall time from `started`; 0 for no limit.
        started: `time.monotonic()` of the beginning; now by default.
    """

    def __init__(self, limit_seconds: float = 0.0, started: float | None = None):
        self.limit_seconds = limit_seconds
        self.started = time.monotonic() if started is None else started
        self.stopped = False  # set where something was cut short, which may be before the limit itself

    def remaining(self) -> float:
        """Seconds left; infinity without a limit."""
        if not self.limit_seconds:
            return float("inf")
        return self.limit_seconds - (time.monotonic() - self.started)

    def expired(self) -> bool:
        """Whether the time is over, or so nearly that an epoch was left out."""
        return self.stopped or self.remaining() <= 0


class StopOnTime(keras.callbacks.Callback):
    """Stop training at the end of the epoch after which another would pass the limit."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock
        self._began = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        if self.clock.remaining() < time.monotonic() - self._began:
            self.model.stop_training = self.clock.stopped = True
