"""Rows of features in a file: written in any order, read by position into arrays, never mapped into memory."""

import bisect
import contextlib
import io
import math
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, DTypeLike

from tfxfer.errors import CheckError, InputError

STORED_DTYPES = ("float32", "float16", "uint8")
FLOAT16_HEADROOM = 8  # values yet to come may be so many times as large as the largest of the sample
_BUFFERS_A_READ = os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 16


class TooLargeForFloat16(CheckError):
    """A finite value would become infinite in a float16 store; float32 holds it."""


class RowStore:
    """N rows of one shape and dtype, in a file or in memory.

    The file is an ordinary `.npy` file that `np.load` reads. Its header is written last, by the `flush` that finds
    all rows there: a file that was left half-written cannot be taken for a whole one. Rows are read by position into
    new arrays; mapped pages would count as memory of the process and grow with N.

    Made by `create`, `open`, `temporary` and `in_memory`. Reads, and writes of disjoint rows, may run in several
    threads. The file is closed with the last reference.

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
        file: BinaryIO | None = None,
        path: Path | None = None,
        data_offset: int = 0,
        read_as: DTypeLike | None = None,
    ):
        self.shape = _checked_shape(shape)
        self.stored_dtype = _stored_dtype(dtype)
        self.read_as = read_as
        self.path = path
        self.keep: Any = None
        self._header = _header(self.shape, self.stored_dtype)
        self._offset = data_offset or len(self._header)
        self._array = np.empty(self.shape, self.stored_dtype) if file is None else None
        self._file = file
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
        _checked_shape(shape), _stored_dtype(dtype)  # an error before there is a file
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
        _checked_shape(shape), _stored_dtype(dtype)
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
            shape, dtype, offset = _read_header(file, path)
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
        found = _checked_shape(shape)
        stored = _stored_dtype(dtype)
        return len(_header(found, stored)) + math.prod(found) * stored.itemsize

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
        elif stored.size:
            self._write_at(stored.reshape(-1).view(np.uint8).data, self._offset + start * self._row_bytes)
        self._mark(start, stop)

    def flush(self) -> None:
        """Force to the disk what was written; the first time that all rows are there, also the header.

        From then on the file is finished: it can be opened, and no longer be written.
        """
        if self._file is None:
            return
        with self._named_errors():
            os.fsync(self._file.fileno())
            if self.complete and not self._finished:
                self._write_at(memoryview(self._header), 0)
                os.fsync(self._file.fileno())
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

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.stored_dtype.itemsize

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of the disk say which file; those of a bare descriptor do not."""
        try:
            yield
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(self.path) if self.path else None) from error

    def _reserve(self) -> None:
        """Give the file its length, so that rows can be written in any order."""
        assert self._file is not None
        with self._named_errors():
            os.ftruncate(self._file.fileno(), self._offset + self.nbytes)

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

    def _write_at(self, data: memoryview, offset: int) -> None:
        assert self._file is not None
        with self._named_errors():
            while data:  # a disk about to be full takes a part, and refuses the rest
                done = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[done:], offset + done

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
        elif found.size:
            self._gather(numbers, found)
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

    def _gather(self, numbers: np.ndarray, found: np.ndarray) -> None:
        """Read each row once, neighbours of the file together, each straight to its place in `found`."""
        rows, places, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        raw = found.reshape(-1).view(np.uint8).data
        size = self._row_bytes
        neighbours = np.diff(rows) == 1
        cuts = np.flatnonzero(~(neighbours & (np.diff(places) == 1))) + 1
        edges = np.concatenate([[0], cuts, [len(rows)]])
        reads: list[tuple[int, list[memoryview]]] = []
        for row, place, count, goes_on in zip(
            rows[edges[:-1]].tolist(),
            places[edges[:-1]].tolist(),
            np.diff(edges).tolist(),
            [False, *neighbours[cuts - 1].tolist()],
            strict=True,
        ):
            buffer = raw[place * size : (place + count) * size]
            if goes_on:
                reads[-1][1].append(buffer)
            else:
                reads.append((self._offset + row * size, [buffer]))
        self._read_all(reads)
        if len(rows) < len(numbers):
            source = places[inverse]
            again = np.flatnonzero(source != np.arange(len(numbers)))
            found[again] = found[source[again]]

    def _read_all(self, reads: list[tuple[int, list[memoryview]]]) -> None:
        """For each (offset, buffers) fill one buffer after the other from the file."""
        assert self._file is not None
        descriptor = self._file.fileno()
        with self._named_errors():
            for offset, buffers in reads:
                while buffers:
                    done = os.preadv(descriptor, buffers[:_BUFFERS_A_READ], offset)
                    if done == 0:
                        raise CheckError(f"{self._name} is truncated at byte {offset}; make it again.")
                    offset += done
                    buffers = _after(buffers, done)


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left to fill: one call fills so many buffers and 2 GB at most, and may do less."""
    for position, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[position + 1 :]]
        done -= len(buffer)
    return []


def choose_dtype(sample: ArrayLike, tolerance: float = 1e-3) -> str:
    """Whether float16 is good enough for values like these; halves what a store takes on disk.

    The rule, measured on the sample, channel by channel (the last axis): the root mean square error of rounding to
    float16 is at most `tolerance` of the channel's standard deviation, since what a channel tells is how it varies,
    not its level. A channel that does not move (by a millionth of the most moving one) is measured against the most
    moving one. And no value passes an eighth of float16's largest, 65504, so that images outside the sample may have
    larger ones. What is not finite asks for float32.

    Args:
        sample: (n, ...) real numbers, from rows of different images.
        tolerance: Above 0. Rounding alone gives about 2e-4 of a value, so that the default 1e-3 admits channels
            whose level is up to about four times their deviation.

    Returns:
        "float16" or "float32".

    Example:
        >>> rng = np.random.default_rng(0)
        >>> features = rng.normal(size=(100, 8))
        >>> choose_dtype(features), choose_dtype(features + 100), choose_dtype(features * 1e5)
        ('float16', 'float32', 'float32')
    """
    values = np.asarray(sample, np.float64)
    if not values.size or not np.isfinite(values).all():
        return "float32"
    if np.abs(values).max() * FLOAT16_HEADROOM > np.finfo(np.float16).max:
        return "float32"
    channels = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    error = np.sqrt(((channels - channels.astype(np.float16)) ** 2).mean(0))
    spread = channels.std(0)
    scale = np.where(spread > 1e-6 * spread.max(), spread, spread.max())
    return "float16" if bool((error <= tolerance * scale).all()) else "float32"


def _stored_dtype(dtype: DTypeLike) -> np.dtype:
    found = np.dtype(dtype)
    if found not in [np.dtype(name) for name in STORED_DTYPES]:
        raise InputError(f"A store holds {', '.join(STORED_DTYPES)}, not {found}.")
    return found


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    found = tuple(int(size) for size in shape)
    if not found or min(found) < 0:
        raise InputError(f"A store needs a shape (N, ...) of whole numbers from 0 up, got {found}.")
    return found


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _read_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and the offset of the first row."""
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(file)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # NumPy reads it as Python, and whatever that says comes through
        raise InputError(f"{path} is not a finished store: it has no .npy header; make it again.") from error
    if by_columns or not shape or dtype not in [np.dtype(name) for name in STORED_DTYPES]:
        raise InputError(f"{path} is a .npy file, but not of rows in {', '.join(STORED_DTYPES)}.")
    return shape, dtype, file.tell()
