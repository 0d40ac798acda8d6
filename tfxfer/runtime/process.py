"""Facts about this process: its age, its versions."""

import importlib.metadata
import os
import platform
import time
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
