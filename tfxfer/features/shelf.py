"""The folder of a feature cache: who may change it, what goes when room is wanted, what dead processes left."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tfxfer.errors import TfxferError
from tfxfer.features.entry import USED, sync_folder
from tfxfer.features.keys import KEY
from tfxfer.runtime.locks import Lock, take_lock
from tfxfer.runtime.store import RowStore

MOMENT_SECONDS = 60.0  # for locks that nobody holds for long
_OVERHEAD_BYTES = 4096  # of an entry's small files, besides its meta


class CacheFull(TfxferError):
    """The entry cannot be kept: no room, no cache, or another process is at it for too long. Go on without."""


class Shelf:
    """Entries as folders `KEY/`, published whole by a rename and never changed.

    An entry being filled is `.KEY.fill/`, held by a lock on `.KEY.lock`, which a dying process gives back. Whoever
    reads an entry shares the lock on its file `used`, whose time says when it was last asked for. `.lock` is held
    while room is made.

    Args:
        path: Of the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return size_of(self.path)

    def entries(self) -> list[Path]:
        """Folders of entries, the one not asked for the longest first."""
        return sorted((path for path in self.path.glob("*") if KEY.fullmatch(path.name)), key=_last_use)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Room is made, and entries come and go, by one process at a time."""
        with refusals_of(self.path):
            lock = take_lock(self.path / ".lock", wait_seconds=MOMENT_SECONDS)
            if lock is None:
                raise CacheFull(f"Another process holds the feature cache {self.path} and does not let go.")
            try:
                yield
            finally:
                lock.close()

    @contextlib.contextmanager
    def key_lock(self, key: str, wait_seconds: float) -> Iterator[None]:
        """One process at a time makes an entry; raises CacheFull after the wait."""
        path = self.path / f".{key}.lock"
        lock = take_lock(path, wait_seconds=wait_seconds)
        if lock is None:
            raise CacheFull(f"Another process has been computing the same features for {wait_seconds:g} s ({path}).")
        try:
            yield
        finally:
            if lock.is_on(path):  # while it is held: see take_lock
                path.unlink()
            lock.close()

    def begin(
        self, folder: Path, shapes: Mapping[str, tuple[Sequence[int], str]], text: str, max_bytes: int
    ) -> dict[str, RowStore]:
        """Room for the entry and its empty stores, which count from now on with their whole length."""
        planned = {name: RowStore.file_bytes(shape, dtype) for name, (shape, dtype) in shapes.items()}
        with self.alone():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that died
            self.evict_for(sum(planned.values()) + len(text) + _OVERHEAD_BYTES, max_bytes)
            folder.mkdir()
            return {
                name: RowStore.create(folder / f"{name}.npy", shape, dtype) for name, (shape, dtype) in shapes.items()
            }

    def publish(self, folder: Path, target: Path) -> None:
        """Give a finished entry its name."""
        with self.alone():
            if target.exists():  # it could not be opened, or there would be nothing to publish
                self._remove(target)
            folder.rename(target)
            sync_folder(self.path)

    def evict_for(self, num_bytes: int, max_bytes: int) -> None:
        """Make room, held `alone`; raises CacheFull, and evicts nothing, where so many bytes cannot fit."""
        self.sweep()
        kept = self.entries()
        being_filled = list(self.path.glob(".*.fill"))
        total = sum(map(size_of, [*kept, *being_filled]))
        # Rows that others have yet to write will take free space as well.
        promised = sum(size_of(path) - size_of(path, on_disk=True) for path in being_filled)
        free = shutil.disk_usage(self.path).free - max(promised, 0)
        surplus = max(total + num_bytes - max_bytes, num_bytes - free)
        locks, chosen = [], []
        try:
            for path in kept:
                lock = take_lock(path / USED) if surplus > 0 else None
                if lock is not None:
                    locks.append(lock)
                    chosen.append(path)
                    surplus -= size_of(path)
            if surplus > 0:
                raise CacheFull(
                    f"{num_bytes / 1e6:,.1f} MB do not fit into the feature cache {self.path} of "
                    f"{max_bytes / 1e6:,.1f} MB with {free / 1e6:,.1f} MB free on its disk (TFXFER_CACHE_BYTES)."
                )
            for path in chosen:
                self._remove(path)
        finally:
            for lock in locks:
                lock.close()

    def sweep(self) -> None:
        """Remove what processes left that died while they filled or evicted. A live one holds its key's lock."""
        for path in self.path.glob(".*.gone"):
            shutil.rmtree(path, ignore_errors=True)
        for stem in {path.name.rsplit(".", 1)[0] for end in ("fill", "lock") for path in self.path.glob(f".*.{end}")}:
            held = self.path / f"{stem}.lock"
            lock = take_lock(held)
            if lock is not None:
                shutil.rmtree(self.path / f"{stem}.fill", ignore_errors=True)
                held.unlink(missing_ok=True)
                lock.close()

    def _remove(self, path: Path) -> None:
        """At once by its name, then the bytes: half an entry is never in its place."""
        gone = self.path / f".{path.name}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def remove_unused(self, path: Path) -> bool:
        """Remove an entry, held `alone`; whether nobody had it open."""
        lock = take_lock(path / USED)
        if lock is None:
            return False
        self._remove(path)
        lock.close()
        return True

    def drop(self, folder: Path, lock: Lock) -> None:
        """Remove a damaged entry, unless another process has put a new one in its place."""
        with contextlib.suppress(CacheFull, OSError), self.alone():
            if lock.is_on(folder / USED):
                self._remove(folder)
        lock.close()


@contextlib.contextmanager
def refusals_of(folder: Path) -> Iterator[None]:
    """What the disk refuses below the cache's folder (full, gone, quota) is no error of the caller's work."""
    try:
        yield
    except OSError as error:
        if error.filename is None or not Path(os.fsdecode(error.filename)).is_relative_to(folder):
            raise
        raise CacheFull(f"The feature cache cannot be written: {error}.") from error


def size_of(folder: Path, *, on_disk: bool = False) -> int:
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
        return (folder / USED).stat().st_mtime_ns
    except FileNotFoundError:
        return 0
