"""Callbacks of a trial."""

from collections import defaultdict
from collections.abc import Sequence

import keras
import numpy as np


class OnWholeModel(keras.callbacks.Callback):
    """Lets callbacks see a whole model where only what follows its frozen blocks is trained.

    KerasTuner's own keep its weights in a file, which they then read into a model that was built anew.

    Args:
        callbacks: Keras callbacks.
        whole: The model that they see.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback], whole: keras.Model):
        super().__init__()
        self._whole = whole
        whole.stop_training = False
        self._list = keras.callbacks.CallbackList(list(callbacks), model=whole)

    def set_params(self, params) -> None:
        self._list.set_params(params)

    def on_train_begin(self, logs=None) -> None:
        self._list.on_train_begin(logs)

    def on_train_end(self, logs=None) -> None:
        self._list.on_train_end(logs)

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self._list.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch, logs=None) -> None:
        self._list.on_epoch_end(epoch, logs)
        self._pass_on()

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self._list.on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch, logs=None) -> None:
        self._list.on_train_batch_end(batch, logs)
        self._pass_on()

    def _pass_on(self) -> None:
        if self._whole.stop_training:
            self.model.stop_training = True


class MedianRecord:
    """What finished trials had reached by each epoch.

    Args:
        monitor: A number of the logs.
        direction: "max" or "min".
        warm_up: Trials that are never stopped.
    """

    def __init__(self, monitor: str, direction: str, warm_up: int = 3):
        self.monitor, self.sign, self.warm_up = monitor, 1.0 if direction == "max" else -1.0, warm_up
        self._means: dict[int, list[float]] = defaultdict(list)
        self.num_finished = 0

    def finish(self, values: Sequence[float]) -> None:
        """Note the values of a trial, an epoch each."""
        for epoch, mean in enumerate(np.cumsum(values) / np.arange(1, len(values) + 1)):
            self._means[epoch].append(self.sign * float(mean))
        self.num_finished += 1

    def is_hopeless(self, best: float, epoch: int) -> bool:
        """Whether the best value so far is below the median of what others had on the average by this epoch.

        Args:
            best: Of the trial that runs.
            epoch: From 0.
        """
        others = self._means.get(epoch, [])
        return len(others) >= self.warm_up and self.sign * best < float(np.median(others))


class MedianStopping(keras.callbacks.Callback):
    """Stops a trial that cannot win any more, as far as others tell.

    Args:
        record: Of the search; the trial's values are noted in it at the end.

    Reference:
        Golovin, Solnik, Moitra, Kochanski, Karro, Sculley. Google Vizier: A Service for Black-Box Optimization. KDD
        2017, section 3.2.
    """

    def __init__(self, record: MedianRecord):
        super().__init__()
        self.record = record
        self.stopped_at: int | None = None
        self._values: list[float] = []

    def on_epoch_end(self, epoch, logs=None) -> None:
        value = (logs or {}).get(self.record.monitor)
        if value is None:
            return
        self._values.append(float(value))
        sign = self.record.sign
        best = sign * max(sign * value for value in self._values)
        if self.record.is_hopeless(best, len(self._values) - 1):
            self.stopped_at = epoch
            self.model.stop_training = True

    def on_train_end(self, logs=None) -> None:
        self.record.finish(self._values)
