"""What `tfxfer train` costs by images, epochs, image size, freeze depth, devices and workers; whether its memory grows.

    python tests/benchmarks/scaling.py --markdown                     # about 45 minutes on two cores
    python tests/benchmarks/scaling.py --only memory --markdown
    python tests/benchmarks/scaling.py --quick                        # to see whether it runs

Photos are clothing's, small, drawn with repetition and each altered, so that no two are equal. One setting is varied at
a time from 1 000 images at 96 px, four epochs of the blocks behind `block_12` of MobileNetV2 at one learning rate,
without mirrored views. Exports and the gate are left out there, and the cache is empty. Devices are logical CPUs of one
process, workers are processes on this machine, all on the same cores: what they cost shows, not what they bring.

Memory is that of the whole command `tfxfer train`, gate and exports included, on 1 000 and on 20 000 images: the
largest resident set of a process, and RssAnon of the command's own process and of its largest child (which reopens an
export). The largest sum of all at one time is told beside it; it depends on which of them are at their peak together. A
JSON document goes to stdout, tables with --markdown.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drawn_photos import write_photos
from memory import Use, run_measured
from scaling_tables import as_markdown, goals_of_memory
from time_to_accuracy import CACHE, DATA, commit, say

from tfxfer.runtime.images import available_cores
from tfxfer.runtime.process import versions

HERE = Path(__file__).resolve().parent
SOURCE = "mobilenet_v2_imagenet"
BASE: dict[str, Any] = {
    "source": SOURCE, "image_size": 96, "freeze_depth": "block_12", "epochs": 4, "learning_rate": 3e-4,
    "near_duplicates": "off", "augment": "none", "features": "last", "baseline": "none",
}  # fmt: skip
BASE_IMAGES = 1000
VARIED: dict[str, tuple[Any, ...]] = {
    "images": (250, 500, 1000, 2000, 4000),
    "epochs": (4, 8, 16),
    "image_size": (96, 128, 160, 224),
    "freeze_depth": (0, "block_06", "block_12", "block_15"),
    "devices": (1, 2, 4),
    "workers": (1, 2, 3),
}
QUICK: dict[str, tuple[Any, ...]] = {"images": (250,), "freeze_depth": ("block_15",), "devices": (2,), "workers": (2,)}
MEMORY_IMAGES = (1000, 20_000)
QUICK_MEMORY_IMAGES = (250, 1000)
MEMORY_COMMAND = (
    "--source", SOURCE, "--image-size", "96", "--near-duplicates", "off", "--epochs", "1", "--lr", "3e-4",
)  # fmt: skip


class Bench:
    """Runs trainings, each in a process of its own with an empty cache.

    Args:
        options: Of the command line.
        folder: For runs and logs.
    """

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder, self._number = options, folder, 0

    def photos(self, count: int, size_px: int) -> Path:
        """Kept for the next time."""
        where = self.options.photos / f"{count}-{size_px}"
        return write_photos(self.options.data / "clothing" / "train", where, count, size_px)

    def run(self, command: Sequence[str], workers: int = 1) -> tuple[Use, dict[str, Any]]:
        """A training whose run goes where OUT stands in the command; what its chief took, and its run.json."""
        self._number += 1
        out, cache = self.folder / f"run-{self._number}", self.folder / f"cache-{self._number}"
        python_path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.getenv("PYTHONPATH")]))
        environment = {
            **os.environ, "TFXFER_CACHE": str(cache), "PYTHONPATH": python_path, "TF_CPP_MIN_LOG_LEVEL": "2"
        }  # fmt: skip
        log = self.folder / f"{self._number}.log"
        words = [sys.executable, *(str(out) if word == "OUT" else word for word in command)]
        clusters = cluster_variables(workers)
        with contextlib.ExitStack() as stack:
            for index, cluster in enumerate(clusters[1:], start=1):
                errors = stack.enter_context(log.with_suffix(f".{index}.log").open("wb"))
                helper = subprocess.Popen(words, stdout=errors, stderr=errors, env={**environment, **cluster})
                stack.callback(_ended, helper)
            use = run_measured(words, log, {**environment, **clusters[0]})
        # 1 is the gate's "negative", which a short training may earn.
        if use.status not in (0, 1) or not (out / "run.json").exists():
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{' '.join(words)}\nended with status {use.status}:\n{tail}")
        info = json.loads((out / "run.json").read_text(encoding="utf-8"))
        shutil.rmtree(out)
        shutil.rmtree(cache, ignore_errors=True)
        return use, info


def cluster_variables(workers: int) -> list[dict[str, str]]:
    """TF_CONFIG of each of so many workers on this machine, the chief's first; nothing for one."""
    if workers == 1:
        return [{}]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(workers)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    return [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
        for index in range(workers)
    ]


def _ended(helper: subprocess.Popen) -> None:
    try:
        helper.wait(30)
    except subprocess.TimeoutExpired:
        helper.kill()
        helper.wait()


def cost(bench: Bench, name: str, value: Any) -> dict[str, Any]:
    """One training with one setting other than the base."""
    count = value if name == "images" else BASE_IMAGES
    plan = {**BASE, name: value} if name in BASE else BASE
    workers = value if name == "workers" else 1
    strategy = {"devices": ["mirrored", str(value)], "workers": ["multi_worker"]}.get(name, []) if value != 1 else []
    data = bench.photos(count, max(plan["image_size"], BASE["image_size"]))
    command = [str(HERE / "train_once.py"), str(data), "OUT", json.dumps(plan), *strategy]
    use, info = bench.run(command, workers)
    seconds = info["timings"]["seconds"]
    say(f"{name} {value}: {use.wall_seconds:.0f} s, {use.cpu_seconds:.0f} s of CPU")
    return {
        "varied": name, "value": value, "wall_seconds": round(use.wall_seconds, 2),
        "cpu_seconds": round(use.cpu_seconds, 2), "seconds": seconds, "stored_bytes": info["cache"]["bytes"],
        "peak_rss_bytes": use.peak_rss_bytes, "peak_anonymous_bytes": use.peak_anonymous_bytes,
    }  # fmt: skip


def costs(bench: Bench, varied: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """All settings; the base only once."""
    rows: list[dict[str, Any]] = []
    for name, values in varied.items():
        for value in values:
            base = next((row for row in rows if row["varied"] == "images" and row["value"] == BASE_IMAGES), None)
            if name != "images" and value == BASE.get(name, 1) and base is not None:
                rows.append({**base, "varied": name, "value": value})
            else:
                rows.append(cost(bench, name, value))
    return rows


def memory(bench: Bench, count: int) -> dict[str, Any]:
    """The whole command on so many images."""
    data = bench.photos(count, BASE["image_size"])
    use, info = bench.run(["-m", "tfxfer", "train", str(data), *MEMORY_COMMAND, "--out", "OUT"])
    say(f"memory, {count} images: {use.peak_rss_bytes / 1e6:.0f} MB, {use.wall_seconds:.0f} s")
    peaks = {name: value for name, value in dataclasses.asdict(use).items() if name.startswith("peak")}
    return {
        "images": count, "wall_seconds": round(use.wall_seconds, 2), "cpu_seconds": round(use.cpu_seconds, 2),
        "seconds": info["timings"]["seconds"], **peaks,
    }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", choices=("cost", "memory"), help="one of the two tables")
    parser.add_argument("--quick", action="store_true", help="few and small settings: to see whether it runs")
    parser.add_argument("--markdown", action="store_true", help="print tables for RESULTS.md instead of JSON")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    parser.add_argument("--photos", type=Path, default=CACHE / "photos", help="where the drawn photos are kept")
    options = parser.parse_args(arguments)
    if not (options.data / "clothing" / "train").is_dir():
        parser.error(f"there is no folder {options.data}/clothing/train; set TFXFER_DATA or give --data")
    return options


def main() -> int:
    options = parse()
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="tfxfer-scaling-"))
    bench = Bench(options, folder)
    try:
        rows = costs(bench, QUICK if options.quick else VARIED) if options.only != "memory" else []
        counts = QUICK_MEMORY_IMAGES if options.quick else MEMORY_IMAGES
        used = [memory(bench, count) for count in counts] if options.only != "cost" else []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    summary = {
        "benchmark": "scaling", "date": datetime.date.today().isoformat(), "commit": commit(),
        "cores": available_cores(), "quick": options.quick,
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)], "versions": versions(),
        "base": {**BASE, "images": BASE_IMAGES}, "costs": rows, "memory": used,
        "memory_command": f"tfxfer train DATA {' '.join(MEMORY_COMMAND)}", "goals": goals_of_memory(used),
    }  # fmt: skip
    print(as_markdown(summary) if options.markdown else json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
