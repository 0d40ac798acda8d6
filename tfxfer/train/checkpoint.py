"""Checkpoints: named arrays and facts in one file with a checksum, written atomically, the newest two kept."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tfxfer.errors import CheckError
from tfxfer.runtime.files import atomic_path

MAGIC = b"tfxfer checkpoint 1\n"
KEEP = 2
_DIGEST_BYTES = 32
_HEADER_LIMIT_BYTES = 64 * 2**20
_NAME = re.compile(r"(\d{6,})\.checkpoint")


def write_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write arrays and facts as one file; whatever happens, `path` is the old file or the new one, whole.

    The file: a magic line, the length of the header (8 bytes), the header (JSON: names, types and shapes of the
    arrays, and the facts), the arrays, the SHA-256 of all that.

    Args:
        path: The file.
        arrays: By name; any type with a fixed size.
        facts: What JSON can hold; floats come back as they were.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.checkpoint"
        >>> write_checkpoint(file, {"kernel": np.ones((2, 2), "float32")}, {"step": 7})
        >>> arrays, facts = read_checkpoint(file)
        >>> arrays["kernel"].shape, facts["step"]
        ((2, 2), 7)
    """
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    rows = [[name, array.dtype.name, list(array.shape)] for name, array in plain.items()]
    header = json.dumps({"arrays": rows, "facts": dict(facts)}).encode()
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        digest = hashlib.sha256()
        for part in (MAGIC, len(header).to_bytes(8, "little"), header):
            _put(file, digest, part)
        for array in plain.values():
            _put(file, digest, np.ascontiguousarray(array).tobytes())
        file.write(digest.digest())


def read_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and facts of a file of `write_checkpoint`.

    Raises:
        CheckError: Where it is damaged, cut short or none; nothing of it is used then.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            _check_digest(path, file)
            file.seek(len(MAGIC))
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            arrays = {}
            for name, dtype, shape in header["arrays"]:
                kind = _dtype(dtype)
                count = int(np.prod(shape, dtype=np.int64))
                content = file.read(count * kind.itemsize)
                arrays[name] = np.frombuffer(content, kind, count).reshape(shape).copy()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"{path} cannot be read as a checkpoint: {error}") from None
    return arrays, header["facts"]


class Checkpoints:
    """The checkpoints in a folder, numbered; the newest `KEEP` stay.

    Args:
        folder: Made where it is missing.

    Example:
        >>> import tempfile
        >>> kept = Checkpoints(Path(tempfile.mkdtemp()))
        >>> for step in (1, 2, 3):
        ...     kept.save({"w": np.full(2, step)}, {"step": step})
        >>> kept.latest()[1]["step"], len(list(kept.folder.iterdir()))
        (3, 2)
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._next = max(self._numbers(), default=0) + 1

    def save(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write the next one, then drop those beyond the newest two.

        Raises:
            OSError: Where it cannot be written; those that are there stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(self._path(self._next), arrays, facts)
        self._next += 1
        for number in sorted(self._numbers())[:-KEEP]:
            self._path(number).unlink(missing_ok=True)

    def latest(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest that is sound; None where there is none."""
        for number in sorted(self._numbers(), reverse=True):
            with contextlib.suppress(CheckError):
                return read_checkpoint(self._path(number))
        return None

    def clear(self) -> None:
        """Remove them all: what they led to is finished."""
        for number in self._numbers():
            self._path(number).unlink(missing_ok=True)

    def _numbers(self) -> Iterator[int]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return (int(match[1]) for match in (_NAME.fullmatch(path.name) for path in found) if match)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.checkpoint"


def _put(file: BinaryIO, digest: Any, content: bytes) -> None:
    digest.update(content)
    file.write(content)


def _check_digest(path: Path, file: BinaryIO) -> None:
    size = path.stat().st_size
    if size < len(MAGIC) + 8 + _DIGEST_BYTES or file.read(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin as one.")
    if int.from_bytes(file.read(8), "little") > min(size, _HEADER_LIMIT_BYTES):
        raise ValueError("its header is longer than the file.")
    digest, left = hashlib.sha256(), size - _DIGEST_BYTES
    file.seek(0)
    while left:
        content = file.read(min(left, 2**20))
        if not content:
            raise ValueError("it ends too early.")
        digest.update(content)
        left -= len(content)
    if file.read() != digest.digest():
        raise ValueError("its checksum differs: it was damaged or cut short.")


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
