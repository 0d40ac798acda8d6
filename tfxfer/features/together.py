"""Several engines of the same function as one, each with a share of every batch."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tfxfer.features.extract import Engine


class Together:
    """Engines that compute at the same time: the first in this thread, each other in one of its own.

    Args:
        engines: At least one, all of the same function.

    Example:
        >>> both = Together([lambda images: (images + 1,), lambda images: (images + 1,)])
        >>> both(np.arange(3))[0].tolist()
        [1, 2, 3]
    """

    def __init__(self, engines: Sequence[Engine]):
        self.engines = tuple(engines)
        self._pool = ThreadPoolExecutor(max(len(self.engines) - 1, 1))

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = [part for part in np.array_split(images, len(self.engines)) if len(part)]
        others = [self._pool.submit(engine, part) for engine, part in zip(self.engines[1:], parts[1:], strict=False)]
        found = [self.engines[0](parts[0]), *(other.result() for other in others)]
        return tuple(np.concatenate(outputs) for outputs in zip(*found, strict=True))
