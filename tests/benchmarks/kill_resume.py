"""Kill a training at random moments, resume it, and compare the weights with those of a run that was never stopped.

    python tests/benchmarks/kill_resume.py --times 30 --json
    python tests/benchmarks/kill_resume.py --times 50 --in-save

Every fifth of the random moments lies in a run with exports, the others end with the scores. With --in-save each trial
kills the process inside a save of a checkpoint (which is done without pause then).

Each training is a process of its own, ended by a real SIGKILL. They are forked from this one, which has imported
everything and computed nothing: the imports would take most of the time.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

PLAN: dict[str, Any] = {
    "source": "digits_cnn", "freeze_depth": "conv3", "epochs": 8, "learning_rate": 2e-3, "baseline": "none",
    "augment": "none",
}  # fmt: skip
EVERY_SECONDS = 0.2
EXPORTING = 5
SLOW_SAVE_SECONDS = 0.02
PIECES = 12  # of a checkpoint, the smallest number that any has being less


class Child:
    """A forked process that trains.

    Args:
        data, out: As `tfxfer train` takes them.
        export: Whether it exports.
        resume: Whether it goes on with what is in `out`.
        slow_saves: Whether it saves after each batch, says "saving" in the middle of some piece of each save, and waits
            a little there.
    """

    def __init__(self, data: Path, out: Path, *, export: bool = False, resume: bool = False, slow_saves: bool = False):
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if not self.process:
            os.close(reading)
            os.dup2(writing, 2)
            _end(lambda: _train(data, out, export=export, resume=resume, slow_saves=slow_saves))
        os.close(writing)
        self.told = os.fdopen(reading, encoding="utf-8", errors="replace")

    def line(self, wanted: str) -> str:
        """The next line with these words; empty where it ended before."""
        return next((line for line in self.told if wanted in line), "")

    def killed(self) -> None:
        """Killed, with whatever processes it has begun."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        self.told.close()

    def finished(self) -> str:
        """What it told until its end, which must be a good one."""
        text = self.told.read()
        _, status = os.waitpid(self.process, 0)
        self.told.close()
        if status:
            raise SystemExit(f"the training failed ({status}):\n{text[-2000:]}")
        return text


def _end(work: Callable[[], None]) -> None:
    """Do the work and end this process, which has nothing to clean up that is its own."""
    status = 1
    try:
        os.setpgid(0, 0)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        work()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def _train(data: Path, out: Path, *, export: bool, resume: bool, slow_saves: bool) -> None:
    """What `tfxfer train` does, on the way of the command line."""
    from tfxfer.train import checkpoint, journal
    from tfxfer.workflow.planning import make_plan
    from tfxfer.workflow.start import train_early

    if slow_saves:
        journal.SAVE_SHARE = 1e6  # saves may take all the time
        put, at = checkpoint._put, 0

        def slowly(file, digest, content):
            nonlocal at
            at = random.randrange(PIECES) if content == checkpoint.MAGIC else at - 1
            if at:
                return put(file, digest, content)
            put(file, digest, content[: len(content) // 2])
            file.flush()
            print("saving", file=sys.stderr, flush=True)
            time.sleep(SLOW_SAVE_SECONDS)
            put(file, digest, content[len(content) // 2 :])

        checkpoint._put = slowly
    train_early(
        data, make_plan(**PLAN), out=out, split=None, progress=_lines(), resume=resume,
        formats=("saved_model", "onnx") if export else (), checkpoint_seconds=0.0 if slow_saves else EVERY_SECONDS,
    )  # fmt: skip


def _lines() -> Any:
    from tfxfer.cli.show import Live

    return Live()


def weights_of(run: Path) -> dict[str, np.ndarray]:
    """Everything in model.keras' weights, by its path."""
    found = {}
    with zipfile.ZipFile(run / "model.keras") as archive, archive.open("model.weights.h5") as file:
        h5py.File(file).visititems(
            lambda name, node: found.update({name: node[()]}) if isinstance(node, h5py.Dataset) else None
        )
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


class Whole:
    """A run that is never stopped: its weights, its seconds from its first features on, and how often it saves."""

    def __init__(self, data: Path, out: Path, *, export: bool, slow_saves: bool):
        child = Child(data, out, export=export, slow_saves=slow_saves)
        child.line("frozen features")
        began = time.monotonic()
        self.num_saves = child.finished().count("saving")
        self.seconds, self.weights = time.monotonic() - began, weights_of(out)


def kill(data: Path, out: Path, *, export: bool, seconds: float = 0.0, save: int = 0) -> str:
    """Kill it so many seconds after its first features, or else in its nth save; returns how far it came."""
    child = Child(data, out, export=export, slow_saves=save > 0)
    if save:
        for _ in range(save):
            child.line("saving")
        time.sleep(random.uniform(0, SLOW_SAVE_SECONDS))
    else:
        child.line("frozen features")
        time.sleep(seconds)
    child.killed()
    if not (out / "run.json").is_file():
        return "before the run began"
    return json.loads((out / "run.json").read_text())["status"]


def write_data(folder: Path, seed: int) -> None:
    """Ten digits of each of five classes to train on, five to test on."""
    from tfxfer.workflow.digits import NAMES, write_digits

    write_digits(folder, per_class=10, seed=seed)
    for name in NAMES[5:]:
        for part in ("train", "test"):
            shutil.rmtree(folder / part / name)
    for name in NAMES[:5]:
        for surplus in sorted((folder / "test" / name).iterdir())[5:]:
            surplus.unlink()


def trials(times: int, in_save: bool, seed: int) -> dict:
    """Run them all."""
    random.seed(seed)
    for module in ("keras", "tfxfer.cli", "tfxfer.workflow.training", "tf2onnx", "onnxruntime"):
        importlib.import_module(module)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="tfxfer-kill-"))
    try:
        data = folder / "digits"
        write_data(data, seed)
        wholes = {
            export: Whole(data, folder / f"whole-{export}", export=export, slow_saves=in_save)
            for export in ({False} if in_save else {False, True})
        }
        rows = []
        for number in range(times):
            out, export = folder / f"run-{number}", not in_save and number % EXPORTING == 0
            whole = wholes[export]
            moment: dict[str, Any] = (
                {"save": random.randint(1, whole.num_saves)}
                if in_save
                else {"seconds": random.uniform(0, whole.seconds)}
            )
            at = kill(data, out, export=export, **moment)
            resumable = (out / "run.json").is_file()
            text = Child(data, out, export=export, resume=resumable).finished()
            info = json.loads((out / "run.json").read_text())
            match = same(whole.weights, weights_of(out))
            rows.append({
                "killed_at": moment, "export": export, "status": at, "resumed": info["resumed"], "equal": match,
                "complete": info["status"] == "complete",
            })  # fmt: skip
            print(number, at, info["resumed"][-1:], "equal" if match else f"DIFFERS\n{text}", file=sys.stderr)
            shutil.rmtree(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "times": times,
        "bit_identical": sum(row["equal"] and row["complete"] for row in rows),
        "went_on": sum(bool(row["resumed"]) for row in rows),
        "killed_before_the_run_began": sum(row["status"] == "before the run began" for row in rows),
        "seconds_unstopped": {"with exports" if export else "without": w.seconds for export, w in wholes.items()},
        "saves_of_the_unstopped": {
            "with exports" if export else "without": w.num_saves for export, w in wholes.items()
        },
        "seconds": time.monotonic() - began,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--in-save", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = trials(given.times, given.in_save, given.seed)
    if given.json:
        json.dump(found, sys.stdout, indent=2)
    else:
        where = sorted({re.sub(r"[-\d].*", "", row["status"]) for row in found["rows"]})
        print(
            f"{found['bit_identical']} of {given.times} bit-identical, {found['went_on']} went on from a checkpoint or "
            f"a finished unit, {found['seconds']:.0f} s; killed while: {', '.join(where)}"
        )


if __name__ == "__main__":
    main()
