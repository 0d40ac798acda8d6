"""The disk cache of feature stores: keyed by content, bounded, least recently used first out, safe for processes."""

import contextlib
import dataclasses
import errno
import functools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfxfer.errors import CheckError, InputError
from tfxfer.features.entry import USED, Entry, check_files, finish, meta_text, open_entry, touch
from tfxfer.features.keys import check_key
from tfxfer.features.shelf import MOMENT_SECONDS, CacheFull, Shelf, refusals_of, size_of
from tfxfer.runtime import locks
from tfxfer.runtime.files import cache_dir
from tfxfer.runtime.store import RowStore

DEFAULT_MAX_BYTES = 20_000_000_000
_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class CacheWarning(UserWarning):
    """The feature cache cannot be used, or an entry in it was damaged: costs time, never correctness."""


def parse_bytes(text: str | float) -> int:
    """A number of bytes as people write it.

    Args:
        text: A number from 0 up, or one with a unit: kB, MB, GB, TB, KiB, MiB, GiB, in any case.

    Raises:
        InputError: Where it is something else.

    Example:
        >>> parse_bytes("20GB"), parse_bytes("1.5 MiB"), parse_bytes("0"), parse_bytes(700)
        (20000000000, 1572864, 0, 700)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if not found or found[2] not in _UNITS:
        raise InputError(f"A cache size is a number of bytes such as 20GB, 500MB or 0 (no cache), got {text!r}.")
    return int(float(found[1]) * _UNITS[found[2]])


@dataclasses.dataclass(eq=False)
class Filling:
    """What `FeatureCache.fill` yields.

    Attributes:
        stores: To be written, by name; empty where `entry` is there already.
        entry: The entry: another process has made it meanwhile, or this block has ended and published it.
    """

    stores: dict[str, RowStore]
    entry: Entry | None = None


class FeatureCache:
    """Stores of features on disk, found again by what they were computed from.

    Any number of objects, threads and processes may use one folder at the same time; `Shelf` says how.

    Args:
        folder: Of the entries; `features` in the cache folder (`TFXFER_CACHE`) by default.
        max_bytes: Bound of what is kept, 0 for no cache; by default `TFXFER_CACHE_BYTES`, else the smaller of 20 GB
            and a tenth of the disk space that is free or taken by the cache itself.

    Example:
        >>> import numpy as np, tempfile
        >>> from tfxfer.features.keys import cache_key
        >>> folder = tempfile.TemporaryDirectory()
        >>> cache = FeatureCache(folder.name, "1MB")
        >>> key = cache_key(images="77ab", block="block_5")
        >>> def compute(stores):
        ...     print("computing")
        ...     stores["features"].write(0, np.ones((3, 2)))
        >>> for _ in range(2):
        ...     with cache.get_or_fill(key, {"features": ((3, 2), "float16")}, {"views": 1}, compute) as entry:
        ...         print(entry.stores["features"][[2]], entry.meta)
        computing
        [[1. 1.]] {'views': 1}
        [[1. 1.]] {'views': 1}
        >>> folder.cleanup()
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int | str | None = None):
        limit = os.environ.get("TFXFER_CACHE_BYTES") or None if max_bytes is None else max_bytes
        self._limit = None if limit is None else parse_bytes(limit)
        self._given_folder = folder

    @functools.cached_property
    def folder(self) -> Path:
        """Where the entries are."""
        return (cache_dir() / "features" if self._given_folder is None else Path(self._given_folder)).absolute()

    @functools.cached_property
    def _shelf(self) -> Shelf:
        return Shelf(self.folder)

    @functools.cached_property
    def available(self) -> bool:
        """Whether entries can be kept; warns once where the folder does not allow it."""
        if self._limit == 0:
            return False
        try:
            if not locks.AVAILABLE:
                raise OSError("this system has no file locks")
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, "the folder cannot be written", str(self.folder))
            lock = locks.take_lock(self.folder / ".lock", wait_seconds=MOMENT_SECONDS)
            if lock is None:
                raise OSError(f"{self.folder / '.lock'} is held by another process")
            lock.close()
        except OSError as error:
            warnings.warn(
                f"Features are computed without a cache: {error}. TFXFER_CACHE chooses another folder.", CacheWarning
            )
            return False
        return True

    @functools.cached_property
    def max_bytes(self) -> int:
        """Bound of what is kept; 0 where there is no cache."""
        if not self.available:
            return 0
        if self._limit is not None:
            return self._limit
        # With what it holds itself: a bound that shrinks as the cache fills would evict what was just kept.
        return min(DEFAULT_MAX_BYTES, (shutil.disk_usage(self.folder).free + self._shelf.num_bytes) // 10)

    def get(self, key: str) -> Entry | None:
        """The entry, opened and noted as used now, or None; a damaged one is dropped, with a warning."""
        check_key(key)
        if not self.available:
            return None
        folder = self.folder / key
        lock = None
        try:
            lock = locks.take_lock(folder / USED, shared=True, wait_seconds=MOMENT_SECONDS)
            if lock is None:
                return None
            check_files(folder)
            entry = open_entry(folder, key, lock)
            touch(folder / USED)
            return entry
        except (ValueError, LookupError, TypeError, CheckError, FileNotFoundError, NotADirectoryError) as error:
            if lock is None:  # no such folder
                return None
            self._shelf.drop(folder, lock)
            warnings.warn(f"A damaged entry of the feature cache is dropped and computed again: {error}", CacheWarning)
        except OSError as error:  # too many open files, a dead network share: says nothing about the entry
            if lock is not None:
                lock.close()
            warnings.warn(f"An entry of the feature cache cannot be read now: {error}", CacheWarning)
        return None

    @contextlib.contextmanager
    def fill(
        self,
        key: str,
        shapes: Mapping[str, tuple[Sequence[int], str]],
        meta: Mapping[str, Any] | None = None,
        *,
        wait_seconds: float = 3600.0,
    ) -> Iterator[Filling]:
        """Make an entry: write all rows of `filling.stores` in the block; when it ends, `filling.entry` is there.

        Where another process is making the same entry, this one waits and finds `filling.entry` in the block, with
        nothing to write. If the other died, this one makes it. After an error in the block nothing is published.

        Args:
            key: Of `cache_key`.
            shapes: Name (letters, digits, _) to (shape, dtype on disk).
            meta: JSON values to be kept with the entry.
            wait_seconds: The longest wait for another process.

        Yields:
            The `Filling`. Its stores are closed at the end, its entry is the caller's to close.

        Raises:
            CacheFull: Where the entry cannot be kept, before or in the block (disk full) or after the wait.
            CheckError: Where the block ended and some row was never written.
            InputError: Where key, names, shapes or meta are not as they must be.
        """
        check_key(key)
        text = meta_text(key, shapes, meta or {})
        self._require()
        with refusals_of(self.folder), self._shelf.key_lock(key, wait_seconds):
            entry = self.get(key)
            if entry is not None:
                yield Filling({}, entry)
                return
            filling = Filling({})
            folder = self.folder / f".{key}.fill"
            try:
                filling.stores.update(self._shelf.begin(folder, shapes, text, self.max_bytes))
                yield filling
                lock = finish(folder, filling.stores, text)
                self._shelf.publish(folder, self.folder / key)
                filling.entry = open_entry(self.folder / key, key, lock)
            finally:
                for store in filling.stores.values():
                    store.close()
                shutil.rmtree(folder, ignore_errors=True)

    def get_or_fill(
        self,
        key: str,
        shapes: Mapping[str, tuple[Sequence[int], str]],
        meta: Mapping[str, Any] | None,
        compute: Callable[[dict[str, RowStore]], None],
        *,
        wait_seconds: float = 3600.0,
    ) -> Entry:
        """The entry; where there is none, `compute(stores)` writes it. Arguments and errors as for `fill`."""
        entry = self.get(key)
        if entry is None:
            with self.fill(key, shapes, meta, wait_seconds=wait_seconds) as filling:
                if filling.entry is None:
                    compute(filling.stores)
            entry = filling.entry
        assert entry is not None
        return entry

    def make_room(self, num_bytes: int) -> None:
        """Evict the entries that were not asked for the longest, none that is open, until so many bytes fit.

        Raises:
            CacheFull: Where they cannot fit; then nothing is evicted.
        """
        self._require()
        with self._shelf.alone():
            self._shelf.evict_for(num_bytes, self.max_bytes)

    def summary(self) -> dict[str, Any]:
        """What the cache holds, for `run.json`: entries, bytes, max_bytes, folder (None where there is no cache)."""
        kept = self._shelf.entries() if self.available else []
        return {
            "entries": len(kept),
            "bytes": sum(size_of(path) for path in kept),
            "max_bytes": self.max_bytes,
            "folder": str(self.folder) if self.available else None,
        }

    def clear(self) -> int:
        """Remove every entry that is not open, and what dead processes left; how many were removed."""
        if not self.available:
            return 0
        with self._shelf.alone():
            self._shelf.sweep()
            return sum(self._shelf.remove_unused(path) for path in self._shelf.entries())

    def _require(self) -> None:
        if not self.available:
            raise CacheFull("There is no feature cache: it is turned off, or its folder cannot be written.")
