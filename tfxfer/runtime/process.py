"""Facts about this process: its age, its versions."""

import contextlib
import importlib.metadata
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_IMPORTED = time.time()
PACKAGES = ("tfxfer", "tensorflow", "keras", "numpy", "onnx", "onnxruntime", "tf2onnx", "pillow", "scikit-learn")


def seconds_since_start() -> float:
    """Wall time since this process began (on other systems than Linux: since tfxfer was imported)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time() - _IMPORTED


@contextlib.contextmanager
def end_after_sigterm(seconds: float, told: str) -> Iterator[None]:
    """A SIGTERM in the block has this process gone so long after it, whatever it is at; for the command line.

    Python's own handlers run when the main thread comes back from native code, and the end of a process has clearing up
    to do: either may take longer where the machine is busy. Another thread hears of the signal at once and waits, also
    when the block has ended meanwhile. Without a handler of Python's the signal ends the process anyway.

    Args:
        seconds: At least 0.
        told: Said on stderr then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may ask to be told
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while (heard := os.read(reading, 1)) != bytes([signal.SIGTERM]):
            if not heard:  # the block has ended without one
                os.close(reading)
                return
        time.sleep(seconds)
        print(told, file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGTERM)

    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if before >= 0:  # somebody else's, such as of an event loop
        signal.set_wakeup_fd(before)
    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        if before < 0:
            signal.set_wakeup_fd(-1)
        os.close(writing)


@contextlib.contextmanager
def ended_by(*signals: int) -> Iterator[None]:
    """These signals end the process at once, as where Python is not there.

    For waits in native code: Python's handlers would run only after them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: one that Python did not set and cannot set again
                signal.signal(number, handler)


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that matter, and of the machine."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    found["cores"] = str(os.cpu_count())
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
