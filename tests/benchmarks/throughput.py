"""Images a second and peak memory of tfxfer's extraction and training step, beside bare engines, Keras and torch.

    python tests/benchmarks/throughput.py --markdown              # half an hour on two cores
    python tests/benchmarks/throughput.py --quick --only steps    # to see whether it runs

Extraction: features of clothing's photos by the whole network, from files and from decoded pixels, beside the forward
pass alone in onnxruntime (the file that tfxfer makes, and the one of Keras' own export), Keras `predict`, a
`tf.function` and torch (channels last). With f images a second of the better onnxruntime file and d seconds to decode
and resize an image in one thread of Pillow, at most 1 / (1/f + d/cores) can be reached from files, and f from pixels.

Steps: MobileNetV2 at --step-size px, batches of 32 in float32, AdamW with label smoothing and clipping; frozen to
nothing, up to and with several blocks (`block_12` is the 13th, in front of `block_13`) and whole; tfxfer with the cache
(the frozen part was run before) and without, Keras `fit`, and torch for the whole network.

Each thing measured is a process of its own, which loads, warms up and waits. They take turns, one at a time, in several
rounds, so that what else happens on the machine hits all alike; ratios are of rates of the same round. A JSON document
goes to stdout, tables with --markdown.
"""

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from throughput_tables import as_markdown, goals_of_extraction, goals_of_steps
from time_to_accuracy import CACHE, DATA, commit, say
from tta_peers import PEERS_FOLDER, torch_python
from workers import Worker, all_ended, alternate, environment_of

from tfxfer.runtime.images import available_cores, decode_images
from tfxfer.runtime.process import versions

HERE = Path(__file__).resolve().parent
SOURCES = {"mobilenet_v2_imagenet": 224, "efficientnet_lite0_imagenet": 224}
STEP_SOURCE = "mobilenet_v2_imagenet"
# What is frozen: a name for tables, what `freeze` takes, and the state of BatchNorm in the rest.
GROUPS = (
    ("nothing", 0, "frozen"),
    ("nothing", 0, "train"),
    *((name, name, "frozen") for name in ("block_06", "block_12", "block_13", "block_15", "block_16")),
    ("all", "all", "frozen"),
)
STEP_BATCH, FORWARD_BATCH = 32, 64


class Bench:
    """Starts workers and lets them take turns.

    Args:
        options: Of the command line.
        folder: For pixels, models and logs.
    """

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.versions = versions()

    def worker(self, script: str, told: dict[str, Any]) -> Worker:
        ours, torch = script == "tfxfer_speed.py", script.startswith("torch")
        python = torch_python(self.options.venvs) if torch else Path(sys.executable)
        path = "" if torch else os.pathsep.join(filter(None, [str(HERE.parents[1]), os.getenv("PYTHONPATH")]))
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        return Worker(
            python, (HERE if ours else PEERS_FOLDER) / script, {**told, "threads": self.options.threads}, log,
            environment_of(self.options.threads, path),
        )  # fmt: skip

    def measure(self, arms: dict[str, tuple[str, dict[str, Any]]], seconds: float) -> dict[str, Any]:
        """Start all of them, one after the other, and alternate."""
        with all_ended({}) as workers:
            for name, (script, told) in arms.items():
                workers[name] = self.worker(script, told)
                workers[name].ready()
            found = alternate(workers, self.options.rounds, seconds)
        for arm in found.values():
            known = {name: arm["facts"].pop(name) for name in ("torch", "timm") if name in arm["facts"]}
            self.versions |= known
        for name, arm in found.items():
            say(f"  {name}: {np.median(arm['rates']):.0f} images a second, {arm['peak_rss_bytes'] / 1e6:.0f} MB")
        return found

    def pixels(self, files: list[Path], size_px: int) -> Path:
        """Decoded, for those that begin with pixels."""
        path = self.folder / f"pixels-{size_px}-{len(files)}.npy"
        if not path.exists():
            np.save(path, decode_images(files, size_px))
        return path


def extraction(bench: Bench, source: str, size_px: int, files: list[Path]) -> dict[str, Any]:
    """All arms of one source."""
    say(f"extraction, {source}, {size_px} px, {len(files)} photos")
    folder = bench.folder
    common = {
        "source": source, "image_size": size_px, "batch_size": FORWARD_BATCH,
        "pixels": str(bench.pixels(files, size_px)), "files": [str(file) for file in files],
    }  # fmt: skip
    ours, keras = str(folder / f"{source}-tfxfer.onnx"), str(folder / f"{source}-keras.onnx")
    arms = {
        "tfxfer, from files": ("tfxfer_speed.py", {**common, "arm": "files", "export": ours}),
        "tfxfer, decoded": ("tfxfer_speed.py", {**common, "arm": "decoded"}),
        "Pillow, one thread": ("pillow_speed.py", common),
        "onnxruntime, tfxfer's file": ("onnx_speed.py", {**common, "model": ours}),
        "Keras predict": ("keras_speed.py", {**common, "arm": "predict", "export": keras}),
        "onnxruntime, Keras' file": ("onnx_speed.py", {**common, "model": keras}),
        "tf.function": ("keras_speed.py", {**common, "arm": "function"}),
        "torch": ("torch_speed.py", {**common, "arm": "forward"}),
    }
    found = bench.measure(arms, bench.options.seconds)
    return {
        "source": source, "image_size": size_px, "photos": len(files), "arms": found,
        "goals": goals_of_extraction(source, found, available_cores()),
    }  # fmt: skip


def steps(bench: Bench, files: list[Path], frozen: str, depth: Any, batch_norm: str) -> dict[str, Any]:
    """All arms at one freeze depth."""
    size_px = bench.options.step_size
    say(f"step, {size_px} px, frozen to {frozen}, BatchNorm {batch_norm}")
    common = {
        "source": STEP_SOURCE, "image_size": size_px, "batch_size": STEP_BATCH, "freeze_depth": depth,
        "batch_norm": batch_norm, "pixels": str(bench.pixels(files, size_px)), "steps": len(files) // STEP_BATCH,
    }  # fmt: skip
    arms = {"tfxfer": ("tfxfer_speed.py", {**common, "arm": "step", "cached": False})}
    if depth:
        arms["tfxfer, cached"] = ("tfxfer_speed.py", {**common, "arm": "step", "cached": True})
    arms["Keras fit"] = ("keras_speed.py", {**common, "arm": "fit"})
    if not depth:
        arms["torch"] = ("torch_speed.py", {**common, "arm": "step"})
    found = bench.measure(arms, bench.options.seconds if depth else 2 * bench.options.seconds)
    return {"frozen": frozen, "freeze_depth": depth, "batch_norm": batch_norm, "image_size": size_px, "arms": found}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", choices=("extraction", "steps"), help="one of the two tables")
    parser.add_argument("--sources", default=",".join(SOURCES), help="of the extraction, by comma")
    parser.add_argument("--photos", type=int, default=384, help="to extract from, at each turn")
    parser.add_argument("--step-size", type=int, default=160, help="image size of the steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a turn; the whole step gets twice as long")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of the numeric libraries")
    parser.add_argument("--quick", action="store_true", help="few photos, two short rounds: to see whether it runs")
    parser.add_argument("--markdown", action="store_true", help="print tables for RESULTS.md instead of JSON")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    parser.add_argument("--venvs", type=Path, default=CACHE / "venvs", help="where the peers' environments are made")
    options = parser.parse_args(arguments)
    options.sources = options.sources.split(",")
    if unknown := [name for name in options.sources if name not in SOURCES]:
        parser.error(f"--sources does not know {', '.join(unknown)}; there are {', '.join(SOURCES)}")
    if options.quick:
        options.rounds, options.seconds, options.photos = 2, 0.3, min(options.photos, 128)
    if not (options.data / "clothing" / "train").is_dir():
        parser.error(f"there is no folder {options.data}/clothing/train; set TFXFER_DATA or give --data")
    return options


def photos(data: Path, count: int) -> list[Path]:
    """So many of clothing's training photos, from all over it."""
    files = sorted((data / "clothing" / "train").glob("*/*"))
    return [files[index] for index in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]


def main() -> int:
    options = parse()
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="tfxfer-throughput-"))
    os.environ["TFXFER_CACHE"] = str(folder / "cache")
    bench = Bench(options, folder)
    found: dict[str, list[dict[str, Any]]] = {"extraction": [], "steps": []}
    try:
        files = photos(options.data, options.photos)
        if options.only != "steps":
            found["extraction"] = [extraction(bench, name, SOURCES[name], files) for name in options.sources]
        if options.only != "extraction":
            found["steps"] = [steps(bench, photos(options.data, 640), *group) for group in GROUPS]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    goals = [goal for one in found["extraction"] for goal in one.pop("goals")] + goals_of_steps(found["steps"])
    summary = {
        "benchmark": "throughput", "date": datetime.date.today().isoformat(), "commit": commit(),
        "cores": available_cores(), "threads": options.threads, "rounds": options.rounds, "quick": options.quick,
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)], "versions": bench.versions, **found,
        "goals": goals,
    }  # fmt: skip
    print(as_markdown(summary) if options.markdown else json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
