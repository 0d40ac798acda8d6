"""Time to accuracy on `clothing`: `tfxfer train` against the two-stage Keras tutorial, from the same ImageNet weights.

    python tests/benchmarks/time_to_accuracy.py              # three seeds, about half an hour on two idle cores
    python tests/benchmarks/time_to_accuracy.py --quick      # one seed

For each seed three processes run one after the other: `tfxfer train`, the tutorial (peers/keras_tutorial.py), and
`tfxfer train --method probe`. The last is there because `tfxfer train` overwrites its probe with the fine-tuned model,
so the probe is scored with the time of a process of its own. Seconds run from the start of a process; models are scored
when their clock has stopped and no other runs. Ratios are of means over seeds, within one run of the benchmark.

Goals: a saved model as accurate as the tutorial's in a fifth of its time; the whole command, export and verification
included, in half; final accuracy three points above.

A JSON table goes to stdout, a readable one to stderr, and everything (test probabilities too) to the --out file, which
is rewritten after each process and which --skip-tutorial takes later.
"""

import argparse
import csv
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tfxfer.metrics import metric_value, paired_difference
from tfxfer.runtime.files import write_json
from tfxfer.runtime.process import versions
from tfxfer.workflow.run import load_run

HERE = Path(__file__).resolve().parent
PEER = HERE / "peers" / "keras_tutorial.py"
DATA = Path(os.environ.get("TFXFER_DATA", HERE.parents[2] / "shared" / "data")) / "clothing"
OUT = Path(tempfile.gettempdir()) / "time_to_accuracy.json"
SOURCE = "mobilenet_v2_imagenet"
SPEED_GOAL, WHOLE_GOAL, ACCURACY_GOAL = 5.0, 2.0, 0.03
SMALL_PX = 160  # the tutorial's image size; without an option tfxfer takes the source's own
OURS = {"train": [], "small": ["--image-size", SMALL_PX], "probe": ["--method", "probe"]}
ARMS = ("train", "small", "tutorial", "probe")

stderr = Console(stderr=True, highlight=False, width=120)


def warn(text: str) -> None:
    stderr.print(f"warning: {text}", markup=False)


class TestPart:
    """The images that every model is scored on, in one order.

    Attributes:
        paths: Relative to `folder`.
        class_names: Sorted.
        labels: (N,) int.
    """

    __test__ = False  # not for pytest

    def __init__(self, folder: Path):
        self.folder = folder
        self.class_names = sorted(child.name for child in folder.iterdir() if child.is_dir())
        self.paths = [f"{name}/{file.name}" for name in self.class_names for file in sorted((folder / name).iterdir())]
        self.labels = np.array([self.class_names.index(path.split("/")[0]) for path in self.paths])

    def in_order(self, probabilities: np.ndarray, class_names, paths=None) -> np.ndarray:
        """(N, K) probabilities by rows `paths` and columns `class_names`, in the order of this part."""
        rows = [list(paths).index(path) for path in self.paths] if paths is not None else np.arange(len(self.paths))
        columns = [list(class_names).index(name) for name in self.class_names]
        if probabilities.shape != (len(self.paths), len(self.class_names)):
            sys.exit(
                f"{probabilities.shape} probabilities for {len(self.paths)} test images: another test part was read."
            )
        return probabilities[rows][:, columns]

    def scored(self, probabilities: np.ndarray) -> dict[str, Any]:
        """What a record says about a model."""
        scores = {name: metric_value(name, self.labels, probabilities) for name in ("accuracy", "macro_f1")}
        return {**scores, "probabilities": np.round(probabilities.astype(float), 6).tolist()}


# -- the processes that are timed -------------------------------------------------------------------------------------


def timed(command: list[str], log: Path) -> dict[str, Any]:
    """Run a command to its end; its wall time and the load it met."""
    load = os.getloadavg()[0]
    with log.open("w", encoding="utf-8") as file:
        began = time.perf_counter()
        status = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=file, check=False).returncode
        wall = time.perf_counter() - began
    if status:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        sys.exit(f"{shlex.join(command)}\nended with status {status}:\n{tail}")
    return {"wall_seconds": round(wall, 2), "load_average": round(load, 2)}


def tfxfer_command(*arguments: Any) -> list[str]:
    """The installed command `tfxfer`, of the environment that runs this script."""
    script = Path(sys.executable).with_name("tfxfer")
    if not script.exists():
        sys.exit(f"There is no {script}; install tfxfer into this environment (pip install -e .).")
    return [str(script), *map(str, arguments)]


def run_tfxfer(seed: int, arm: str, options: argparse.Namespace, test: TestPart, work: Path) -> dict[str, Any]:
    """One `tfxfer train`; then its exported model scored."""
    out = work / f"{arm}-{seed}"
    arguments = [
        *OURS[arm],
        "--no-baseline",
        "--seed",
        seed,
        "--out",
        out,
        "--json",
        *shlex.split(options.train_options),
    ]
    command = tfxfer_command("train", options.data, "--source", SOURCE, *arguments)
    record = timed(command, work / f"{out.name}.log")
    run = load_run(out)
    timings = run.info["timings"]
    ready = timings["model_ready_after_process_start"]
    model = ready["probe"] if arm == "probe" else ready.get("fine_tune", ready["final"])
    images = [test.folder / path for path in test.paths]
    found = test.scored(test.in_order(run.predict(images), run.class_names))
    in_run = run.info["metrics"]["test"]["accuracy"]["value"]
    if abs(found["accuracy"] - in_run) > 1.5 / len(images):
        warn(f"{out.name}: accuracy {found['accuracy']:.4f} by the ONNX artifact, {in_run:.4f} in run.json")
    return {
        "seconds": {"probe": ready["probe"], "model": model, "whole": timings["process_start_to_now"]},
        "chosen": run.info["chosen"],
        "image_size": run.info["plan"]["image_size"],
        "phases": timings["seconds"],
        "groups": groups_of(out / "split.csv", test),
        **record,
        **found,
    }


def groups_of(split: Path, test: TestPart) -> list[str]:
    """For each test image the group of near-duplicates it belongs to, as the run found them."""
    with split.open(encoding="utf-8", newline="") as file:
        of_path = {row["path"]: row["group"] for row in csv.DictReader(file) if row["part"] == "test"}
    return [of_path.get(f"{test.folder.name}/{path}") or path for path in test.paths]


def run_tutorial(seed: int, options: argparse.Namespace, test: TestPart, work: Path) -> dict[str, Any]:
    """One run of the tutorial, which scores itself after its clock has stopped."""
    out = work / f"tutorial-{seed}"
    arguments = [options.data, out, "--seed", seed, "--epochs", options.tutorial_epochs]
    arguments += ["--as-written"] if options.tutorial_as_written else []
    record = timed([sys.executable, str(PEER), *map(str, arguments)], work / f"{out.name}.log")
    with np.load(out / "test.npz") as saved:
        ordered = test.in_order(saved["probabilities"], saved["class_names"].tolist(), saved["paths"].tolist())
    seconds = json.loads((out / "timing.json").read_text(encoding="utf-8"))
    return {"seconds": {key: round(value, 2) for key, value in seconds.items()}, **record, **test.scored(ordered)}


def warm_up(data: Path) -> None:
    """Convert the weights and bring files into the page cache: neither is what is compared."""
    code = f"import tfxfer; tfxfer.load_backbone({SOURCE!r}); import onnxruntime, tf2onnx, sklearn.model_selection"
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    for file in data.rglob("*.*"):
        file.read_bytes()


# -- the table --------------------------------------------------------------------------------------------------------


def make_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy and seconds over seeds for each moment that counts; a probe is timed in its own process."""
    moments = (
        ("tutorial", "model", "Keras tutorial, model saved"),
        ("probe", "model", "tfxfer train --method probe, model saved"),
        ("train", "model", "tfxfer train, model saved"),
        ("train", "whole", "tfxfer train, exported and verified"),
        ("small", "model", f"tfxfer train --image-size {SMALL_PX}, model saved"),
        ("small", "whole", f"tfxfer train --image-size {SMALL_PX}, exported and verified"),
    )
    rows = []
    for arm, moment, title in moments:
        mine = [record for record in records if record["arm"] == arm]
        if not mine:
            continue
        rows.append({"arm": arm, "moment": moment, "title": title, "seeds": [record["seed"] for record in mine]})
        for key in ("accuracy", "macro_f1"):
            values = [record[key] for record in mine]
            rows[-1][key] = round(float(np.mean(values)), 4)
            rows[-1][f"{key}_of_seeds"] = [round(value, 4) for value in values]
        seconds = [record["seconds"][moment] for record in mine]
        rows[-1] |= {"seconds": round(float(np.mean(seconds)), 2), "seconds_of_seeds": seconds}
    tutorial = next((row for row in rows if row["arm"] == "tutorial"), None)
    for row in rows if tutorial else ():
        row["times_faster"] = round(tutorial["seconds"] / row["seconds"], 2)
    return rows


def make_goals(rows: list[dict[str, Any]], records: list[dict[str, Any]], test: TestPart) -> dict[str, Any]:
    """The three goals of the benchmark: value, goal, met."""
    row_of = {(row["arm"], row["moment"]): row for row in rows}
    tutorial = row_of["tutorial", "model"]
    saved = [row_of[arm, "model"] for arm in OURS]
    saved.sort(key=lambda row: row["seconds"])
    first = next((row for row in saved if row["accuracy"] >= tutorial["accuracy"]), None)
    stacks = {
        arm: np.array([record["probabilities"] for record in records if record["arm"] == arm])
        for arm in ("train", "small", "tutorial")
    }  # fmt: skip
    groups = next(record["groups"] for record in records if record["arm"] == "train")
    speed = first["times_faster"] if first else None
    goals: dict[str, Any] = {
        "time_to_tutorial_accuracy": {
            "value": speed, "goal": SPEED_GOAL, "met": speed is not None and speed >= SPEED_GOAL,
            "first_model": first["title"] if first else "none was as accurate",
        },
    }  # fmt: skip
    for arm, name in (("train", "own size"), ("small", f"{SMALL_PX} px")):
        whole = row_of[arm, "whole"]["times_faster"]
        gain = paired_difference(stacks[arm], stacks["tutorial"], test.labels, groups=groups)
        goals[f"whole command, {name}"] = {"value": whole, "goal": WHOLE_GOAL, "met": whole >= WHOLE_GOAL}
        goals[f"accuracy, {name}"] = {
            "value": round(gain["difference"], 4), "goal": ACCURACY_GOAL, "met": gain["difference"] >= ACCURACY_GOAL,
            "low": round(gain["low"], 4), "high": round(gain["high"], 4),
            "interval": "95 %, paired bootstrap over test images and seeds",
        }  # fmt: skip
    return goals


def cells(row: dict[str, Any]) -> list[str]:
    each = ", ".join(f"{value:.3f}" for value in row["accuracy_of_seeds"])
    spread = f"{min(row['seconds_of_seeds']):.0f} to {max(row['seconds_of_seeds']):.0f}"
    numbers = (f"{row['accuracy']:.3f} ({each})", f"{row['seconds']:.1f} ({spread})", f"{row['times_faster']:.1f}")
    return [row["title"], *numbers]


def goal_cells(goals: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, goal in goals.items():
        title = f"first model as accurate as the tutorial's: {goal['first_model']}" if "first_model" in goal else name
        if "low" in goal:
            told, wanted = f"{goal['value']:+.3f} ({goal['low']:+.3f} to {goal['high']:+.3f})", f"{goal['goal']:+g}"
        else:
            told = "never" if goal["value"] is None else f"{goal['value']:.1f} times faster"
            wanted = f"{goal['goal']:g} times"
        rows.append([title, told, wanted, "met" if goal["met"] else "missed"])
    return rows


COLUMNS = ["from process start to", "test accuracy (by seed)", "seconds (range)", "times faster"]
GOAL_COLUMNS = ["goal", "measured", "wanted", ""]


def describe(result: dict[str, Any]) -> str:
    machine = result["machine"]
    text = (
        f"{result['date']}, {machine['cores']} cores, load average at the start {machine['load_average_at_start'][0]}, "
        f"Python {machine['versions']['python']}, TensorFlow {machine['versions'].get('tensorflow')}, "
        f"tfxfer at {machine['commit']}"
    )
    if result["tutorial"]["batch_norm_as_written"]:
        text += "; BatchNorm of the tutorial as Keras 3 runs it"
    if result["reused_tutorial"]:
        text += f"; tutorial reused from a run of {result['reused_tutorial']}"
    return text + ("; NOT the benchmark's settings" if result["altered"] else "")


def as_markdown(result: dict[str, Any]) -> str:
    """What belongs in RESULTS.md."""
    lines = [f"`time_to_accuracy.py`: {describe(result)}.", ""]
    tables = ((COLUMNS, [cells(row) for row in result["rows"]]), (GOAL_COLUMNS, goal_cells(result["goals"])))
    for columns, table in tables:
        head = [columns, ["---"] * len(columns)]
        lines += [f"| {' | '.join(row)} |" for row in [*head, *table]] + [""]
    return "\n".join(lines)


def show(result: dict[str, Any]) -> None:
    """The readable tables, on stderr."""
    for columns, rows in ((COLUMNS, map(cells, result["rows"])), (GOAL_COLUMNS, goal_cells(result["goals"]))):
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        stderr.print(table)
    stderr.print(describe(result), markup=False)


# -- the benchmark ----------------------------------------------------------------------------------------------------


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def tutorial_settings(options: argparse.Namespace) -> dict[str, Any]:
    return {"epochs": options.tutorial_epochs, "batch_norm_as_written": options.tutorial_as_written}


def earlier_tutorial(options: argparse.Namespace, test: TestPart) -> tuple[list[dict[str, Any]], str]:
    """The tutorial's records of an earlier --out file, and its date; refused where it measured something else."""
    if not options.skip_tutorial:
        return [], ""
    earlier = json.loads(options.skip_tutorial.read_text(encoding="utf-8"))
    records = [record for record in earlier["records"] if record["arm"] == "tutorial"]
    if earlier["test_paths"] != test.paths or earlier["tutorial"] != tutorial_settings(options) or not records:
        sys.exit(f"{options.skip_tutorial} has no tutorial of these settings on these test images; run it again.")
    return records, earlier["date"]


def benchmark(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every process of every seed; rewritten to --out after each."""
    test = TestPart(options.data / "test")
    records, reused = earlier_tutorial(options, test)
    result: dict[str, Any] = {
        "benchmark": "time_to_accuracy",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "data": {"name": options.data.name, "test": len(test.paths)},
        "source": SOURCE,
        "tutorial": tutorial_settings(options),
        "altered": (options.data.name, options.tutorial_epochs, options.train_options) != ("clothing", "10,5", ""),
        "reused_tutorial": reused,
        "machine": {
            "cores": os.cpu_count(), "commit": commit(), "versions": versions(),
            "load_average_at_start": [round(value, 2) for value in os.getloadavg()],
        },
    }  # fmt: skip
    load = result["machine"]["load_average_at_start"][0]
    if load > 0.5:
        warn(f"load average {load} at the start: others are at work, and seconds will be noisy")
    warm_up(options.data)
    for seed in range(options.seeds):
        for arm in ARMS:
            if arm == "tutorial":
                if reused:
                    continue
                record = run_tutorial(seed, options, test, work)
            else:
                record = run_tfxfer(seed, arm, options, test, work)
            records.append({"arm": arm, "seed": seed, **record})
            seconds = ", ".join(f"{key} {value:.0f}" for key, value in record["seconds"].items())
            stderr.print(f"seed {seed}, {arm}: accuracy {record['accuracy']:.3f}; seconds: {seconds}", markup=False)
            result["rows"] = make_rows(records)
            write_json(options.out, {**result, "test_paths": test.paths, "records": records})
    result["goals"] = make_goals(result["rows"], records, test)
    write_json(options.out, {**result, "test_paths": test.paths, "records": records})
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from seed 0; default 3")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--markdown", action="store_true", help="print the rows for RESULTS.md instead of JSON")
    parser.add_argument("--skip-tutorial", type=Path, metavar="FILE.json", help="take it from an earlier --out file")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE.json", help=f"full results; default {OUT}")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train/ and test/; default clothing")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep runs and logs there")
    parser.add_argument(
        "--tutorial-as-written", action="store_true", help="let the tutorial's BatchNorm move, as Keras 3 runs its code"
    )
    # For trying this script out: results say that they are not the benchmark's.
    parser.add_argument("--tutorial-epochs", default="10,5", help=argparse.SUPPRESS)
    parser.add_argument("--train-options", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.seeds = 1
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {options.seeds}")
    if not (options.data / "test").is_dir():
        parser.error(f"there is no folder {options.data / 'test'}; set TFXFER_DATA or give --data")
    if options.keep and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty")
    options.data = options.data.resolve()
    return options


def main() -> int:
    options = parse()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    work = options.keep or Path(tempfile.mkdtemp(prefix="time_to_accuracy_"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        result = benchmark(options, work)
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    show(result)
    stderr.print(f"everything: {options.out}", markup=False)
    print(as_markdown(result) if options.markdown else json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
