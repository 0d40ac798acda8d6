"""Recipe `auto` against fixed recipes: is what its table chooses within one interval of the best of them on each set?

    python tests/benchmarks/recipes.py --results DIR                              # everything; hours on two cores
    python tests/benchmarks/recipes.py --results DIR --tasks clothing-10 --seeds 1    # a part of it
    python tests/benchmarks/recipes.py --results DIR --report-only --markdown         # the tables again

Tasks and splits are those of time_to_accuracy.py, the source is MobileNetV2 with ImageNet's weights. All in one
process, without export and gate. Each (task, seed, recipe) leaves a file under --results and is not run again while it
is there; --fresh RECIPES runs those again. The best fixed recipe is the one that did best on the test part itself,
averaged over the seeds: a rival that nobody could have chosen, so the comparison is hard on `auto`.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from time_to_accuracy import CACHE, DATA, commit, say, with_choices
from tta_tasks import SEEDS, Task, make_task

from tfxfer.metrics import metric_value, paired_difference
from tfxfer.runtime.files import write_json
from tfxfer.runtime.process import versions
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Recipe, Stage
from tfxfer.train.recipes import get_recipe

SOURCE = "mobilenet_v2_imagenet"
_HEAD = Stage("probe", solver="convex", freeze_depth="all", epochs=0)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A recipe that is the same for every data set.

    Attributes:
        title: In the tables.
        tune: Of the fine-tuning stage; None: there is none.
        solver: Of the head.
        features: See `Plan.features`.
    """

    title: str
    tune: Mapping[str, Any] | None = None
    solver: str = "convex"
    features: str = "last"

    @property
    def recipe(self) -> Recipe:
        """As `tfxfer` takes it."""
        stages: tuple[Stage, ...] = (dataclasses.replace(_HEAD, solver=self.solver),)
        if self.tune is not None:
            stages = (*stages, Stage("fine_tune", **self.tune))
        return Recipe("fixed", stages)


FIXED = {
    "prototype": Fixed("class means", solver="prototype"),
    "ridge": Fixed("ridge", solver="ridge"),
    "probe": Fixed("logistic probe"),
    "probe_multi": Fixed("logistic probe on several blocks", features="multi"),
    "last_blocks": Fixed("probe, last 30 % tuned, blend", tune={}),
    "affine": Fixed(
        "probe, all blocks tuned, affine BatchNorm, block-wise rates",
        tune={"freeze_depth": 0, "batch_norm": "affine", "layer_decay": 0.8},
    ),
    "all_blocks": Fixed("probe, all blocks tuned", tune={"freeze_depth": 0}),
    "batch_norm": Fixed("probe, all blocks tuned with BatchNorm", tune={"freeze_depth": 0, "batch_norm": "train"}),
}
ARMS = {**{name: fixed.title for name, fixed in FIXED.items()}, "auto": "auto"}


def plan_of(arm: str, task: Task, image_size: int) -> Plan:
    """What `tfxfer train` would be told."""
    fixed = FIXED.get(arm)
    return Plan(
        SOURCE, fixed.recipe if fixed else get_recipe("auto"), features=fixed.features if fixed else "auto",
        image_size=image_size, seed=task.seed, baseline="none", near_duplicates=task.near_duplicates or "on",
    )  # fmt: skip


def run_arm(arm: str, task: Task, folder: Path, image_size: int) -> dict[str, Any]:
    """Train once; scores, what was chosen, seconds and the test part's probabilities."""
    from tfxfer.workflow.training import train

    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    run = train(task.folder, plan_of(arm, task, image_size), out=folder, formats=(), progress=Progress())
    seconds = time.perf_counter() - began
    found = np.asarray(run.model.predict(_pixels(task, image_size), batch_size=64, verbose=0))
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "arm": arm, "task": task.name, "seed": task.seed, "image_size": image_size, "seconds": round(seconds, 1),
        "chosen": run.info["chosen"], "rule": run.info["selection"].get("auto", {}).get("rule"),
        "validation": run.info.get("metrics", {}).get("validation", {}).get("accuracy"),
        "probabilities": np.round(task.in_order(task.paths, run.class_names, found), 5).tolist(),
    }  # fmt: skip


def _pixels(task: Task, image_size: int) -> np.ndarray:
    from tfxfer.runtime.images import decode_image

    return np.stack([decode_image(task.folder / "test" / path, image_size) for path in task.paths])


def summarise(records: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> dict[str, Any]:
    """Accuracy by task and recipe, and `auto` against the best fixed one.

    Args:
        records: As `run_arm` makes them.
        tasks: Those that the records may be of.

    Returns:
        rows and comparisons; what JSON can hold.
    """
    by_key = {(record["task"], record["seed"], record["arm"]): record for record in records}
    task_of = {(task.name, task.seed): task for task in tasks}

    def accuracy(key: tuple[str, int, str]) -> float:
        return metric_value("accuracy", task_of[key[:2]].labels, np.array(by_key[key]["probabilities"]))

    rows, comparisons = [], []
    for name in SEEDS:
        # Only seeds that all have: a mean over other seeds is another number.
        seeds = [seed for seed in range(SEEDS[name]) if all((name, seed, arm) in by_key for arm in ARMS)]
        if not seeds:
            continue
        scores = {arm: float(np.mean([accuracy((name, seed, arm)) for seed in seeds])) for arm in ARMS}
        rows += [
            {
                "task": name, "arm": arm, "seeds": seeds, "accuracy": round(scores[arm], 4),
                "seconds": round(float(np.mean([by_key[name, seed, arm]["seconds"] for seed in seeds])), 1),
            }
            for arm in ARMS
        ]  # fmt: skip
        best = max(FIXED, key=scores.__getitem__)
        task = task_of[name, seeds[0]]
        ours, theirs = (
            np.array([by_key[name, seed, arm]["probabilities"] for seed in seeds]) for arm in ("auto", best)
        )
        found = paired_difference(ours, theirs, task.labels, groups=task.groups)
        comparisons.append(
            {
                "task": name, "best": best, "rules": sorted({by_key[name, seed, "auto"]["rule"] for seed in seeds}),
                **{key: round(float(value), 4) for key, value in found.items()}, "within": bool(found["high"] >= 0),
            }
        )  # fmt: skip
    return {"rows": rows, "comparisons": comparisons}


def as_markdown(summary: Mapping[str, Any]) -> str:
    """The tables for RESULTS.md."""
    names = list(dict.fromkeys(row["task"] for row in summary["rows"]))
    cell = {(row["task"], row["arm"]): row for row in summary["rows"]}
    lines = [
        "Test accuracy (seconds of training):", "",
        f"| recipe | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}",
    ]  # fmt: skip
    for arm, title in ARMS.items():
        told = [f"{cell[name, arm]['accuracy']:.3f} ({cell[name, arm]['seconds']:.0f})" for name in names]
        lines.append(f"| {title} | {' | '.join(told)} |")
    lines += [
        "",
        "| task | best fixed recipe | auto less it (95 %) | within its interval |",
        "| --- | --- | --- | --- |",
    ]
    for one in summary["comparisons"]:
        told = f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
        lines.append(f"| {one['task']} | {ARMS[one['best']]} | {told} | {'yes' if one['within'] else 'NO'} |")
    rules = {f"{one['task']}: {rule}" for one in summary["comparisons"] for rule in one["rules"] if rule}
    return "\n".join([*lines, "", *(f"- {rule}" for rule in sorted(rules))])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=CACHE / "recipes", help="records and data")
    parser.add_argument("--tasks", default=",".join(SEEDS), help="which, by comma")
    parser.add_argument("--arms", default=",".join(ARMS), help="which, by comma")
    parser.add_argument("--seeds", type=int, default=99, help="at most so many a task")
    parser.add_argument("--fresh", default="", help="recipes to run again though there are records, by comma")
    parser.add_argument("--image-size", type=int, default=128, help="pixels")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--markdown", action="store_true", help="print tables for RESULTS.md instead of JSON")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    return with_choices(parser, parser.parse_args(), ARMS)


def main() -> int:
    """Run what has no record yet, and print what follows from all records."""
    options = parse()
    wanted = [(name, seed) for name in options.tasks for seed in range(min(SEEDS[name], options.seeds))]
    wanted.sort(key=lambda pair: pair[1])
    if options.report_only:
        wanted = [(name, seed) for name, seed in wanted if (options.results / "data" / f"{name}-{seed}").is_dir()]
    tasks = [make_task(name, seed, options.data, options.results) for name, seed in wanted]
    records = []
    for task in tasks:
        for arm in ARMS:
            file = options.results / "records" / f"{task.name}-{task.seed}" / f"{arm}-{options.image_size}.json"
            if not options.report_only and arm in options.arms and (not file.exists() or arm in options.fresh):
                file.parent.mkdir(parents=True, exist_ok=True)
                record = run_arm(arm, task, options.results / "run", options.image_size)
                write_json(file, record | {"commit": commit()})
                say(f"{task.name}, seed {task.seed}, {arm}: {record['seconds']:.0f} s, {record['rule'] or ''}")
            if file.exists():
                records.append(json.loads(file.read_text(encoding="utf-8")))
    summary = {
        "benchmark": "recipes", "image_size": options.image_size, "cores": os.cpu_count(), "versions": versions(),
        "commits": sorted({record["commit"] for record in records}), **summarise(records, tasks),
    }  # fmt: skip
    print(as_markdown(summary) if options.markdown else json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
