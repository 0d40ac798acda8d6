"""A search over freeze depth: `tfxfer search` against plain KerasTuner, the same depths, trials and epochs in one run.

    python tests/benchmarks/search.py --markdown                  # half an hour on two cores
    python tests/benchmarks/search.py --trials 2 --epochs 1       # to see whether it runs

Ten trials over the depth of MobileNetV2 on clothing, by grid. KerasTuner's trials run `model.fit` on the whole network;
ours share what is frozen. Both begin in an empty folder, ours with an empty cache. Beside them one plain fine-tuning
(peers/keras_fit.py). Wall seconds of the trials alone, and of each process from its start to its end; ours ends with a
trained, scored, exported and verified model, KerasTuner's with the best trial's weights. Validation accuracy is that of
the best epoch of the best trial, on the same images. A JSON document goes to stdout, a table with --markdown.
"""

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from time_to_accuracy import CACHE, DATA, commit, say
from tta_peers import PEERS_FOLDER, SOURCE
from tta_tasks import Task, make_task

from tfxfer.runtime.process import versions
from tfxfer.sources.catalog import get_source
from tfxfer.tuning.space import depths_of

GOAL_TIMES, GOAL_OF_ONE = 5.0, 2.0


def timed(command: list[str], log: Path, **variables: str) -> float:
    """Run to the end; its wall seconds."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **variables}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PEERS_FOLDER.parents[2]), os.getenv("PYTHONPATH")]))
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=file, env=environment, check=False)
    if done.returncode not in (0, 1):  # 1: the gate's verdict
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)}\nended with status {done.returncode}:\n{tail}")
    return time.perf_counter() - began


def compare(options: argparse.Namespace, task: Task, folder: Path) -> dict[str, Any]:
    """Run all three, one after the other."""
    depths = depths_of(get_source(SOURCE), options.trials)
    common = ["--seed", str(task.seed)]
    say(f"{len(depths)} depths: {depths}")
    ours = [
        sys.executable, "-m", "tfxfer", "search", str(task.folder), "--source", SOURCE, "--tuner", "grid", "--trials",
        str(len(depths)), "--search", "freeze_depth", "--epochs", str(options.epochs), "--image-size",
        str(options.image_size), "--no-early-stop", "--no-baseline", "--out", str(folder / "ours"), *common,
    ]  # fmt: skip
    whole = timed(ours, folder / "ours.log", TFXFER_CACHE=str(folder / "cache"))
    info = json.loads((folder / "ours" / "run.json").read_text(encoding="utf-8"))
    found = info["search"]
    say(f"ours: {whole:.0f} s, trials {found['trial_seconds']:.0f} s, {found['score']['value']:.3f}")
    one = timed(
        [sys.executable, str(PEERS_FOLDER / "keras_fit.py"), str(task.folder), str(folder / "one"), "--image-size",
         str(options.image_size), *common],
        folder / "one.log",
    )  # fmt: skip
    say(f"one plain fine-tuning: {one:.0f} s")
    plain = [
        sys.executable, str(PEERS_FOLDER / "keras_tuner_plain.py"), str(task.folder), str(folder / "plain"),
        "--image-size", str(options.image_size), "--depths", ",".join(map(str, depths)), "--epochs",
        str(options.epochs), *common,
    ]  # fmt: skip
    (folder / "plain").mkdir(exist_ok=True)
    plain_whole = timed(plain, folder / "plain.log")
    told = json.loads((folder / "plain" / "plain.json").read_text(encoding="utf-8"))
    return {
        "depths": depths,
        "tfxfer": {
            "trial_seconds": found["trial_seconds"], "seconds": found["seconds"], "whole_seconds": whole,
            "score": found["score"]["value"], "corrected": found["score"]["corrected"], "values": found["values"],
            "passes": found["passes"], "test": info["metrics"]["test"]["accuracy"],
            "scores": scores_of(folder / "ours" / "search.csv"),
        },
        "keras_tuner": {"whole_seconds": plain_whole, **told},
        "one_fine_tuning": {"whole_seconds": one},
    }  # fmt: skip


def scores_of(table: Path) -> dict[str, float]:
    """Depth to validation accuracy."""
    with table.open(newline="", encoding="utf-8") as file:
        return {row["freeze_depth"]: float(row["val_accuracy"]) for row in csv.DictReader(file)}


def goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the search is to reach, and what it did."""
    ours, plain, one = found["tfxfer"], found["keras_tuner"], found["one_fine_tuning"]
    rows = [
        ("trials: KerasTuner's seconds to ours", plain["seconds"] / ours["trial_seconds"], GOAL_TIMES, True),
        (
            "whole process: KerasTuner's seconds to ours",
            plain["whole_seconds"] / ours["whole_seconds"],
            GOAL_TIMES,
            True,
        ),
        ("validation accuracy of the best: ours less KerasTuner's", ours["score"] - plain["score"], 0.0, True),
        ("the whole search to one plain fine-tuning", ours["whole_seconds"] / one["whole_seconds"], GOAL_OF_ONE, False),
    ]
    return [
        {"goal": name, "value": value, "wanted": wanted, "met": value >= wanted if more else value <= wanted}
        for name, value, wanted, more in rows
    ]


def as_markdown(summary: dict[str, Any]) -> str:
    """For RESULTS.md."""
    ours, plain, one = (summary[name] for name in ("tfxfer", "keras_tuner", "one_fine_tuning"))
    told = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines = [
        f"{summary['date']}, {summary['cores']} cores, load average {summary['load']:.2f} before, tfxfer at "
        f"{summary['commit']}; {told}.", "",
        "| | trials, s | whole process, s | best validation accuracy | at depth |", "| --- | --- | --- | --- | --- |",
        f"| `tfxfer search` | {ours['trial_seconds']:.0f} | {ours['whole_seconds']:.0f} | {ours['score']:.3f} | "
        f"{ours['values']['freeze_depth']} taken |",
        f"| KerasTuner, `fit` | {plain['seconds']:.0f} | {plain['whole_seconds']:.0f} | {plain['score']:.3f} | "
        f"{plain['freeze_depth']} |",
        f"| one fine-tuning in Keras | | {one['whole_seconds']:.0f} | | |", "",
        "| depth | " + " | ".join(map(str, summary["depths"])) + " |", "| --- |" + " --- |" * len(summary["depths"]),
        *(
            f"| {name} | " + " | ".join(_of(scores, depth) for depth in summary["depths"]) + " |"
            for name, scores in (("tfxfer", ours["scores"]), ("KerasTuner", plain["scores"]))
        ), "",
        "| goal | measured | wanted | |", "| --- | --- | --- | --- |",
        *(
            f"| {row['goal']} | {row['value']:.3g} | {row['wanted']:g} | {'met' if row['met'] else 'missed'} |"
            for row in summary["goals"]
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def _of(scores: dict[str, float], depth: int) -> str:
    return f"{scores[str(depth)]:.3f}" if str(depth) in scores else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--task", default="clothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=CACHE / "time_to_accuracy", help="where the task's data lie")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    task = make_task(options.task, options.seed, options.data.resolve(), options.results.resolve())
    folder = Path(tempfile.mkdtemp(prefix="tfxfer-search-"))
    try:
        found = compare(options, task, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    summary = {
        "benchmark": "search", "date": datetime.date.today().isoformat(), "cores": os.cpu_count(), "load": load,
        "versions": versions(), "commit": commit(), **found, "goals": goals(found),
    }  # fmt: skip
    print(as_markdown(summary) if options.markdown else json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
