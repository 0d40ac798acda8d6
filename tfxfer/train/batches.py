"""Batches of cached activations: which images, in which order, in which view is a function of seed and epoch alone."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from tfxfer.features.activations import Crossing
from tfxfer.methods.mixing import cutmix, mixup


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """What one step sees.

    Attributes:
        rows: (n,) numbers of the images.
        activations: (n, ...), or a tuple where several tensors cross the cut.
        targets: (n, K) shares of the classes.
        weights: (n,) loss weights.
        recorded: (n, S) that a regularizer wants of each image; None for nothing.
    """

    rows: np.ndarray
    activations: Crossing
    targets: np.ndarray
    weights: np.ndarray
    recorded: np.ndarray | None = None


class EpochBatches:
    """The batches of any epoch, from any batch on; the next one is read while the present one is computed on.

    Args:
        activations: Indexed by (views, rows) arrays: `Activations`, or a (V, N, ...) array.
        num_views: V.
        targets: (N, K).
        weights: (N,) loss weights.
        rows: Images used.
        batch_size: Images a step.
        seed: Two with the same seed give the same batches.
        mixup, cutmix: As in `Stage`.
        recorder: Of views, rows and targets of a batch gives `Batch.recorded`.

    Example:
        >>> data = EpochBatches(np.arange(8.0).reshape(2, 4), 2, np.eye(4), np.ones(4), np.arange(4), 3, seed=0)
        >>> len(data), sorted(int(row) for batch in data.epoch(0) for row in batch.rows)
        (2, [0, 1, 2, 3])
    """

    def __init__(
        self, activations: Any, num_views: int, targets, weights, rows, batch_size: int, seed: int,
        *, mixup: float = 0.0, cutmix: float = 0.0, recorder: Callable[..., np.ndarray] | None = None,
    ):  # fmt: skip
        self._recorder = recorder
        self._mixup, self._cutmix = mixup, cutmix
        self._activations, self._num_views = activations, num_views
        self._targets, self._weights = targets, weights
        self._rows, self._batch_size, self._seed = np.asarray(rows), batch_size, seed

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch in their order, and the view that each is seen in."""
        random = np.random.default_rng((self._seed, epoch))
        return random.permutation(self._rows), random.integers(self._num_views, size=len(self._rows))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from number `first` on."""
        order = self.order(epoch)
        if first >= len(self):
            return
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self._mixed, order, first, epoch)
            for following in range(first + 1, len(self) + 1):
                batch = waiting.result()
                if following < len(self):
                    waiting = pool.submit(self._mixed, order, following, epoch)
                yield batch

    def _mixed(self, order: tuple[np.ndarray, np.ndarray], index: int, epoch: int) -> Batch:
        batch = self._plain_or_mixed(order, index, epoch)
        if self._recorder is None:
            return batch
        views = order[1][index * self._batch_size : (index + 1) * self._batch_size]
        return dataclasses.replace(batch, recorded=self._recorder(views, batch.rows, batch.targets))

    def _plain_or_mixed(self, order: tuple[np.ndarray, np.ndarray], index: int, epoch: int) -> Batch:
        batch = self.read(order, index)
        if not self._mixup and not self._cutmix:
            return batch
        random = np.random.default_rng((self._seed, epoch, index, 1))
        cut = self._cutmix and (not self._mixup or random.random() < 0.5)
        mix, alpha = (cutmix, self._cutmix) if cut else (mixup, self._mixup)
        return Batch(batch.rows, *mix(batch.activations, batch.targets, batch.weights, random, alpha=alpha))

    def read(self, order: tuple[np.ndarray, np.ndarray], index: int) -> Batch:
        """Batch `index` of an order."""
        picked = slice(index * self._batch_size, (index + 1) * self._batch_size)
        rows, views = (part[picked] for part in order)
        return Batch(rows, self._activations[views, rows], self._targets[rows], self._weights[rows])


class KerasBatches(keras.utils.PyDataset):
    """`EpochBatches` for Keras' own `fit`."""

    def __init__(self, batches: EpochBatches):
        super().__init__(workers=1, use_multiprocessing=False)
        self._batches, self._number = batches, 0
        self._order = batches.order(0)

    def __len__(self):
        return len(self._batches)

    def __getitem__(self, index):
        batch = self._batches.read(self._order, index)
        return batch.activations, batch.targets, batch.weights

    def on_epoch_end(self):
        self._number += 1
        self._order = self._batches.order(self._number)
