"""Training of a model's suffix from cached activations, step by step, so that it can stop and go on at any batch."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfxfer.features.extract import Extracted
from tfxfer.features.solvers import log_softmax
from tfxfer.methods.averaging import WeightAverage
from tfxfer.methods.schedule import SCHEDULES
from tfxfer.metrics import metric_value
from tfxfer.specs import Stage
from tfxfer.train.batches import Batch, EpochBatches
from tfxfer.train.distribute import Devices
from tfxfer.train.forgetting import SOURCE_LOGITS, Regularizer
from tfxfer.train.journal import Arrays, Facts, OpenUnit
from tfxfer.train.state import callback_states, set_callback_states
from tfxfer.train.step import NUM_SUMS

HELD_BATCH = 256
# What a checkpoint keeps of `_Progress` beside its arrays.
_COUNTS = ("epoch", "batch", "history", "best_loss", "best_epoch", "seconds")


class NotFinite(Exception):
    """A step met numbers that are none.

    Attributes:
        rows: Images of the batch.
        step: Its number, from 1.
        where: "input" or "loss".
    """

    def __init__(self, batch: Batch, step: int):
        self.rows, self.step = batch.rows, step
        tensors = tf.nest.flatten(batch.activations)
        self.where = "loss" if all(np.isfinite(tensor).all() for tensor in tensors) else "input"
        super().__init__(f"{self.where} at step {step}")

    def told(self, names: Sequence[str] | None, rate: float) -> str:
        """For people: the files of the batch, and what to do.

        Args:
            names: Of all images, where they have some.
            rate: The peak rate of the run.
        """
        batch = [names[row] if names else f"image {row}" for row in self.rows]
        told = ", ".join(batch[:8]) + (f" and {len(batch) - 8} more" if len(batch) > 8 else "")
        cure = (
            "the source gives numbers that are none for some of them"
            if self.where == "input"
            else f"give a smaller learning rate than {rate:g} (--lr), or look at these images"
        )
        return (
            f"The {self.where} of training was not a number at step {self.step}, in the batch of {told}; training "
            f"stopped there and what was best before is kept: {cure}."
        )


@dataclasses.dataclass
class Trained:
    """One training of a suffix.

    Attributes:
        weights: Of the best epoch on the held-out rows, or of the last where there are none; the start's where no
            epoch had a loss that is a number.
        learning_rate: Its peak.
        epochs: Epochs that led to `weights`.
        history: One dict an epoch, with the names that Keras uses.
        held_log_probabilities: (n, K) of the held-out rows, plain view; None where there are none.
        loss: Of those, with label smoothing; infinite where it was not a number, NaN where there are none.
        seconds_per_image: Of an image in an epoch.
    """

    weights: list[np.ndarray]
    learning_rate: float
    epochs: int
    history: list[dict]
    held_log_probabilities: np.ndarray | None
    loss: float
    seconds_per_image: float

    def state(self) -> tuple[Arrays, Facts]:
        """For a journal."""
        arrays = {f"weights/{index}": value for index, value in enumerate(self.weights)}
        if self.held_log_probabilities is not None:
            arrays["held"] = self.held_log_probabilities
        names = ("learning_rate", "epochs", "history", "loss", "seconds_per_image")
        return arrays, {name: getattr(self, name) for name in names}

    @classmethod
    def of_state(cls, arrays: Arrays, facts: Facts) -> "Trained":
        """What `state` gave."""
        return cls(weights=_listed(arrays, "weights"), held_log_probabilities=arrays.get("held"), **facts)


@dataclasses.dataclass
class _Progress:
    """How far a run has come."""

    epoch: int = 0
    batch: int = 0
    sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(NUM_SUMS))
    history: list[dict] = dataclasses.field(default_factory=list)
    best: list[np.ndarray] | None = None
    best_loss: float = float("inf")
    best_epoch: int = 0
    seconds: float = 0.0


class SuffixTrainer:
    """Trains the suffix of a cut model from a given start, as often as asked; compiled once.

    The rate, the optimizer's state and the weights are set anew for each run, so that trying three learning rates
    costs one compilation.

    Args:
        suffix: Activations to logits; its `trainable` flags are as they should be.
        extracted: Activations of N images in V views.
        labels: (N,) int.
        weights: (N,) loss weights.
        stage: Epochs, schedule, decay, smoothing.
        batch_size: Images a step.
        factors: Of the learning rate, by layer; see `blockwise_factors`.
        regularizer: Against forgetting; what it trains along is no part of the result.
        devices: What takes the steps; one device by default.
        kept: The variables whose values `start` and results have, among them the suffix's; by default just those.
    """

    def __init__(
        self, suffix, extracted: Extracted, labels, weights, stage: Stage, batch_size: int,
        factors: Mapping[str, float] | None = None, regularizer: Regularizer | None = None,
        devices: Devices | None = None, kept: Sequence[keras.Variable] | None = None,
    ):  # fmt: skip
        self.suffix, self.extracted, self.stage = suffix, extracted, stage
        self.labels, self.weights = np.asarray(labels), np.asarray(weights, np.float32)
        self.targets = np.eye(suffix.output_shape[-1], dtype=np.float32)[self.labels]
        self.batch_size = batch_size
        self.kept = list(suffix.weights if kept is None else kept)
        self.start = self._weights()
        self.regularizer = regularizer
        self.trained = regularizer.attach(suffix) if regularizer else suffix
        factors = {**factors, SOURCE_LOGITS: 1.0} if factors and regularizer else factors
        self.step = (devices or Devices()).step(self.trained, stage, factors, regularizer)
        self.show_optimizer()
        self.average = WeightAverage(self.kept, stage.average) if stage.average else None
        self._fresh = [variable.numpy() for variable in self.step.variables]

    def show_optimizer(self) -> None:
        """Put this trainer's optimizer where callbacks look for it; another trainer of the suffix has done so too."""
        self.suffix.compile(optimizer=self.step.optimizer)

    def run(
        self,
        rows,
        learning_rate: float,
        *,
        held=None,
        epochs: int | None = None,
        stop_after: int | None = None,
        first_epoch: int = 0,
        seed: int = 0,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        watch: Sequence[keras.callbacks.Callback] = (),
        unit: OpenUnit | None = None,
    ) -> Trained:
        """Train once from the start weights.

        Args:
            rows: Images trained on.
            learning_rate: Peak.
            held: Images whose loss is watched; the best epoch's weights are kept.
            epochs: Length of the schedule; the stage's by default.
            stop_after: Stop after so many epochs of the schedule (a refit to the best epoch found before).
            first_epoch: Number of the first epoch in what callbacks and history see.
            seed: Of shuffle, views and dropout.
            callbacks: The user's. Plain attributes of theirs (a best value, a count) are kept in checkpoints.
            watch: Callbacks of ours, without a state.
            unit: Where the state is kept, so that another process can go on from there.

        Raises:
            NotFinite: Where input or loss are not numbers and no held-out images would tell that the rate is too high.
        """
        epochs = epochs or self.stage.epochs
        batches = self.batches(rows, seed)
        self._restart(seed)
        done = _Progress()
        watched = keras.callbacks.CallbackList([*watch, *callbacks], model=self.suffix)
        watched.set_params({"epochs": first_epoch + (stop_after or epochs), "steps": len(batches), "verbose": 0})
        self.suffix.stop_training = False
        watched.on_train_begin()
        found = unit.state() if unit else None
        if found:
            done = self._restore(*found, callbacks)
        try:
            while done.epoch < (stop_after or epochs) and not self.suffix.stop_training:
                self._epoch(done, batches, learning_rate, epochs, held, first_epoch, watched, callbacks, unit)
                idle = done.epoch - done.best_epoch
                if held is not None and self.stage.patience and idle >= self.stage.patience:
                    break
        except NotFinite as error:
            if held is None or error.where == "input":
                raise
            done.history.append({"epoch": first_epoch + done.epoch, "learning_rate": learning_rate})
        watched.on_train_end()
        self.step.check()
        return self._result(done, learning_rate, held, len(rows))

    def batches(self, rows, seed: int) -> EpochBatches:
        """The batches of these rows."""
        return EpochBatches(
            self.extracted.activations, len(self.extracted.activations), self.targets, self.weights, rows,
            self.batch_size, seed, mixup=self.stage.mixup, cutmix=self.stage.cutmix,
            recorder=self.regularizer.recorder(np.asarray(rows)) if self.regularizer else None,
        )  # fmt: skip

    def try_rates(self, rows, rates, *, seed: int, goes_on: Callable[[float], bool]) -> None:
        """One step from the start weights on at each of the rates, until a loss is no number or `goes_on` says no.

        The start weights and a fresh optimizer are there afterwards.

        Args:
            rows: Images trained on.
            rates: Of the steps; the images are gone through as often as these need it.
            seed: Of shuffle, views and dropout.
            goes_on: Told the loss of each batch, before the step on it.

        Raises:
            NotFinite: Where the first loss is no number.
        """
        batches = self.batches(rows, seed)
        endless = (batch for epoch in itertools.count() for batch in batches.epoch(epoch))
        self._restart(seed)
        for step, (rate, batch) in enumerate(zip(rates, endless, strict=False)):
            self.step.optimizer.learning_rate = rate
            result = self.step(batch)
            if not result.finite and not step:
                raise NotFinite(batch, 1)
            if not result.finite or not goes_on(float(result.sums[0] / result.sums[1])):
                break
        self._restart(seed)

    def _epoch(self, done, batches, learning_rate, epochs, held, first_epoch, watched, callbacks, unit) -> None:
        number = first_epoch + done.epoch
        if not done.batch:  # else it is a resumed one, which callbacks have seen begin
            watched.on_epoch_begin(number)
        total, began = epochs * len(batches), time.perf_counter()
        for batch in batches.epoch(done.epoch, done.batch):
            step = done.epoch * len(batches) + done.batch
            share = SCHEDULES[self.stage.schedule](step, total, self.stage)
            self.step.optimizer.learning_rate = learning_rate * share
            watched.on_train_batch_begin(done.batch)
            result = self.step(batch)
            if not result.finite:
                raise NotFinite(batch, step + 1)
            done.sums += result.sums
            if self.average:
                self.average.update(step)
            watched.on_train_batch_end(done.batch, _logs(done.sums))
            done.batch += 1
            if self.suffix.stop_training:
                break
            if unit is not None and unit.due():
                done.seconds += time.perf_counter() - began
                began = time.perf_counter()
                unit.save(*self._state(done, callbacks))
        logs = _logs(done.sums)
        if held is not None:
            with self._averaged():
                logs |= self._judge(held)
                kept = self._weights()
        done.epoch, done.batch, done.sums = done.epoch + 1, 0, np.zeros(NUM_SUMS)
        if held is not None and logs["val_loss"] < done.best_loss:
            done.best, done.best_loss, done.best_epoch = kept, logs["val_loss"], done.epoch
        done.history.append({"epoch": number, "learning_rate": learning_rate, **logs})
        done.seconds += time.perf_counter() - began
        watched.on_epoch_end(number, logs)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the averaged weights, where they are averaged, in the model."""
        if self.average is None:
            yield
            return
        present = self._weights()
        self.average.copy_to_variables()
        try:
            yield
        finally:
            self.set_weights(present)

    def _judge(self, held) -> dict[str, float]:
        """Keras' numbers for the held-out rows."""
        table = self.log_probabilities(held)
        weights, targets = self.weights[held], self.targets[held]
        smooth = targets * (1 - self.stage.label_smoothing) + self.stage.label_smoothing / targets.shape[1]
        own = sum(float(loss) for loss in self.suffix.losses)
        # The smoothed loss: the plain log loss would punish the caution that smoothing teaches.
        loss = -float((smooth * table).sum(1) @ weights) / len(held) + own
        labels, found = self.labels[held], table.argmax(1)
        hits = found == labels
        return {
            "val_loss": loss if np.isfinite(loss) else float("inf"),
            "val_accuracy": float(hits @ weights / weights.sum()),
            "val_log_loss": -float((targets * table).sum(1) @ weights / weights.sum()),
            "val_macro_f1": metric_value("macro_f1", labels, predictions=found),
            "val_balanced_accuracy": metric_value("balanced_accuracy", labels, predictions=found),
        }

    def _result(self, done: _Progress, learning_rate: float, held, count: int) -> Trained:
        used, scores, loss = len(done.history), None, float("nan")
        if held is None and self.average:
            self.average.copy_to_variables()
        if held is not None:
            # Without an epoch whose loss is a number it is the start, and never what broke it.
            self.set_weights(self.start if done.best is None else done.best)
            used, loss = max(done.best_epoch, 1), done.best_loss
            scores = self.log_probabilities(held)
        seconds = done.seconds / max(len(done.history) * count, 1)
        return Trained(self._weights(), learning_rate, used, done.history, scores, loss, seconds)

    def log_probabilities(self, rows) -> np.ndarray:
        """(n, K) for the plain view, with the suffix's present weights."""
        rows, found = np.asarray(rows), []
        for start in range(0, len(rows), HELD_BATCH):
            activations = self.extracted.activations[0, rows[start : start + HELD_BATCH]]
            found.append(self.suffix.predict_on_batch(activations))
        return log_softmax(np.concatenate(found))

    def _weights(self) -> list[np.ndarray]:
        return [variable.numpy() for variable in self.kept]

    def set_weights(self, values: Sequence[np.ndarray]) -> None:
        """Of the variables that are kept."""
        for variable, value in zip(self.kept, values, strict=True):
            variable.assign(value)

    # -- the state of a run -------------------------------------------------------------------------------------------

    def _restart(self, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self.set_weights(self.start)
        if self.regularizer:
            self.regularizer.start()
        for variable in self.suffix.variables:
            if variable.path.endswith("seed_generator_state"):  # dropout's own, which no global seed reaches
                variable.assign([seed, 0])
        for variable, value in zip(self.step.variables, self._fresh, strict=True):
            variable.assign(value)
        if self.average:
            self.average.restore([np.asarray(weight) for weight in self.start])
        self.step.push()

    def _state(self, done: _Progress, callbacks) -> tuple[Arrays, Facts]:
        arrays = {"sums": done.sums}
        for kind, values in (("model", self.trained.variables), ("optimizer", self.step.variables)):
            arrays |= {f"{kind}/{index}": variable.numpy() for index, variable in enumerate(values)}
        arrays |= {f"best/{index}": value for index, value in enumerate(done.best or ())}
        arrays |= {f"average/{i}": value for i, value in enumerate(self.average.state() if self.average else ())}
        told, facts = callback_states(callbacks)
        return arrays | told, {
            **{name: getattr(done, name) for name in _COUNTS},
            "callbacks": facts,
            "at": f"epoch {done.epoch + 1}, batch {done.batch}",
        }

    def _restore(self, arrays: Arrays, facts: Facts, callbacks) -> _Progress:
        for kind, variables in (("model", self.trained.variables), ("optimizer", self.step.variables)):
            for variable, value in zip(variables, _listed(arrays, kind), strict=True):
                variable.assign(value)
        if self.average:
            self.average.restore(_listed(arrays, "average"))
        set_callback_states(callbacks, arrays, facts["callbacks"])
        self.step.push()
        kept: dict[str, Any] = {name: facts[name] for name in _COUNTS}
        return _Progress(sums=arrays["sums"], best=_listed(arrays, "best") or None, **kept)


def _logs(sums: np.ndarray) -> dict[str, float]:
    loss, images, hits, log_loss, weights = sums
    return {
        "loss": float(loss / images),
        "accuracy": float(hits / max(weights, 1e-12)),
        "log_loss": float(log_loss / max(weights, 1e-12)),
    }


def _listed(arrays: Arrays, kind: str) -> list[np.ndarray]:
    count = sum(name.startswith(f"{kind}/") for name in arrays)
    return [arrays[f"{kind}/{index}"] for index in range(count)]
