"""Kill a training at random moments, resume it, and compare the weights with those of a run that was never stopped.

    python tests/benchmarks/kill_resume.py --times 30 --json
    python tests/benchmarks/kill_resume.py --times 50 --in-save

With --in-save each trial kills the process inside a save of a checkpoint (which is done without pause then).
"""

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np

TRAIN = """
import sys, time
sys.argv[0] = "tfxfer"
if "--slow-saves" in sys.argv:  # a save takes long, so that a kill hits one
    sys.argv.remove("--slow-saves")
    import os
    import tfxfer.train.checkpoint as checkpoint
    put = checkpoint._put
    def slowly(file, digest, content):
        put(file, digest, content[: len(content) // 2])
        file.flush()
        print("saving", flush=True)
        time.sleep(0.02)
        put(file, digest, content[len(content) // 2 :])
    checkpoint._put = slowly
from tfxfer.cli import main
main()
"""


def command(data: Path, out: Path, *more: str) -> list[str]:
    options = ["--source", "digits_cnn", "--freeze", "conv1", "--epochs", "40", "--lr", "2e-3", "--no-baseline"]
    every = ["--checkpoint-every", "0.2"]
    return [sys.executable, "-c", TRAIN, "train", str(data), "--out", str(out), *options, *every, *more]


def finish(data: Path, out: Path, *more: str) -> str:
    ended = subprocess.run(command(data, out, *more), capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"the training failed:\n{ended.stderr[-2000:]}")
    return ended.stderr


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


def phase_seconds(text: str) -> tuple[float, float]:
    """When training began and when it ended, by the lines of the unstopped run."""
    stamps = [(float(match[1]), match[2]) for match in re.finditer(r"\[ *([\d.]+) s\] (.*)", text)]
    begin = next(second for second, what in stamps if what.startswith("frozen features"))
    end = next(second for second, what in stamps if what.startswith("scoring"))
    return begin, end


def killed(data: Path, out: Path, seconds: float | None) -> str:
    """Kill it so many seconds after its training began, or else in a random save; returns how far it came."""
    more = () if seconds is not None else ("--slow-saves",)
    told, other = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(
        command(data, out, *more), text=True, stdout=other if seconds is not None else told,
        stderr=told if seconds is not None else other,
    )  # fmt: skip
    if seconds is not None:
        next(line for line in process.stderr if "frozen features" in line)
        time.sleep(seconds)
    else:
        left = random.randint(1, 30)
        for line in process.stdout:
            left -= line.startswith("saving")
            if left <= 0:
                time.sleep(random.uniform(0, 0.02))
                break
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (out / "run.json").is_file():
        return "before the run began"
    return json.loads((out / "run.json").read_text())["status"]


def trials(times: int, in_save: bool, seed: int) -> dict:
    """Run them all."""
    random.seed(seed)
    folder = Path(tempfile.mkdtemp(prefix="tfxfer-kill-"))
    try:
        from tfxfer.workflow.digits import write_digits

        data = write_digits(folder / "digits", per_class=20, seed=seed)
        began = time.monotonic()
        told = finish(data, folder / "whole")
        lasted, reference = time.monotonic() - began, weights_of(folder / "whole")
        first, last = phase_seconds(told)
        equal, loaded, rows = 0, 0, []
        for number in range(times):
            out = folder / f"run-{number}"
            seconds = None if in_save else random.uniform(0, last - first)
            at = killed(data, out, seconds)
            resumable = (out / "run.json").is_file()
            text = finish(data, out, *(["--resume"] if resumable else []))
            info = json.loads((out / "run.json").read_text())
            match = same(reference, weights_of(out))
            equal, loaded = equal + match, loaded + (not resumable or bool(info["resumed"]))
            rows.append({"killed_after": seconds, "status": at, "resumed": info["resumed"], "equal": match})
            print(number, at, info["resumed"][-1:], "equal" if match else f"DIFFERS\n{text}", file=sys.stderr)
            shutil.rmtree(out)
        return {"times": times, "bit_identical": equal, "loadable": loaded, "seconds_unstopped": lasted, "rows": rows}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
        print(f"{found['bit_identical']} of {given.times} bit-identical, {found['loadable']} went on from a checkpoint")


if __name__ == "__main__":
    main()
