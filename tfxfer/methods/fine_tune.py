"""Parameter transfer: train the unfrozen suffix of a model, from cached activations, by Keras' own `fit`."""

import dataclasses
import time
from collections.abc import Sequence

import keras
import numpy as np

from tfxfer.features.extract import Extracted
from tfxfer.features.solvers import log_softmax
from tfxfer.methods.schedule import WarmupCosine
from tfxfer.specs import Stage


class CachedViews(keras.utils.PyDataset):
    """Batches of cached activations; each epoch shuffles anew and picks one view of each image, by (seed, epoch).

    Args:
        activations: Indexed by (views, rows) arrays, such as a (V, N, ...) array.
        num_views: V.
        labels: (N, K) targets.
        weights: (N,) loss weights.
        rows: Images used.
        batch_size: Images a step.
        seed: Two sequences with the same seed give the same batches.
    """

    def __init__(self, activations, num_views: int, labels, weights, rows, batch_size: int, seed: int):
        super().__init__(workers=1, use_multiprocessing=False)
        self._activations, self._num_views, self._labels, self._weights = activations, num_views, labels, weights
        self._rows, self._batch_size, self._seed = np.asarray(rows), batch_size, seed
        self.epoch = 0
        self._shuffle()

    def _shuffle(self):
        random = np.random.default_rng((self._seed, self.epoch))
        self._order = random.permutation(self._rows)
        self._view = random.integers(self._num_views, size=len(self._rows))

    def __len__(self):
        return -(-len(self._rows) // self._batch_size)

    def __getitem__(self, index):
        picked = slice(index * self._batch_size, (index + 1) * self._batch_size)
        rows, view = self._order[picked], self._view[picked]
        return self._activations[view, rows], self._labels[rows], self._weights[rows]

    def on_epoch_end(self):
        self.epoch += 1
        self._shuffle()


@dataclasses.dataclass
class Trained:
    """One training of a suffix.

    Attributes:
        weights: Of the best epoch on the held-out rows, or of the last where there are none.
        learning_rate: Its peak.
        epochs: Epochs that led to `weights`.
        history: One dict an epoch, as Keras logs it.
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
        patience: Epochs without a better held-out loss before a run stops.
    """

    def __init__(self, suffix, extracted: Extracted, labels, weights, stage: Stage, batch_size: int, patience: int = 4):
        self.suffix, self.extracted, self.stage = suffix, extracted, stage
        self.labels, self.weights = np.asarray(labels), np.asarray(weights, np.float32)
        self.targets = np.eye(suffix.output_shape[-1], dtype=np.float32)[self.labels]
        self.batch_size, self.patience = batch_size, patience
        self.start = suffix.get_weights()
        optimizer = keras.optimizers.AdamW(1e-3, weight_decay=stage.weight_decay, global_clipnorm=1.0)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        suffix.compile(
            optimizer=optimizer,
            loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=stage.label_smoothing),
            weighted_metrics=[
                keras.metrics.CategoricalAccuracy(name="accuracy"),
                keras.metrics.CategoricalCrossentropy(from_logits=True, name="log_loss"),
            ],
        )
        optimizer.build(suffix.trainable_variables)
        self._fresh = [variable.numpy() for variable in optimizer.variables]

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
            callbacks: The user's.
        """
        epochs = epochs or self.stage.epochs
        self._restart(seed)
        activations, num_views = self.extracted.activations, len(self.extracted.views)
        batches = CachedViews(activations, num_views, self.targets, self.weights, rows, self.batch_size, seed)
        watch = [WarmupCosine(learning_rate, epochs * len(batches), self.stage.warmup_share)]
        validation = None
        if held is not None:
            validation = (self.extracted.activations[0][held], self.targets[held], self.weights[held])
            watch.append(
                # The smoothed loss: the plain log loss would punish the caution that smoothing teaches.
                keras.callbacks.EarlyStopping(
                    monitor="val_loss", mode="min", patience=self.patience, restore_best_weights=True
                )
            )
        started = time.perf_counter()
        fitted = self.suffix.fit(
            batches,
            initial_epoch=first_epoch,
            epochs=first_epoch + (stop_after or epochs),
            validation_data=validation,
            validation_batch_size=256,
            callbacks=[*watch, *callbacks],
            verbose=0,
        )
        history = [
            {
                "epoch": epoch,
                "learning_rate": learning_rate,
                **{key: values[index] for key, values in fitted.history.items()},
            }
            for index, epoch in enumerate(fitted.epoch)
        ]
        seconds = (time.perf_counter() - started) / (len(history) * len(rows))
        used, scores, loss = len(history), None, float("nan")
        if held is not None:
            losses = np.nan_to_num([entry["val_loss"] for entry in history], nan=np.inf)
            used, loss = int(np.argmin(losses)) + 1, float(losses.min())
            scores = self.log_probabilities(held)
        return Trained(self.suffix.get_weights(), learning_rate, used, history, scores, loss, seconds)

    def log_probabilities(self, rows) -> np.ndarray:
        """(n, K) for the plain view, with the suffix's present weights."""
        logits = self.suffix.predict(self.extracted.activations[0][rows], batch_size=256, verbose=0)
        return log_softmax(logits)

    def _restart(self, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self.suffix.set_weights(self.start)
        for variable in self.suffix.variables:
            if variable.path.endswith("seed_generator_state"):  # dropout's own, which no global seed reaches
                variable.assign([seed, 0])
        for variable, value in zip(self.suffix.optimizer.variables, self._fresh, strict=True):
            variable.assign(value)


def interpolate(first: list[np.ndarray], second: list[np.ndarray], share: float) -> list[np.ndarray]:
    """`(1 - share) * first + share * second`, weight by weight.

    Args:
        first: Weights of the start, such as the probe.
        second: Weights of the fine-tuned model.
        share: In [0, 1].

    Reference:
        Wortsman et al. Robust fine-tuning of zero-shot models (WiSE-FT). CVPR 2022.
    """
    return [((1 - share) * a + share * b).astype(a.dtype) for a, b in zip(first, second, strict=True)]
