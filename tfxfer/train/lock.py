"""One training a folder: a lock that names who holds it, and goes with its process."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from tfxfer.errors import InputError

LOCK_FILE = ".lock"
HOLDER_FILE = ".holder.json"  # a locked file cannot be read everywhere


@contextlib.contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder; a process that dies, however it dies, lets go of it.

    Args:
        folder: Must be there.

    Raises:
        InputError: Where another training holds it; says which.
    """
    lock, holder = _acquired(folder), Path(folder) / HOLDER_FILE
    try:
        holder.write_text(json.dumps({"process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        (Path(folder) / LOCK_FILE).unlink(missing_ok=True)
        lock.release()


def check_free(folder: Path) -> None:
    """Refuse a folder in which a training is at work.

    Raises:
        InputError: Says which.
    """
    if (Path(folder) / LOCK_FILE).is_file():
        _acquired(folder).release()


def _acquired(folder: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(Path(folder) / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = _holder(Path(folder) / HOLDER_FILE)
        raise InputError(
            f"Another training is at work in {folder}: {holder}; wait for it, stop it, or give another --out."
        ) from None
    return lock


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['process']}, since {found['since']}"
    except (OSError, ValueError, KeyError):
        return "a process that has just begun"
