"""What crosses a cut, for all images in all views: rows in files, read when they are wanted."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfxfer.runtime.store import RowStore

Crossing = np.ndarray | tuple[np.ndarray, ...]


class Activations:
    """Activations of N images in V views: a store for each view and tensor.

    Args:
        views: V tuples of stores, a store of N rows for each tensor that crosses; or `Normalised` pixels.

    Attributes:
        shapes: Of one image, for each tensor.

    Example:
        >>> activations = Activations.of_arrays(np.arange(12.0, dtype=np.float32).reshape(2, 3, 2))
        >>> len(activations), activations[0, [2, 0]].tolist(), activations[np.array([1, 0]), np.array([0, 0])].tolist()
        (2, [[4.0, 5.0], [0.0, 1.0]], [[6.0, 7.0], [0.0, 1.0]])
    """

    def __init__(self, views: Sequence[Sequence[Any]]):
        self.views = tuple(map(tuple, views))
        self.shapes = tuple(store.shape[1:] for store in self.views[0])

    @classmethod
    def of_arrays(cls, *tensors: np.ndarray) -> "Activations":
        """Of (V, N, ...) arrays, one for each tensor; nothing is copied."""
        return cls([[RowStore.of_array(tensor[view]) for tensor in tensors] for view in range(len(tensors[0]))])

    def __len__(self) -> int:
        return len(self.views)

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.views[0][0])

    @property
    def nbytes(self) -> int:
        """Bytes of all views as they are stored."""
        return sum(store.nbytes for stores in self.views for store in stores)

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        """Of each tensor of the first view."""
        return tuple(str(store.stored_dtype) for store in self.views[0])

    def __getitem__(self, index: tuple[Any, Any]) -> Crossing:
        """Rows by (view, rows): view a number or, for each row, an array of them; rows as a `RowStore` takes them.

        Returns:
            float32 (n, ...); a tuple of such where several tensors cross.
        """
        view, rows = index
        if np.ndim(view) == 0:
            found = tuple(store[rows] for store in self.views[int(view)])
        else:
            found = self._of_views(np.asarray(view), np.asarray(rows))
        return found if len(found) > 1 else found[0]

    def _of_views(self, view: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        found = tuple(np.empty((len(rows), *shape), self.views[0][0].dtype) for shape in self.shapes)
        for number in np.unique(view):
            places = np.flatnonzero(view == number)
            for values, store in zip(found, self.views[number], strict=True):
                values[places] = store[rows[places]]
        return found

    def joined(self, others: "Activations") -> "Activations":
        """The views of both, for the same images."""
        return Activations(tuple(itertools.chain(self.views, others.views)))

    def first(self, count: int) -> "Activations":
        """The first `count` views only."""
        return Activations(self.views[:count])
