"""An entry of the feature cache: its files, written whole, checked by their sums, opened for reading."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfxfer.errors import CheckError, InputError
from tfxfer.features.keys import json_part
from tfxfer.runtime.locks import Lock, take_lock
from tfxfer.runtime.store import RowStore

META, CHECKSUMS, USED = "meta.json", "checksums.json", "used"
MB = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_]+")


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
    lock: Lock = dataclasses.field(repr=False)

    def close(self) -> None:
        """Close the stores and let the cache evict the entry."""
        for store in self.stores.values():
            store.close()
        self.lock.close()

    def __enter__(self) -> "Entry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def meta_text(key: str, shapes: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """The content of `meta.json`; raises InputError where a name or a value is not as it must be."""
    for name in shapes:
        if not _NAME.fullmatch(name):
            raise InputError(f"A store's name is letters, digits and _, got {name!r}.")
    return json.dumps({"key": key, "stores": list(shapes), "meta": json_part("meta", meta)}, indent=2)


def finish(folder: Path, stores: Mapping[str, RowStore], text: str) -> Lock:
    """Complete the files of an entry on the disk; the lock is that of its first reader."""
    for name, store in stores.items():
        if not store.complete:
            raise CheckError(
                f"{store.num_missing} of {len(store)} rows of {name!r} were never written; nothing is kept."
            )
        store.flush()
        store.close()
    _write_synced(folder / META, text)
    sums = {name: _checksum(folder / name) for name in [META, *(f"{name}.npy" for name in stores)]}
    _write_synced(folder / CHECKSUMS, json.dumps(sums, indent=2))
    lock = take_lock(folder / USED, shared=True)
    assert lock is not None  # nobody else knows the file
    touch(folder / USED)
    sync_folder(folder)
    return lock


def check_files(folder: Path) -> None:
    """Compare the files of an entry with their checksums.

    Raises:
        CheckError, FileNotFoundError, LookupError, TypeError, ValueError: Where it is damaged.
    """
    sums = json.loads((folder / CHECKSUMS).read_text("utf-8"))
    for name in [META, *(name for name in sums if name != META)]:
        if _checksum(folder / name) != sums[name]:
            raise CheckError(f"{folder / name} does not have the checksum it was written with")


def open_entry(folder: Path, key: str, lock: Lock) -> Entry:
    """The entry in a folder whose file `used` the lock is on; errors as of `check_files`."""
    found = json.loads((folder / META).read_text("utf-8"))
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


def touch(path: Path) -> None:
    """Note that an entry is asked for now."""
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


def sync_folder(folder: Path) -> None:
    """Names of files are on the disk only once their folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot; the checksums are there for what a crash leaves
        os.fsync(descriptor)
    os.close(descriptor)
