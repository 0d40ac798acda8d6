"""The expensive baseline: the same network trained from random weights, with a recipe meant for that."""

import dataclasses

import keras
import numpy as np

from tfxfer.features.fresh import ENDLESS
from tfxfer.features.rows import Stacked
from tfxfer.features.solvers import log_softmax
from tfxfer.features.views import augmented
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze
from tfxfer.model.predict import BATCH_SIZE, predict_in_batches
from tfxfer.runtime.progress import Progress
from tfxfer.runtime.store import Rows
from tfxfer.specs import Plan, Source
from tfxfer.train.batches import EpochBatches, KerasBatches
from tfxfer.train.clock import Clock, StopOnTime
from tfxfer.train.outcome import TrainingData

PEAK_RATE = 2e-3
PATIENCE_EPOCHS = 12
MIN_EPOCHS = 30


@dataclasses.dataclass(frozen=True, eq=False)
class Scratch:
    """A training from scratch.

    Attributes:
        probabilities: (M, K) on the test images.
        converged: Whether the validation loss stalled before the steps ran out.
        epochs: Epochs run.
        best_log_loss: On the validation part.
    """

    probabilities: np.ndarray
    converged: bool
    epochs: int
    best_log_loss: float


def train_from_scratch(
    card: Source,
    plan: Plan,
    data: TrainingData,
    test_pixels: Rows,
    *,
    transfer_epochs: int,
    mirror: bool,
    rand: bool = False,
    progress: Progress | None = None,
    clock: Clock | None = None,
    held_seconds: float = 0.0,
) -> Scratch:
    """Train every weight from random ones, BatchNorm included, until the validation loss stalls.

    It trains on the train part only: the validation part says when to stop. Adam with its own, higher rate, halved when
    the validation loss has not fallen for six epochs; at most three times the transferred model's epochs (at least 30),
    the weights of the best epoch kept.

    Args:
        card: The source, for its architecture.
        plan: Image size, batch size, dropout, seed.
        data: Trained on its rows, watched on its held-out rows.
        test_pixels: (M, S, S, 3) uint8.
        transfer_epochs: Epochs that the transferred model's training took in all.
        mirror: Whether the transferred model saw mirrored images too.
        rand: Whether it saw views by RandAugment; then this one has new ones in each epoch.
        progress: Told about epochs.
        clock: The time limit; cut short by it, training had not converged.
        held_seconds: What judging the validation part is likely to take.
    """
    progress, on_time = progress or Progress(), StopOnTime(clock or Clock(), held_seconds)
    keras.utils.set_random_seed(plan.seed)
    model = build_model(
        card,
        data.num_classes,
        image_size=plan.image_size,
        dropout=plan.dropout,
        logits=True,
        weights=False,
        seed=plan.seed,
    )
    freeze(model, 0, batch_norm="train")
    model.compile(
        optimizer=keras.optimizers.Adam(PEAK_RATE),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        weighted_metrics=[keras.metrics.CategoricalCrossentropy(from_logits=True, name="log_loss")],
    )
    pixels = Stacked(data.parts)
    num_views, seen = (ENDLESS, _Rand(pixels, plan.seed)) if rand else (1 + mirror, _Mirrored(pixels))
    targets = np.eye(data.num_classes, dtype=np.float32)[data.labels]
    weights = data.weights.astype(np.float32)
    batches = KerasBatches(EpochBatches(seen, num_views, targets, weights, data.rows, plan.batch_size, plan.seed))
    limit = max(MIN_EPOCHS, 3 * transfer_epochs)
    stop = keras.callbacks.EarlyStopping(
        monitor="val_log_loss", mode="min", patience=PATIENCE_EPOCHS, restore_best_weights=True
    )
    slow = keras.callbacks.ReduceLROnPlateau(monitor="val_log_loss", mode="min", factor=0.5, patience=6)
    tell = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: progress.update(epoch + 1, limit))
    fitted = model.fit(
        batches,
        epochs=limit,
        validation_data=_InOrder(pixels, targets, weights, data.held),
        callbacks=[stop, slow, tell, on_time],
        verbose=0,
    )
    logits = predict_in_batches(model, test_pixels)
    epochs = len(fitted.epoch)
    converged = epochs < limit and not on_time.stopped
    return Scratch(np.exp(log_softmax(logits)), converged, epochs, float(min(fitted.history["val_log_loss"])))


class _Mirrored:
    """Images (view 0) and their mirror images (view 1), by (views, rows); read when they are asked for."""

    def __init__(self, pixels: Rows):
        self.pixels = pixels

    def __getitem__(self, index):
        views, rows = index
        batch, turned = self.pixels[rows], views == 1
        batch[turned] = batch[turned][:, :, ::-1]
        return batch.astype(np.float32)


class _Rand:
    """Views by RandAugment, made when they are asked for."""

    def __init__(self, pixels: Rows, seed: int):
        self.pixels, self.seed = pixels, seed

    def __getitem__(self, index):
        views, rows = index
        return augmented(self.pixels[rows], self.seed, views).astype(np.float32)


class _InOrder(keras.utils.PyDataset):
    """Some images in their order, for Keras' own judging of the validation part."""

    def __init__(self, pixels: Rows, targets: np.ndarray, weights: np.ndarray, rows: np.ndarray):
        super().__init__(workers=1, use_multiprocessing=False)
        self._pixels, self._targets, self._weights, self._rows = pixels, targets, weights, rows

    def __len__(self):
        return -(-len(self._rows) // BATCH_SIZE)

    def __getitem__(self, index):
        rows = self._rows[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
        return self._pixels[rows].astype(np.float32), self._targets[rows], self._weights[rows]
