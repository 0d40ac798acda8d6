"""The expensive baseline: the same network trained from random weights, with a recipe meant for that."""

import dataclasses

import keras
import numpy as np

from tfxfer.features.solvers import log_softmax
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Source
from tfxfer.train.batches import EpochBatches, KerasBatches
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
    test_pixels: np.ndarray,
    *,
    transfer_epochs: int,
    mirror: bool,
    progress: Progress | None = None,
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
        progress: Told about epochs.
    """
    progress = progress or Progress()
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
    pixels = np.concatenate(data.parts)
    views = [pixels, pixels[:, :, ::-1]] if mirror else [pixels]
    targets = np.eye(data.num_classes, dtype=np.float32)[data.labels]
    weights = data.weights.astype(np.float32)
    batches = KerasBatches(
        EpochBatches(_Stack(views), len(views), targets, weights, data.rows, plan.batch_size, plan.seed)
    )
    limit = max(MIN_EPOCHS, 3 * transfer_epochs)
    stop = keras.callbacks.EarlyStopping(
        monitor="val_log_loss", mode="min", patience=PATIENCE_EPOCHS, restore_best_weights=True
    )
    slow = keras.callbacks.ReduceLROnPlateau(monitor="val_log_loss", mode="min", factor=0.5, patience=6)
    tell = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: progress.update(epoch + 1, limit))
    fitted = model.fit(
        batches,
        epochs=limit,
        validation_data=(pixels[data.held], targets[data.held], weights[data.held]),
        validation_batch_size=64,
        callbacks=[stop, slow, tell],
        verbose=0,
    )
    logits = model.predict(test_pixels, batch_size=64, verbose=0)
    epochs = len(fitted.epoch)
    return Scratch(np.exp(log_softmax(logits)), epochs < limit, epochs, float(min(fitted.history["val_log_loss"])))


class _Stack:
    """Views of the same images, indexed by (views, rows) as one array would be, without copying them into one."""

    def __init__(self, views: list[np.ndarray]):
        self.views = views

    def __getitem__(self, index):
        view, rows = index
        batch = self.views[0][rows]
        for number, pixels in enumerate(self.views[1:], start=1):
            batch[view == number] = pixels[rows[view == number]]
        return batch.astype(np.float32)
