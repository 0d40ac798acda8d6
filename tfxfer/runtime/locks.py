"""Locks on files that exclude other processes and threads, alone or shared, and go with who holds them."""

import os
import time
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AVAILABLE = fcntl is not None


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
