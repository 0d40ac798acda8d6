"""Features that lie in files, picked and joined without being read: rows when they are wanted, in blocks of rows."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tfxfer.features.activations import Activations
from tfxfer.runtime.store import Rows, RowStore

BLOCK_BYTES = 8_000_000


def row_blocks(num_rows: int, width: int) -> Iterator[slice]:
    """Slices of rows that take about 8 MB each in float32.

    Example:
        >>> list(row_blocks(3, 1_000_000))
        [slice(0, 2, None), slice(2, 3, None)]
    """
    step = max(1, BLOCK_BYTES // (4 * max(width, 1)))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def room_for(shape: tuple[int, int]) -> RowStore:
    """For rows of float32 that are to be written: in memory where they are one block, else in a temporary file."""
    return RowStore.in_memory(shape) if 4 * shape[0] * shape[1] <= BLOCK_BYTES else RowStore.temporary(shape)


class Picked:
    """Some rows, or some columns, or both, of features; read when they are asked for.

    Args:
        features: (N, D), anything that gives (n, D) for rows.
        rows: Numbers of the rows; all by default.
        columns: Numbers of the columns; all by default.

    Example:
        >>> found = Picked(np.arange(6.0).reshape(2, 3), columns=np.array([0, 2]))
        >>> found.shape, found[np.array([1])].tolist()
        ((2, 2), [[3.0, 5.0]])
    """

    def __init__(self, features: Any, rows: np.ndarray | None = None, columns: np.ndarray | None = None):
        self.features, self.rows, self.columns = features, rows, columns
        num, width = features.shape
        self.shape = (num if rows is None else len(rows), width if columns is None else len(columns))
        self.dtype = features.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        found = self.features[rows if self.rows is None else self.rows[rows]]
        return found if self.columns is None else found[..., self.columns]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class Stacked:
    """The rows of several, one after the other, as one.

    Example:
        >>> both = Stacked([np.array([[1.0], [2.0]]), np.array([[3.0]])])
        >>> both.shape, both[np.array([2, 0])].tolist(), both[1:].tolist()
        ((3, 1), [[3.0], [1.0]], [[2.0], [3.0]])
    """

    def __init__(self, parts: Sequence[Rows]):
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])
        self.shape, self.dtype = (int(self._ends[-1]), *self.parts[0].shape[1:]), self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        numbers = np.arange(len(self))[rows]
        wanted = np.atleast_1d(numbers)
        of_part = np.searchsorted(self._ends, wanted, side="right")
        touched = np.unique(of_part)
        if len(touched) == 1:
            found = self._read(int(touched[0]), wanted)
        else:
            found = np.empty((len(wanted), *self.shape[1:]), self.dtype)
            for part in touched.tolist():
                places = np.flatnonzero(of_part == part)
                found[places] = self._read(part, wanted[places])
        return found if np.ndim(numbers) else found[0]

    def _read(self, part: int, numbers: np.ndarray) -> np.ndarray:
        return self.parts[part][numbers - (self._ends[part - 1] if part else 0)]


class ViewFeatures:
    """(V, N, D) features of N images in V views, each view in a file or an array of its own.

    Args:
        views: V times (N, D).

    Example:
        >>> found = ViewFeatures([np.zeros((4, 2)), np.ones((4, 2))])
        >>> found.shape, found[1][:1].tolist(), found.flat[np.array([7])].tolist(), np.asarray(found).shape
        ((2, 4, 2), [[1.0, 1.0]], [[1.0, 1.0]], (2, 4, 2))
    """

    def __init__(self, views: Sequence[Rows]):
        self.views: tuple[Any, ...] = tuple(views)
        self.shape, self.dtype = (len(self.views), *self.views[0].shape), self.views[0].dtype

    @classmethod
    def of(cls, features: Any) -> "ViewFeatures":
        """Of a (V, N, D) array, which is not copied; itself where it is one already."""
        return features if isinstance(features, cls) else cls(list(features))

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: Any) -> Any:
        """The rows of a view, unread, by its number; or (n, D) by (view, rows): a number or, for each row, an array."""
        if not isinstance(index, tuple):
            return self.views[index]
        view, rows = index
        return self.flat[np.asarray(view) * self.shape[1] + np.asarray(rows)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(view[:], dtype) for view in self.views])

    def as_activations(self) -> Activations:
        """The same as what crosses a cut behind the last block."""
        return Activations([(view,) for view in self.views])

    @functools.cached_property
    def flat(self) -> Rows:
        """(V * N, D): all images in the first view, then all in the second, and so on."""
        return self.views[0] if len(self.views) == 1 else Stacked(self.views)

    def first(self, count: int) -> "ViewFeatures":
        """The first `count` views only."""
        return ViewFeatures(self.views[:count])

    def joined(self, others: "ViewFeatures") -> "ViewFeatures":
        """The views of both, for the same images."""
        return ViewFeatures(self.views + others.views)

    def picked(self, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> "ViewFeatures":
        """Some images, or some features, in all views."""
        return ViewFeatures([Picked(view, rows, columns) for view in self.views])
