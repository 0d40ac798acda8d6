"""Time to accuracy: `tfxfer train` against what people use today, from the same ImageNet weights of MobileNetV2.

    python tests/benchmarks/time_to_accuracy.py --results DIR                 # everything; many hours on two cores
    python tests/benchmarks/time_to_accuracy.py --results DIR --tasks clothing-10 --seeds 1     # a part of it
    python tests/benchmarks/time_to_accuracy.py --results DIR --report-only --markdown          # the tables again

Peers (tests/benchmarks/peers/), each in a process of its own: the two-stage Keras tutorial, plain Keras `fit` of our
recipe, fastai `fine_tune`, timm-style fine-tuning, and the strong cached ones: Keras `predict` features with a Dense
head, timm features with scikit-learn's LogisticRegression. Tasks: clothing, trashnet, bloodcells (copies grouped), and
ten labelled images a class of each (eight to train, two to validate). tfxfer splits once for all; nobody sees the test
part before its clock has stopped. Each peer has the image size and epochs that suit it, and is cut after
--limit-seconds of all cores, counted in CPU time, with the accuracy that it has then.

Each (task, seed, peer) leaves a file under --results and is not run again while it is there, so a benchmark can be
continued; --fresh ARMS runs those again. --keep copies the records to tests/benchmarks/records/, where a checkout on
another day finds those that it has not of its own; the tables say on which days and processors they were taken. Seconds
are of the process from its start to its saved model, wall and CPU; where other jobs ran beside, wall time says little,
so the tables take both, and ratios compare like with like only where the records come from one call. A JSON document
goes to stdout, tables with --markdown.
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tta_peers import ARMS, OURS, PEERS, PEERS_FOLDER, run_arm
from tta_tables import as_markdown, summarise
from tta_tasks import SEEDS, Task, make_task

from tfxfer.runtime.files import atomic_path, write_json
from tfxfer.runtime.process import versions

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tfxfer-benchmarks"
KEPT = Path(__file__).resolve().parent / "records"
DATA = Path(os.environ.get("TFXFER_DATA", PEERS_FOLDER.parents[3] / "shared" / "data"))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PEERS_FOLDER, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "tfxfer", "models") else "")


def processor() -> str:
    """Its name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def record_file(results: Path, task: Task, arm: str) -> Path:
    return results / "records" / f"{task.name}-{task.seed}" / f"{arm}.json"


def kept_file(task: Task, arm: str) -> Path:
    return KEPT / f"{task.name}-{task.seed}" / f"{arm}.json.gz"


def read_record(results: Path, task: Task, arm: str) -> dict[str, Any] | None:
    """The record of this folder, else the one that is kept in the checkout."""
    own, kept = record_file(results, task, arm), kept_file(task, arm)
    if own.exists():
        return json.loads(own.read_text(encoding="utf-8"))
    return json.loads(gzip.decompress(kept.read_bytes())) if kept.exists() else None


def keep_records(results: Path, tasks: list[Task]) -> None:
    """Copy what was recorded here into the checkout."""
    for task in tasks:
        for arm in ARMS:
            own, kept = record_file(results, task, arm), kept_file(task, arm)
            if own.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(kept) as temporary:
                    temporary.write_bytes(gzip.compress(own.read_bytes(), mtime=0))


def run_all(options: argparse.Namespace, tasks: list[Task]) -> None:
    """Every (task, seed, arm) that has no record yet; one that fails is told and left out."""
    for task in tasks:
        for arm in options.arms:
            file = record_file(options.results, task, arm)
            if arm not in options.fresh and read_record(options.results, task, arm) is not None:
                continue
            try:
                record = run_arm(arm, task, options.results / "runs" / f"{task.name}-{task.seed}" / arm, options)
            except (RuntimeError, OSError):
                say(f"{task.name}, seed {task.seed}, {arm} failed:\n{traceback.format_exc(limit=1)}")
                continue
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            record |= {"commit": commit(), "date": now, "processor": processor()}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, record)
            model = record["seconds"]["model"]
            say(f"{task.name}, seed {task.seed}, {arm}: model in {model['wall']:.0f} s, {model['cpu']:.0f} s of CPU")


def read_records(options: argparse.Namespace, tasks: list[Task]) -> list[dict[str, Any]]:
    found = [read_record(options.results, task, arm) for task in tasks for arm in ARMS]
    return [record for record in found if record is not None]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=CACHE / "time_to_accuracy", help="records, runs and data")
    parser.add_argument("--tasks", default=",".join(SEEDS), help="which, by comma")
    parser.add_argument("--arms", default=",".join(ARMS), help="which, by comma; 'peers' and 'ours' stand for all")
    parser.add_argument("--seeds", type=int, help="at most so many a task")
    parser.add_argument("--fresh", default="", help="arms to run again though there are records, by comma")
    parser.add_argument("--keep", action="store_true", help="copy the records into this checkout")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--markdown", action="store_true", help="print tables for RESULTS.md instead of JSON")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    parser.add_argument("--venvs", type=Path, default=CACHE / "venvs", help="where the peers' environments are made")
    parser.add_argument("--limit-seconds", type=float, default=900, help="of all cores, for each peer")
    parser.add_argument("--threads", type=int, help="of the numeric libraries; all cores by default")
    parser.add_argument("--niceness", type=int, default=0)
    parser.add_argument("--epochs-scale", type=float, default=1.0, help=argparse.SUPPRESS)  # for trying it out
    parser.add_argument("--train-options", default="", help="more options of tfxfer train")
    options = parser.parse_args(arguments)
    groups = {"peers": list(PEERS), "ours": list(OURS)}
    return with_choices(parser, options, ARMS, groups)


def with_choices(
    parser: argparse.ArgumentParser, options: argparse.Namespace, arms: Collection[str],
    groups: Mapping[str, list[str]] = MappingProxyType({}),
) -> argparse.Namespace:  # fmt: skip
    """--tasks, --arms and --fresh as lists, and absolute folders; what is unknown or not there ends the script."""
    for name, known in (("tasks", SEEDS), ("arms", arms), ("fresh", arms)):
        chosen = [one for word in getattr(options, name).split(",") if word for one in groups.get(word, [word])]
        if unknown := [one for one in chosen if one not in known]:
            parser.error(f"--{name} does not know {', '.join(unknown)}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    if not options.report_only and not options.data.is_dir():
        parser.error(f"there is no folder {options.data}; set TFXFER_DATA or give --data")
    options.results, options.data = options.results.resolve(), options.data.resolve()
    return options


def main() -> int:
    options = parse()
    wanted = [(name, seed) for name in options.tasks for seed in range(min(SEEDS[name], options.seeds or 99))]
    if options.report_only and not KEPT.is_dir():
        wanted = [(name, seed) for name, seed in wanted if (options.results / "data" / f"{name}-{seed}").is_dir()]
    # The first seed of all tasks before the second of any: what is there early compares most.
    wanted.sort(key=lambda pair: pair[1])
    tasks = [make_task(name, seed, options.data, options.results) for name, seed in wanted]
    if not options.report_only:
        run_all(options, tasks)
    if options.keep:
        keep_records(options.results, tasks)
    summary = {
        "benchmark": "time_to_accuracy", "cores": os.cpu_count(), "versions": versions(), "commit": commit(),
        **summarise(read_records(options, tasks), tasks),
    }  # fmt: skip
    print(as_markdown(summary) if options.markdown else json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
