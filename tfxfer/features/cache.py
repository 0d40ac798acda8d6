"""The disk cache of feature stores: keyed by content, bounded, least recently used first out, safe for processes."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import CheckError, InputError, TfxferError
from tfxfer.features.store import RowStore
from tfxfer.runtime.files import cache_dir

try:
    import fcntl
except ImportError:  # Windows: without these locks there is no cache
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # raise it when the files of an entry change
MB = 1 << 20
DEFAULT_MAX_BYTES = 20_000_000_000
_META, _CHECKSUMS, _USED = "meta.json", "checksums.json", "used"
_OVERHEAD_BYTES = 4096  # of an entry's small files, besides its meta
_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_]+")
_MOMENT_SECONDS = 60.0  # for locks that nobody holds for long
_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class CacheFull(TfxferError):
    """The entry cannot be kept: no room, no cache, or another process is at it for too long. Go on without."""


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
    whole = {"format": FORMAT, "parts": {name: _json_part(name, part) for name, part in parts.items()}}
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


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """An entry of the cache, open for reading and safe from eviction until it and all its stores are closed or gone.

    Attributes:
        key: Of `cache_key`.
        stores: By name.
        meta: What was given to `fill`, as JSON holds it.
    """

    key: str
    stores: dict[str, RowStore]
    meta: dict[str, Any]
    lock: "Lock" = dataclasses.field(repr=False)

    def close(self) -> None:
        """Close the stores and let the cache evict the entry."""
        for store in self.stores.values():
            store.close()
        self.lock.close()

    def __enter__(self) -> "Entry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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

    An entry is a folder `KEY/`, published whole by a rename and never changed; being filled it is `.KEY.fill/`, held
    by a lock on `.KEY.lock`, which a dying process gives back. Whoever reads an entry shares the lock on its file
    `used`, whose time says when it was last asked for. `.lock` is held while room is made. Any number of objects,
    threads and processes may use one folder at the same time.

    Args:
        folder: Of the entries; `features` in the cache folder (`TFXFER_CACHE`) by default.
        max_bytes: Bound of what is kept, 0 for no cache; by default `TFXFER_CACHE_BYTES`, else the smaller of 20 GB
            and a tenth of the disk space that is free or taken by the cache itself.

    Example:
        >>> import tempfile
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
    def available(self) -> bool:
        """Whether entries can be kept; warns once where the folder does not allow it."""
        if self._limit == 0:
            return False
        try:
            if fcntl is None:
                raise OSError("this system has no file locks")
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, "the folder cannot be written", str(self.folder))
            lock = take_lock(self.folder / ".lock", wait_seconds=_MOMENT_SECONDS)
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
        return min(DEFAULT_MAX_BYTES, (shutil.disk_usage(self.folder).free + _size(self.folder)) // 10)

    def get(self, key: str) -> Entry | None:
        """The entry, opened and noted as used now, or None; a damaged one is dropped, with a warning."""
        _check_key(key)
        if not self.available:
            return None
        folder = self.folder / key
        lock = None
        try:
            lock = take_lock(folder / _USED, shared=True, wait_seconds=_MOMENT_SECONDS)
            if lock is None:
                return None
            _check(folder)
            entry = _open_entry(folder, key, lock)
            _touch(folder / _USED)
            return entry
        except (ValueError, LookupError, TypeError, CheckError, FileNotFoundError, NotADirectoryError) as error:
            if lock is None:  # no such folder
                return None
            self._drop(folder, lock)
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
        _check_key(key)
        text = _meta_text(key, shapes, meta or {})
        self._require()
        with _refusals_of(self.folder), self._key_lock(key, wait_seconds):
            entry = self.get(key)
            if entry is not None:
                yield Filling({}, entry)
                return
            filling = Filling({})
            folder = self.folder / f".{key}.fill"
            try:
                filling.stores.update(self._begin(folder, shapes, text))
                yield filling
                lock = _finish(folder, filling.stores, text)
                self._publish(folder, self.folder / key)
                filling.entry = _open_entry(self.folder / key, key, lock)
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
        with self._alone():
            self._evict_for(num_bytes)

    def summary(self) -> dict[str, Any]:
        """What the cache holds, for `run.json`: entries, bytes, max_bytes, folder (None where there is no cache)."""
        kept = self._entries() if self.available else []
        return {
            "entries": len(kept),
            "bytes": sum(_size(path) for path in kept),
            "max_bytes": self.max_bytes,
            "folder": str(self.folder) if self.available else None,
        }

    def clear(self) -> int:
        """Remove every entry that is not open, and what dead processes left; how many were removed."""
        if not self.available:
            return 0
        with self._alone():
            self._sweep()
            return sum(self._remove_unused(path) for path in self._entries())

    # --- below: how it is done ---

    def _require(self) -> None:
        if not self.available:
            raise CacheFull("There is no feature cache: it is turned off, or its folder cannot be written.")

    def _entries(self) -> list[Path]:
        """Folders of entries, the one not asked for the longest first."""
        return sorted((path for path in self.folder.glob("*") if _KEY.fullmatch(path.name)), key=_last_use)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Room is made, and entries come and go, by one process at a time."""
        with _refusals_of(self.folder):
            lock = take_lock(self.folder / ".lock", wait_seconds=_MOMENT_SECONDS)
            if lock is None:
                raise CacheFull(f"Another process holds the feature cache {self.folder} and does not let go.")
            try:
                yield
            finally:
                lock.close()

    @contextlib.contextmanager
    def _key_lock(self, key: str, wait_seconds: float) -> Iterator[None]:
        path = self.folder / f".{key}.lock"
        lock = take_lock(path, wait_seconds=wait_seconds)
        if lock is None:
            raise CacheFull(f"Another process has been computing the same features for {wait_seconds:g} s ({path}).")
        try:
            yield
        finally:
            if lock.is_on(path):  # while it is held: see take_lock
                path.unlink()
            lock.close()

    def _begin(self, folder: Path, shapes: Mapping[str, tuple[Sequence[int], str]], text: str) -> dict[str, RowStore]:
        """Room for the entry and its empty stores, which count from now on with their whole length."""
        planned = {name: RowStore.file_bytes(shape, dtype) for name, (shape, dtype) in shapes.items()}
        with self._alone():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that died
            self._evict_for(sum(planned.values()) + len(text) + _OVERHEAD_BYTES)
            folder.mkdir()
            return {
                name: RowStore.create(folder / f"{name}.npy", shape, dtype) for name, (shape, dtype) in shapes.items()
            }

    def _publish(self, folder: Path, target: Path) -> None:
        with self._alone():
            if target.exists():  # it could not be opened, or there would be nothing to publish
                self._remove(target)
            folder.rename(target)
            _sync_folder(self.folder)

    def _evict_for(self, num_bytes: int) -> None:
        self._sweep()
        kept = self._entries()
        being_filled = list(self.folder.glob(".*.fill"))
        total = sum(map(_size, [*kept, *being_filled]))
        # Rows that others have yet to write will take free space as well.
        promised = sum(_size(path) - _size(path, on_disk=True) for path in being_filled)
        free = shutil.disk_usage(self.folder).free - max(promised, 0)
        surplus = max(total + num_bytes - self.max_bytes, num_bytes - free)
        locks, chosen = [], []
        try:
            for path in kept:
                lock = take_lock(path / _USED) if surplus > 0 else None
                if lock is not None:
                    locks.append(lock)
                    chosen.append(path)
                    surplus -= _size(path)
            if surplus > 0:
                raise CacheFull(
                    f"{num_bytes / 1e6:,.1f} MB do not fit into the feature cache {self.folder} of "
                    f"{self.max_bytes / 1e6:,.1f} MB with {free / 1e6:,.1f} MB free on its disk (TFXFER_CACHE_BYTES)."
                )
            for path in chosen:
                self._remove(path)
        finally:
            for lock in locks:
                lock.close()

    def _sweep(self) -> None:
        """Remove what processes left that died while they filled or evicted. A live one holds its key's lock."""
        for path in self.folder.glob(".*.gone"):
            shutil.rmtree(path, ignore_errors=True)
        for stem in {path.name.rsplit(".", 1)[0] for end in ("fill", "lock") for path in self.folder.glob(f".*.{end}")}:
            held = self.folder / f"{stem}.lock"
            lock = take_lock(held)
            if lock is not None:
                shutil.rmtree(self.folder / f"{stem}.fill", ignore_errors=True)
                held.unlink(missing_ok=True)
                lock.close()

    def _remove(self, path: Path) -> None:
        """At once by its name, then the bytes: half an entry is never in its place."""
        gone = self.folder / f".{path.name}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_unused(self, path: Path) -> bool:
        lock = take_lock(path / _USED)
        if lock is None:
            return False
        self._remove(path)
        lock.close()
        return True

    def _drop(self, folder: Path, lock: "Lock") -> None:
        """Remove a damaged entry, unless another process has put a new one in its place."""
        with contextlib.suppress(CacheFull, OSError), self._alone():
            if lock.is_on(folder / _USED):
                self._remove(folder)
        lock.close()


class Lock:
    """A lock on a file, held until `close`, the last reference, or the end of the process, however it ends."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)

    def is_on(self, path: Path) -> bool:
        """Whether `path` is still the file that was locked."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        except FileNotFoundError:
            return False


def take_lock(path: Path, *, shared: bool = False, wait_seconds: float = 0.0) -> Lock | None:
    """Lock a file, made where it is not there; None where others still hold it after `wait_seconds`.

    A lock file may be removed by who holds it alone. Whoever waited for it then has a lock on a file without a name,
    which excludes nobody, and tries again.

    Raises:
        FileNotFoundError: Where its folder is not there.
    """
    deadline = time.monotonic() + wait_seconds
    pause_seconds = 0.01
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        lock = Lock(descriptor)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            if time.monotonic() >= deadline:
                return None
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 0.5)
            continue
        if lock.is_on(path):
            return lock
        lock.close()


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise InputError(f"A key of the feature cache is the 64 hexadecimal digits of cache_key, got {key!r}.")


@contextlib.contextmanager
def _refusals_of(folder: Path) -> Iterator[None]:
    """What the disk refuses below the cache's folder (full, gone, quota) is no error of the caller's work."""
    try:
        yield
    except OSError as error:
        if error.filename is None or not Path(os.fsdecode(error.filename)).is_relative_to(folder):
            raise
        raise CacheFull(f"The feature cache cannot be written: {error}.") from error


def _json_part(name: str, part: Any) -> Any:
    """`part` as plain JSON values."""
    if isinstance(part, np.generic):
        part = part.item()
    if part is None or isinstance(part, str | bool | int) or (isinstance(part, float) and math.isfinite(part)):
        return part
    if isinstance(part, list | tuple):
        return [_json_part(name, value) for value in part]
    if isinstance(part, Mapping) and all(isinstance(key, str) for key in part):
        return {key: _json_part(name, value) for key, value in part.items()}
    raise InputError(
        f"{name}: {type(part).__name__} {part!r:.60} has no exact form in JSON; give text, numbers or lists."
    )


def _meta_text(key: str, shapes: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    for name in shapes:
        if not _NAME.fullmatch(name):
            raise InputError(f"A store's name is letters, digits and _, got {name!r}.")
    return json.dumps({"key": key, "stores": list(shapes), "meta": _json_part("meta", meta)}, indent=2)


def _finish(folder: Path, stores: Mapping[str, RowStore], text: str) -> Lock:
    """Complete the files of an entry on the disk; the lock is that of its first reader."""
    for name, store in stores.items():
        if not store.complete:
            raise CheckError(
                f"{store.num_missing} of {len(store)} rows of {name!r} were never written; nothing is kept."
            )
        store.flush()
        store.close()
    _write_synced(folder / _META, text)
    sums = {name: _checksum(folder / name) for name in [_META, *(f"{name}.npy" for name in stores)]}
    _write_synced(folder / _CHECKSUMS, json.dumps(sums, indent=2))
    lock = take_lock(folder / _USED, shared=True)
    assert lock is not None  # nobody else knows the file
    _touch(folder / _USED)
    _sync_folder(folder)
    return lock


def _check(folder: Path) -> None:
    """Compare the files of an entry with their checksums.

    Raises:
        CheckError, FileNotFoundError, LookupError, TypeError, ValueError: Where it is damaged.
    """
    sums = json.loads((folder / _CHECKSUMS).read_text("utf-8"))
    for name in [_META, *(name for name in sums if name != _META)]:
        if _checksum(folder / name) != sums[name]:
            raise CheckError(f"{folder / name} does not have the checksum it was written with")


def _open_entry(folder: Path, key: str, lock: Lock) -> Entry:
    found = json.loads((folder / _META).read_text("utf-8"))
    if found["key"] != key:
        raise CheckError(f"{folder} holds the entry {found['key']}")
    stores = {name: RowStore.open(folder / f"{name}.npy") for name in found["stores"]}
    for store in stores.values():
        store.keep = lock
    return Entry(key, stores, found["meta"], lock)


def _checksum(path: Path) -> dict[str, Any]:
    """Size, and SHA-256 of the whole file up to 32 MB; above, of 32 pieces of 1 MB from the first to the last."""
    size = path.stat().st_size
    last = max(size - MB, 0)
    starts = range(0, size, MB) if size <= 32 * MB else [last * part // 31 for part in range(32)]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(MB))
    return {"bytes": size, "sha256": digest.hexdigest()}


def _piece_digests(array: np.ndarray | RowStore) -> list[bytes]:
    row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    step = max(1, 4 * MB // max(row_bytes, 1))

    def digest(start: int) -> bytes:
        piece = np.ascontiguousarray(array[start : start + step])
        return hashlib.blake2b(piece.reshape(-1).view(np.uint8).data, digest_size=32).digest()

    starts = range(0, len(array), step)
    if len(starts) < 4:  # threads would take longer to start
        return [digest(start) for start in starts]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(digest, starts))


def _size(folder: Path, *, on_disk: bool = False) -> int:
    """Bytes of the files below a folder, or those that they take by now on the disk; what vanishes meanwhile is 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(os.path.join(parent, name))  # noqa: PTH116, PTH118 (thousands of files: no objects)
                total += stat.st_blocks * 512 if on_disk else stat.st_size
    return total


def _last_use(folder: Path) -> int:
    try:
        return (folder / _USED).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _touch(path: Path) -> None:
    now = time.time_ns()  # the kernel's own "now" moves in steps of some milliseconds
    os.utime(path, ns=(now, now))


def _write_synced(path: Path, text: str) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # of a write it does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Names of files are on the disk only once their folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot; the checksums are there for what a crash leaves
        os.fsync(descriptor)
    os.close(descriptor)
