"""What every peer shares: its arguments, its clock, what it leaves behind. Imports nothing but NumPy.

A peer is a script `PEER.py DATA OUT --seed 0`: DATA has train/, val/ and test/, each of class folders, and OUT gets
timing.json and test.npz. It may choose by train/ and val/ as it likes; test/ is opened when the clock has stopped.

The cut is by CPU seconds of the process and its children, so that a busy machine does not change what a peer reaches.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

_TICK = os.sysconf("SC_CLK_TCK")


def arguments(description: str, image_size_px: int) -> argparse.Namespace:
    """The command line of a peer."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train/, val/ and test/, each of class folders")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=image_size_px, help=f"in pixels; default {image_size_px}")
    parser.add_argument("--epochs-scale", type=float, default=1.0, help="of the peer's own epochs, for trying it out")
    parser.add_argument("--cpu-seconds", type=float, default=math.inf, help="CPU time after which it stops training")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def num_epochs(num_images: int, scale: float) -> int:
    """Epochs of training a whole network: 6 000 images seen, but at least 8 and at most 30 times each."""
    return max(1, round(scale * min(30, max(8, 6000 / num_images))))


def list_images(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, class numbers and class names, sorted."""
    names = sorted(child.name for child in folder.iterdir() if child.is_dir())
    files = [(file, number) for number, name in enumerate(names) for file in sorted((folder / name).iterdir())]
    return [file for file, _ in files], [number for _, number in files], names


class Clock:
    """Wall and CPU seconds from the start of the process, children included.

    Args:
        cpu_limit_seconds: When `over` becomes true.
    """

    def __init__(self, cpu_limit_seconds: float):
        self.cpu_limit_seconds = cpu_limit_seconds
        self.marks: dict[str, dict[str, float]] = {}
        self.was_cut = False

    def now(self) -> dict[str, float]:
        start_ticks = int(_stat("self")[19])
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return {"wall": round(uptime - start_ticks / _TICK, 2), "cpu": round(cpu_seconds(), 2)}

    def mark(self, name: str) -> None:
        self.marks[name] = self.now()

    def over(self) -> bool:
        """Whether training must stop; remembered."""
        self.was_cut = self.was_cut or cpu_seconds() > self.cpu_limit_seconds
        return self.was_cut


def cpu_seconds(pid: str = "self") -> float:
    """CPU seconds of a process, of the children that it has waited for and of those that are alive."""
    own = sum(map(int, _stat(pid)[11:15])) / _TICK
    children = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in _read(file).split()]
    return own + sum(map(cpu_seconds, children))


def _stat(pid: str) -> list[str]:
    """Fields of /proc/PID/stat behind the name; zeros where the process is gone."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or ["0"] * 50


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def leave(out: Path, clock: Clock, settings: dict[str, Any], paths, class_names, probabilities) -> None:
    """Write what the benchmark reads.

    Args:
        out: The folder.
        clock: With the marks "imports" and "model".
        settings: What was set and what was chosen by validation.
        paths: N, "CLASS/FILE" below test/.
        class_names: K, of the columns.
        probabilities: (N, K).
    """
    import numpy as np

    np.savez(out / "test.npz", paths=list(paths), class_names=list(class_names), probabilities=probabilities)
    told = {"seconds": clock.marks, "cut": clock.was_cut, "settings": settings}
    (out / "timing.json").write_text(json.dumps(told), encoding="utf-8")
