"""What an entry of the feature cache is found by: the content of images, weights and all that shapes the values."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tfxfer.errors import InputError
from tfxfer.runtime.store import RowStore

FORMAT = 1  # raise it when the files of an entry change
KEY = re.compile(r"[0-9a-f]{64}")
_PIECE_BYTES = 4 << 20


def cache_key(**parts: Any) -> str:
    """The name of an entry: equal for equal parts, another where anything differs.

    Args:
        parts: Everything that changes the values: what was computed from which images, with which weights, how.
            JSON values; tuples count as lists, NumPy scalars as Python's.

    Returns:
        64 hexadecimal digits, the SHA-256 of the parts as JSON with sorted names.

    Raises:
        InputError: Where a part has no exact form in JSON (an array, an object, a NaN, a key that is no text).

    Example:
        >>> key = cache_key(source="3f1c", block="block_5", size_px=96)
        >>> key == cache_key(size_px=96, block="block_5", source="3f1c"), key == cache_key(size_px=96)
        (True, False)
    """
    whole = {"format": FORMAT, "parts": {name: json_part(name, part) for name, part in parts.items()}}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def content_digest(arrays: np.ndarray | RowStore | Sequence[np.ndarray | RowStore]) -> str:
    """A fingerprint of arrays by shape, dtype and content, whatever their layout in memory.

    Rows are hashed in pieces of 4 MB, several at once where there is much (hashing leaves Python's lock), then the
    digests of the pieces: neither threads nor memory order show in the result.

    Args:
        arrays: One array or store (N, ...), or several; the same rows split otherwise count as other content.

    Returns:
        64 hexadecimal digits (BLAKE2b, 256 bits).

    Raises:
        InputError: For arrays of objects.

    Example:
        >>> images = np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3)
        >>> content_digest(images) == content_digest(np.asfortranarray(images))
        True
        >>> content_digest(images) == content_digest([images[:2], images[2:]])
        False
    """
    several = [arrays] if isinstance(arrays, np.ndarray | RowStore) else list(arrays)
    digest = hashlib.blake2b(digest_size=32)
    for array in several:
        if array.dtype.hasobject:
            raise InputError("Arrays of objects have no content that could be hashed; convert them to numbers.")
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        for piece in _piece_digests(array if array.shape else np.asarray(array).reshape(1)):
            digest.update(piece)
    return digest.hexdigest()


def check_key(key: str) -> None:
    """Raises InputError for what `cache_key` cannot have given."""
    if not KEY.fullmatch(key):
        raise InputError(f"A key of the feature cache is the 64 hexadecimal digits of cache_key, got {key!r}.")


def json_part(name: str, part: Any) -> Any:
    """`part` as plain JSON values."""
    if isinstance(part, np.generic):
        part = part.item()
    if part is None or isinstance(part, str | bool | int) or (isinstance(part, float) and math.isfinite(part)):
        return part
    if isinstance(part, list | tuple):
        return [json_part(name, value) for value in part]
    if isinstance(part, Mapping) and all(isinstance(key, str) for key in part):
        return {key: json_part(name, value) for key, value in part.items()}
    raise InputError(
        f"{name}: {type(part).__name__} {part!r:.60} has no exact form in JSON; give text, numbers or lists."
    )


def _piece_digests(array: np.ndarray | RowStore) -> list[bytes]:
    row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    step = max(1, _PIECE_BYTES // max(row_bytes, 1))

    def digest(start: int) -> bytes:
        piece = np.ascontiguousarray(array[start : start + step])
        return hashlib.blake2b(piece.reshape(-1).view(np.uint8).data, digest_size=32).digest()

    starts = range(0, len(array), step)
    if len(starts) < 4:  # threads would take longer to start
        return [digest(start) for start in starts]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(digest, starts))
