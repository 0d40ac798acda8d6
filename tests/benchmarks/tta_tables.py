"""What time_to_accuracy.py concludes from its records, and how it is written down."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tta_peers import ARMS, OURS, PEERS
from tta_tasks import SEEDS, Task

from tfxfer.metrics import metric_value, paired_difference

PROBE_GOAL, BACKBONE_GOAL = 10.0, 5.0  # times faster than the best peer to its accuracy
WORSE_GOAL, BETTER_GOAL = 0.01, 0.03  # never worse by more than this; better by this on average
# Moments at which we have a model, (arm, moment): the first that is as good as a peer's last is when we are there.
MODELS = (("tfxfer_probe", "model"), ("tfxfer", "model"))
WHOLE = (("tfxfer", "whole"), ("tfxfer_gate", "whole"))


def summarise(records: Sequence[dict[str, Any]], tasks: Sequence[Task]) -> dict[str, Any]:
    """Rows by task and arm, comparisons by task and peer, and the goals.

    Args:
        records: As `run_arm` makes them.
        tasks: Those that the records may be of.

    Returns:
        rows, comparisons, pooled, goals; what JSON can hold.
    """
    by_key = {(record["task"], record["seed"], record["arm"]): record for record in records}
    task_of = {(task.name, task.seed): task for task in tasks}
    names = [name for name in SEEDS if any(key[0] == name for key in by_key)]
    rows = [row for name in names for arm in ARMS if (row := _row(name, arm, by_key, task_of))]
    comparisons = [
        comparison for name in names for peer in PEERS if (comparison := _comparison(name, peer, by_key, task_of))
    ]
    return {
        "rows": rows,
        "comparisons": comparisons,
        "pooled": _pooled(comparisons),
        "goals": _goals(comparisons),
        "missing": [f"{name}: {arm}" for name in names for arm in ARMS if not _seeds(name, [arm], by_key)],
        "altered": sorted(f"{r['task']} {r['seed']} {r['arm']}" for r in records if r.get("altered")),
        "threads": sorted({str(record.get("threads") or "all") for record in records}),
        "load_average": [min((r["load_average"][0] for r in records), default=0.0),
                         max((r["load_average"][0] for r in records), default=0.0)],
        "taken": sorted({f"{r['date'][:10]}, {r['processor']}" for r in records if "processor" in r}),
        "commits_of_tfxfer": sorted({r["commit"] for r in records if r["arm"] in OURS}),
    }  # fmt: skip


def _seeds(name: str, arms: Sequence[str], by_key: dict) -> list[int]:
    """Seeds of which all arms have a record."""
    return [seed for seed in range(SEEDS[name]) if all((name, seed, arm) in by_key for arm in arms)]


def _mean(name: str, arm: str, seeds: Sequence[int], by_key: dict, value) -> float:
    return float(np.mean([value(by_key[name, seed, arm]) for seed in seeds]))


def _score(metric: str, task_of: dict):
    def value(record: dict[str, Any]) -> float:
        labels = task_of[record["task"], record["seed"]].labels
        return metric_value(metric, labels, np.array(record["probabilities"]))

    return value


def _seconds(moment: str, clock: str):
    return lambda record: record["seconds"][moment][clock]


def _row(name: str, arm: str, by_key: dict, task_of: dict) -> dict[str, Any] | None:
    seeds = _seeds(name, [arm], by_key)
    if not seeds:
        return None
    records = [by_key[name, seed, arm] for seed in seeds]
    row = {"task": name, "arm": arm, "title": ARMS[arm].title, "seeds": seeds}
    for metric in ("accuracy", "macro_f1"):
        row[metric] = round(_mean(name, arm, seeds, by_key, _score(metric, task_of)), 4)
    row["accuracy_of_seeds"] = [round(_score("accuracy", task_of)(record), 4) for record in records]
    for moment in ("imports", "model", "whole"):
        if all(moment in record["seconds"] for record in records):
            row[moment] = {
                clock: round(_mean(name, arm, seeds, by_key, _seconds(moment, clock)), 1) for clock in ("wall", "cpu")
            }
    row["cut"] = sum(record["cut"] for record in records)
    row["image_size"] = records[0]["settings"].get("image_size")
    return row


def _comparison(name: str, peer: str, by_key: dict, task_of: dict) -> dict[str, Any] | None:
    """Our models against one peer on one task, over the seeds that all have."""
    models = [pair for pair in MODELS if _seeds(name, [peer, pair[0]], by_key)]
    final = models[-1][0] if models else ""
    seeds = _seeds(name, [peer, *(arm for arm, _ in models)], by_key)
    if not models or not seeds:
        return None
    accuracy = _score("accuracy", task_of)
    wanted = _mean(name, peer, seeds, by_key, accuracy)
    task = task_of[name, seeds[0]]
    sides = [
        np.array([by_key[name, seed, arm]["probabilities"] for seed in seeds])
        for arm in (final, peer)
    ]  # fmt: skip
    gain = paired_difference(*sides, task.labels, groups=task.groups)
    first = next((pair for pair in models if _mean(name, pair[0], seeds, by_key, accuracy) >= wanted - 1e-9), None)
    found: dict[str, Any] = {
        "task": name, "peer": peer, "title": ARMS[peer].title, "seeds": seeds, "peer_accuracy": round(wanted, 4),
        "our_arm": final, "our_accuracy": round(_mean(name, final, seeds, by_key, accuracy), 4),
        **{key: round(value, 4) for key, value in gain.items()},
        "first_model": None if first is None else first[0], "times_faster": {},
    }  # fmt: skip
    moments = {"to_accuracy": first} if first else {}
    moments |= {f"{arm} {moment}": (arm, moment) for arm, moment in WHOLE}
    imports = _imports(name, by_key)
    for title, (arm, moment) in moments.items():
        shared = _seeds(name, [peer, arm], by_key)
        if not shared:
            continue
        for clock in ("wall", "cpu"):
            theirs = _mean(name, peer, shared, by_key, _seconds("model", clock))
            ours = _mean(name, arm, shared, by_key, _seconds(moment, clock))
            found["times_faster"][f"{title} ({clock})"] = round(theirs / ours, 2)
            if title == "to_accuracy" and imports:
                theirs -= _mean(name, peer, shared, by_key, _seconds("imports", clock))
                found["times_faster"][f"{title}, no imports ({clock})"] = round(theirs / (ours - imports[clock]), 2)
    return found


def _imports(name: str, by_key: dict) -> dict[str, float] | None:
    """What importing TensorFlow took: of our own start no part is apart, so the mean of the Keras peers stands in."""
    marks = [
        record["seconds"]["imports"]
        for (task, _, arm), record in by_key.items()
        if task == name and arm in PEERS and not PEERS[arm].torch
    ]
    return {clock: float(np.mean([mark[clock] for mark in marks])) for clock in ("wall", "cpu")} if marks else None


def _best(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each task the comparison with the most accurate peer; among equals the fastest to beat is the hardest."""
    names = dict.fromkeys(one["task"] for one in comparisons)
    return [max((c for c in comparisons if c["task"] == name), key=lambda c: c["peer_accuracy"]) for name in names]


def pool(comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean difference over tasks with a normal interval from the bootstraps' standard errors.

    Example:
        >>> one = {"task": "a", "difference": 0.02, "standard_error": 0.03}
        >>> two = {"task": "b", "difference": 0.04, "standard_error": 0.04}
        >>> pool([one, two])["difference"], pool([one, two])["high"]
        (0.03, 0.079)
    """
    difference = float(np.mean([one["difference"] for one in comparisons]))
    error = float(np.sqrt(np.sum([one["standard_error"] ** 2 for one in comparisons]))) / len(comparisons)
    return {
        "tasks": [one["task"] for one in comparisons], "difference": round(difference, 4),
        "low": round(difference - 1.96 * error, 4), "high": round(difference + 1.96 * error, 4),
    }  # fmt: skip


def _pooled(comparisons: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    peers = [peer for peer in PEERS if any(one["peer"] == peer for one in comparisons)]
    pooled = {peer: pool([one for one in comparisons if one["peer"] == peer]) for peer in peers}
    return pooled | ({"the best peer of each task": pool(_best(comparisons))} if comparisons else {})


def _goals(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal of the benchmark: what was measured, what was wanted, whether it was met."""
    goals = []
    for best in _best(comparisons):
        wanted = PROBE_GOAL if best["first_model"] == "tfxfer_probe" else BACKBONE_GOAL
        value = best["times_faster"].get("to_accuracy (cpu)")
        goals.append({
            "goal": f"{best['task']}: to the accuracy of {best['title']}", "value": value, "wanted": wanted,
            "met": value is not None and value >= wanted, "unit": "times less CPU time",
            "wall": best["times_faster"].get("to_accuracy (wall)"),
        })  # fmt: skip
    if comparisons:
        worst = min(comparisons, key=lambda one: one["difference"])
        goals.append({
            "goal": f"no worse than any peer on any set by more than {WORSE_GOAL:g} (worst: {worst['task']}, "
                    f"{worst['title']})",
            "value": worst["difference"], "wanted": -WORSE_GOAL, "met": worst["difference"] >= -WORSE_GOAL,
            "unit": "accuracy",
        })  # fmt: skip
        gain = pool(_best(comparisons))
        goals.append({
            "goal": "better than the best peer of each task on average, surely", "value": gain["low"], "wanted": 0.0,
            "met": gain["low"] > 0, "unit": "low end of the pooled interval",
        })  # fmt: skip
        goals.append({
            "goal": "better than the best peer of each task on average, by", "value": gain["difference"],
            "wanted": BETTER_GOAL, "met": gain["difference"] >= BETTER_GOAL, "unit": "accuracy",
        })  # fmt: skip
    return goals


# -- Markdown ---------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]]


def as_markdown(summary: dict[str, Any]) -> str:
    """What belongs in RESULTS.md."""
    low, high = summary["load_average"]
    lines = [
        f"{summary['cores']} cores, threads {', '.join(summary['threads'])}, load average {low} to {high}, Python "
        f"{summary['versions']['python']}, TensorFlow {summary['versions'].get('tensorflow')}, tfxfer at "
        f"{', '.join(summary['commits_of_tfxfer']) or 'no commit'}.",
        f"Recorded on {'; '.join(summary['taken'])}." if summary["taken"] else "",
        "",
        *table(
            ["task", "who", "seeds", "accuracy (by seed)", "macro F1", "model ready: wall, CPU s",
             "of it imports: CPU s", "whole command: wall, CPU s"],
            [_row_cells(row) for row in summary["rows"]],
        ),
        "",
        *table(
            ["task", "peer", "tfxfer minus peer", "first model as accurate", "times less CPU (without imports)",
             "times less wall", "whole command, CPU: without gate, with"],
            [_comparison_cells(one) for one in summary["comparisons"]],
        ),
        "",
        *table(
            ["peer, pooled over tasks", "tasks", "tfxfer minus peer (95 %)"],
            [[ARMS[name].title if name in ARMS else name, str(len(one["tasks"])),
              f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"]
             for name, one in summary["pooled"].items()],
        ),
        "",
        *table(
            ["goal", "measured", "wanted", ""],
            [[one["goal"], _told(one), f"{one['wanted']:g}", "met" if one["met"] else "missed"]
             for one in summary["goals"]],
        ),
    ]  # fmt: skip
    if summary["altered"]:
        lines += ["", f"NOT with the benchmark's settings: {', '.join(summary['altered'])}."]
    if summary["missing"]:
        lines += ["", f"Not measured: {'; '.join(summary['missing'])}."]
    return "\n".join(lines)


def _told(goal: dict[str, Any]) -> str:
    if goal["value"] is None:
        return "never"
    wall = f"; {goal['wall']:g} in wall time" if goal.get("wall") else ""
    return f"{goal['value']:g} {goal['unit']}{wall}"


def _row_cells(row: dict[str, Any]) -> list[str]:
    def pair(moment: str) -> str:
        return f"{row[moment]['wall']:.0f}, {row[moment]['cpu']:.0f}" if moment in row else ""

    each = f" ({', '.join(f'{value:.3f}' for value in row['accuracy_of_seeds'])})" if len(row["seeds"]) > 1 else ""
    imports = f"{row['imports']['cpu']:.0f}" if "imports" in row else ""
    cut = f", {row['cut']} cut" if row["cut"] else ""
    who = f"{row['title']}, {row['image_size']} px" if row["image_size"] else row["title"]
    return [
        row["task"], who, f"{len(row['seeds'])}{cut}", f"{row['accuracy']:.3f}{each}", f"{row['macro_f1']:.3f}",
        pair("model"), imports, pair("whole"),
    ]  # fmt: skip


def _comparison_cells(one: dict[str, Any]) -> list[str]:
    faster = one["times_faster"]

    def times(name: str) -> str:
        return f"{faster[name]:.1f}" if name in faster else "-"

    to_accuracy = times("to_accuracy (cpu)")
    if "to_accuracy, no imports (cpu)" in faster:
        to_accuracy += f" ({times('to_accuracy, no imports (cpu)')})"
    first = "none" if one["first_model"] is None else ARMS[one["first_model"]].title.removeprefix("tfxfer ")
    gain = f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
    whole = f"{times('tfxfer whole (cpu)')}, {times('tfxfer_gate whole (cpu)')}"
    return [one["task"], one["title"], gain, first, to_accuracy, times("to_accuracy (wall)"), whole]
