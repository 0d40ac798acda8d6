"""The file behind a store of rows: an ordinary `.npy` file, read and written by position."""

import contextlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from tfxfer.errors import CheckError, InputError

STORED_DTYPES = ("float32", "float16", "uint8")
_BUFFERS_A_READ = os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 16


class RowFile:
    """An open file with a header and N rows of the same number of bytes.

    Args:
        file: Unbuffered.
        path: For messages; None for a temporary file.
        data_offset: Of the first row, in bytes.
        row_bytes: Of a row.
    """

    def __init__(self, file: BinaryIO, path: Path | None, data_offset: int, row_bytes: int):
        self._file, self._path, self._offset, self._row_bytes = file, path, data_offset, row_bytes

    def reserve(self, num_rows: int) -> None:
        """Give the file its length, so that rows can be written in any order."""
        with self._named_errors():
            os.ftruncate(self._file.fileno(), self._offset + num_rows * self._row_bytes)

    def write(self, start: int, rows: np.ndarray) -> None:
        """Write contiguous rows from number `start` on."""
        if rows.size:
            self._write_at(rows.reshape(-1).view(np.uint8).data, self._offset + start * self._row_bytes)

    def write_header(self, header: bytes) -> None:
        """Write what makes a `.npy` file of it."""
        self._write_at(memoryview(header), 0)

    def sync(self) -> None:
        """Force to the disk what was written."""
        with self._named_errors():
            os.fsync(self._file.fileno())

    def read(self, numbers: np.ndarray, found: np.ndarray) -> None:
        """Read each row once, neighbours of the file together, each straight to its place in `found`.

        Args:
            numbers: (n,) int64, 0 to N - 1, in any order, with duplicates.
            found: (n, ...) contiguous, of the file's dtype.
        """
        if not found.size:
            return
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
        descriptor = self._file.fileno()
        with self._named_errors():
            for offset, buffers in reads:
                while buffers:
                    done = os.preadv(descriptor, buffers[:_BUFFERS_A_READ], offset)
                    if done == 0:
                        name = self._path or "The store"
                        raise CheckError(f"{name} is truncated at byte {offset}; make it again.")
                    offset += done
                    buffers = _after(buffers, done)

    def _write_at(self, data: memoryview, offset: int) -> None:
        with self._named_errors():
            while data:  # a disk about to be full takes a part, and refuses the rest
                done = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[done:], offset + done

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of the disk say which file; those of a bare descriptor do not."""
        try:
            yield
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            name = str(self._path) if self._path else None
            raise OSError(error.errno, os.strerror(error.errno), name) from error


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left to fill: one call fills so many buffers and 2 GB at most, and may do less."""
    for position, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[position + 1 :]]
        done -= len(buffer)
    return []


def row_bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of one row of (N, ...)."""
    return math.prod(shape[1:]) * dtype.itemsize


def stored_dtype(dtype: DTypeLike) -> np.dtype:
    """As a dtype, where it is one of `STORED_DTYPES`."""
    found = np.dtype(dtype)
    if found not in [np.dtype(name) for name in STORED_DTYPES]:
        raise InputError(f"A store holds {', '.join(STORED_DTYPES)}, not {found}.")
    return found


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(N, ...) as a tuple of Python ints."""
    found = tuple(int(size) for size in shape)
    if not found or min(found) < 0:
        raise InputError(f"A store needs a shape (N, ...) of whole numbers from 0 up, got {found}.")
    return found


def header_of(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What a `.npy` file of such rows begins with."""
    buffer = io.BytesIO()
    description = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def read_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
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
