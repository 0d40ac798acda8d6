"""The pixels of a part, in a file: decoded once, when they are first read, and never all in memory."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL

from tfxfer.data.audit import open_content
from tfxfer.data.items import Content
from tfxfer.runtime.images import map_threads, resize_square
from tfxfer.runtime.store import RowStore

DECODER = 1  # raise it when the same file would give other pixels


class PixelRows:
    """(N, S, S, 3) uint8, read by row numbers as an array is.

    Args:
        store: Where pixels are or will be.
        rows: (N,) the store's row of each image.
        sha256: (N,) of the images' content.
        contents: Of images that are not decoded yet; none: all are in the store. They are decoded on all cores when
            they are read.

    Example:
        >>> store = RowStore.of_array(np.arange(12, dtype=np.uint8).reshape(4, 1, 1, 3))
        >>> pixels = PixelRows(store, np.array([3, 1]), ("a", "b"))
        >>> pixels.shape, pixels[0].tolist(), pixels[:].shape
        ((2, 1, 1, 3), [[[9, 10, 11]]], (2, 1, 1, 3))
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, store: RowStore, rows: np.ndarray, sha256: Sequence[str], contents: Sequence[Content] | None = None
    ):
        self._store, self._rows, self._sha256 = store, np.asarray(rows), tuple(sha256)
        self._contents, self._waiting = contents, np.full(len(self._rows), contents is not None)
        self.shape = (len(self._rows), *store.shape[1:])

    @classmethod
    def of_contents(cls, contents: Sequence[Content], sha256: Sequence[str], size_px: int) -> "PixelRows":
        """Images that are decoded when they are read."""
        store = RowStore.temporary((len(contents), size_px, size_px, 3), "uint8")
        return cls(store, np.arange(len(contents)), sha256, contents)

    @property
    def digest(self) -> str:
        """Of the pixels, without reading them: of the files, the size and the decoder."""
        told = f"{DECODER}\n{PIL.__version__}\n{self.shape}\n" + "\n".join(self._sha256)
        return hashlib.sha256(told.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, picked: Any) -> np.ndarray:
        """Rows by an int, a slice or an array of ints."""
        numbers = np.arange(len(self))[picked]
        self._decode(np.atleast_1d(numbers))
        return self._store[self._rows[numbers]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _decode(self, numbers: np.ndarray) -> None:
        missing = numbers[self._waiting[numbers]]
        if not len(missing):
            return
        assert self._contents is not None
        contents, size_px = self._contents, self.shape[1]

        def take(number: int) -> None:
            image = resize_square(open_content(contents[number])[1], size_px)
            self._store.write(int(self._rows[number]), np.asarray(image)[None])
            self._waiting[number] = False

        for _ in map_threads(take, missing.tolist()):
            pass
