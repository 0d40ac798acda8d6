"""Rows of features in a file: written in any order, read by position into arrays, never mapped into memory."""

import bisect
import math
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tfxfer.errors import CheckError, InputError
from tfxfer.runtime.row_file import (
    RowFile,
    checked_shape,
    header_of,
    read_header,
    row_bytes_of,
    stored_dtype,
)


class Rows(Protocol):
    """What row numbers pick arrays from: an array, a `RowStore`, decoded pixels."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class TooLargeForFloat16(CheckError):
    """A finite value would become infinite in a float16 store; float32 holds it."""


class RowStore:
    """N rows of one shape and dtype, in a file or in memory.

    The file is an ordinary `.npy` file that `np.load` reads. Its header is written last, by the `flush` that finds
    all rows there: a file that was left half-written cannot be taken for a whole one. Rows are read by position into
    new arrays; mapped pages would count as memory of the process and grow with N.

    Made by `create`, `open`, `temporary`, `in_memory` and `of_array`. Reads, and writes of disjoint rows,
    may run in several threads. The file is closed with the last reference.

    Attributes:
        shape: (N, ...).
        stored_dtype: On disk, one of `STORED_DTYPES`.
        read_as: The dtype that reading gives instead, such as "float32" for a float16 store; may be set at any time.
        path: Of the file; None in memory and for a temporary file.
        keep: Any object that is to live as long as this store.

    Example:
        >>> store = RowStore.in_memory((4, 2), "float16")
        >>> store.write(2, np.array([[5, 6], [7, 8]]))
        >>> store.complete
        False
        >>> store.write(0, np.array([[1, 2], [3, 4]]))
        >>> store[[3, 0, 3]].tolist()
        [[7.0, 8.0], [1.0, 2.0], [7.0, 8.0]]
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: DTypeLike,
        *,
        array: np.ndarray | None = None,
        file: BinaryIO | None = None,
        path: Path | None = None,
        data_offset: int = 0,
        read_as: DTypeLike | None = None,
    ):
        self.shape = checked_shape(shape)
        self.stored_dtype = stored_dtype(dtype)
        self.read_as = read_as
        self.path = path
        self.keep: Any = None
        self._header = header_of(self.shape, self.stored_dtype)
        self._array = np.empty(self.shape, self.stored_dtype) if array is None and file is None else array
        row_bytes = row_bytes_of(self.shape, self.stored_dtype)
        self._file = None if file is None else RowFile(file, path, data_offset or len(self._header), row_bytes)
        self._finished = False  # the header is there: the file is as it will stay
        self._written: list[tuple[int, int]] = []  # disjoint, ascending, never touching
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, file.close) if file is not None else None

    @classmethod
    def create(
        cls, path: str | Path, shape: Sequence[int], dtype: DTypeLike = "float32", *, read_as: DTypeLike | None = None
    ) -> "RowStore":
        """A store in a new file; one that stands at `path` is overwritten.

        Args:
            path: Of the file, usually ending in `.npy`; its folder must exist.
            shape: (N, ...), N known from the start.
            dtype: On disk: "float32", "float16" or "uint8".
            read_as: See the class.

        Raises:
            OSError: Where the file cannot be made.
        """
        checked_shape(shape), stored_dtype(dtype)  # an error before there is a file
        file = Path(path).open("w+b", buffering=0)  # noqa: SIM115 (the store closes it)
        store = cls(shape, dtype, file=file, path=Path(path), read_as=read_as)
        store._reserve()
        return store

    @classmethod
    def temporary(
        cls,
        shape: Sequence[int],
        dtype: DTypeLike = "float32",
        *,
        folder: str | Path | None = None,
        read_as: DTypeLike | None = None,
    ) -> "RowStore":
        """A store in a file without a name, gone with the store or the process, however that ends.

        Args:
            shape: (N, ...).
            dtype: On disk.
            folder: Where the bytes are; the system's temporary folder (`TMPDIR`) by default.
            read_as: See the class.
        """
        checked_shape(shape), stored_dtype(dtype)
        file = tempfile.TemporaryFile(dir=folder, prefix="tfxfer-", buffering=0)  # noqa: SIM115 (the store closes it)
        store = cls(shape, dtype, file=file, read_as=read_as)  # type: ignore[arg-type]
        store._reserve()
        return store

    @classmethod
    def in_memory(
        cls, shape: Sequence[int], dtype: DTypeLike = "float32", *, read_as: DTypeLike | None = None
    ) -> "RowStore":
        """A store in an array, for small data."""
        return cls(shape, dtype, read_as=read_as)

    @classmethod
    def of_array(cls, rows: np.ndarray) -> "RowStore":
        """A finished store of rows that are in memory already; they are not copied."""
        store = cls(rows.shape, rows.dtype, array=rows)
        store._mark(0, len(store))
        store._finished = True
        return store

    @classmethod
    def open(cls, path: str | Path, *, read_as: DTypeLike | None = None) -> "RowStore":
        """A finished store, for reading.

        Raises:
            InputError: Where the file is not there, or not a whole `.npy` file of rows in one of `STORED_DTYPES`.
            CheckError: Where it is shorter or longer than its header says.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"There is no store {path}.")
        file = path.open("rb", buffering=0)
        try:
            shape, dtype, offset = read_header(file, path)
            store = cls(shape, dtype, file=file, path=path, data_offset=offset, read_as=read_as)
        except BaseException:
            file.close()
            raise
        size = os.fstat(file.fileno()).st_size
        if size != offset + store.nbytes:
            raise CheckError(f"{path} is damaged: {size} bytes, {offset + store.nbytes} expected; make it again.")
        store._written = [(0, len(store))]
        store._finished = True
        return store

    @staticmethod
    def file_bytes(shape: Sequence[int], dtype: DTypeLike) -> int:
        """The size of the file of such a store.

        Example:
            >>> RowStore.file_bytes((10, 4), "float16")
            208
        """
        found = checked_shape(shape)
        stored = stored_dtype(dtype)
        return len(header_of(found, stored)) + math.prod(found) * stored.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        where = self.path or ("memory" if self._array is not None else "temporary file")
        return f"RowStore({self.shape}, {str(self.stored_dtype)!r}, {str(where)!r})"

    @property
    def dtype(self) -> np.dtype:
        """Of the arrays that reading gives."""
        return np.dtype(self.stored_dtype if self.read_as is None else self.read_as)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as they are stored."""
        return math.prod(self.shape) * self.stored_dtype.itemsize

    @property
    def num_missing(self) -> int:
        """Rows that were never written."""
        with self._lock:
            return len(self) - sum(stop - start for start, stop in self._written)

    @property
    def complete(self) -> bool:
        """Whether every row was written."""
        return self.num_missing == 0

    def write(self, start: int, rows: ArrayLike) -> None:
        """Write rows `start`, `start + 1`, and so on; a row may be written again until the store is finished.

        Args:
            start: The first row's number.
            rows: (n, ...) of the store's row shape: uint8 for uint8, any real numbers for floats.

        Raises:
            InputError: Where shape, dtype or range do not fit, or the store is finished.
            TooLargeForFloat16: Where a finite value would become infinite. Nothing is written.
            OSError: Where the disk refuses; its `filename` is the store's.
        """
        rows = np.asarray(rows)
        if self._finished:
            raise InputError(f"{self._name} is finished and can only be read; create it anew to write.")
        if rows.ndim != len(self.shape) or rows.shape[1:] != self.shape[1:]:
            raise InputError(f"Rows of {self._name} have the shape {self.shape[1:]}, got an array {rows.shape}.")
        stop = start + len(rows)
        if not 0 <= start <= stop <= len(self):
            raise InputError(f"Rows {start} to {stop} are not within the {len(self)} of {self._name}.")
        stored = self._as_stored(rows)
        if self._array is not None:
            self._array[start:stop] = stored
        elif self._file is not None:
            self._file.write(start, stored)
        self._mark(start, stop)

    def flush(self) -> None:
        """Force to the disk what was written; the first time that all rows are there, also the header.

        From then on the file is finished: it can be opened, and no longer be written.
        """
        if self._file is None:
            return
        self._file.sync()
        if self.complete and not self._finished:
            self._file.write_header(self._header)
            self._file.sync()
            self._finished = True

    def close(self) -> None:
        """Close the file; reading and writing are over. What was not flushed may be lost."""
        if self._close is not None:
            self._close()

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Rows by number, as a new array.

        Args:
            rows: An int (gives one row, without the first axis), a slice, or a 1-D int array in any order, with
                duplicates; negative numbers count from the end.

        Raises:
            IndexError: Where a number is outside, or `rows` is something else (a mask, several axes).
            CheckError: Where a row was never written, or the file ends before it.
        """
        if isinstance(rows, int | np.integer) and not isinstance(rows, bool):
            return self._read(self._numbers(np.array([rows])))[0]
        if isinstance(rows, slice):
            return self._read(np.arange(*rows.indices(len(self))))
        return self._read(self._numbers(rows))

    # --- below: how it is done ---

    @property
    def _name(self) -> str:
        return str(self.path) if self.path else "The store"

    def _reserve(self) -> None:
        assert self._file is not None
        self._file.reserve(len(self))

    def _as_stored(self, rows: np.ndarray) -> np.ndarray:
        if rows.dtype == self.stored_dtype:
            return np.ascontiguousarray(rows)
        if self.stored_dtype == np.uint8 or rows.dtype.kind not in "fiu":
            raise InputError(f"{self._name} holds {self.stored_dtype}, got {rows.dtype}.")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, self.stored_dtype)
        if not np.isfinite(stored).all() and bool((np.isinf(stored) & np.isfinite(rows)).any()):
            largest = np.abs(rows[np.isfinite(rows)]).max()
            raise TooLargeForFloat16(f"{self._name} holds {self.stored_dtype}; {largest:.6g} is beyond its range.")
        return stored

    def _mark(self, start: int, stop: int) -> None:
        """Note rows as written, joined with the ranges they touch."""
        if start == stop:
            return
        with self._lock:
            first = bisect.bisect_left(self._written, start, key=lambda known: known[1])
            last = bisect.bisect_right(self._written, stop, key=lambda known: known[0])
            touched = self._written[first:last]
            joined = (min([start, *(a for a, _ in touched)]), max([stop, *(b for _, b in touched)]))
            self._written[first:last] = [joined]

    def _numbers(self, rows: Any) -> np.ndarray:
        """Row numbers from 0 to N - 1, as int64."""
        numbers = np.asarray(rows)
        if isinstance(rows, tuple) or numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise IndexError("Rows are an int, a slice or a 1-D array of ints.")
        numbers = numbers.astype(np.int64)
        outside = (numbers < -len(self)) | (numbers >= len(self))
        if outside.any():
            raise IndexError(f"Row {numbers[outside][0]} is not within the {len(self)} of {self._name}.")
        return np.where(numbers < 0, numbers + len(self), numbers)

    def _read(self, numbers: np.ndarray) -> np.ndarray:
        found = np.empty((len(numbers), *self.shape[1:]), self.stored_dtype)
        self._check_written(numbers)
        if self._array is not None:
            np.take(self._array, numbers, axis=0, out=found)
        elif self._file is not None:
            self._file.read(numbers, found)
        return found.astype(self.dtype, copy=False)

    def _check_written(self, numbers: np.ndarray) -> None:
        if self.complete:
            return
        with self._lock:
            ranges = np.array(self._written, np.int64).reshape(-1, 2)
        place = np.searchsorted(ranges[:, 0], numbers, side="right") - 1
        known = (place >= 0) & (numbers < np.append(ranges[:, 1], 0)[place])
        if not known.all():
            raise CheckError(f"Row {numbers[~known][0]} of {self._name} was never written.")
