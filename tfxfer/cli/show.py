"""What the commands share: progress on stderr, JSON on stdout, quiet libraries, tables."""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from tfxfer.runtime.progress import Progress

stderr = Console(stderr=True, highlight=False, soft_wrap=True)  # a path that is broken in a log is no path
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # piped output fits no terminal


def quiet_libraries() -> None:
    """Before TensorFlow is imported: what its native code writes on stderr, whatever the log level, is not for users.

    Python's own stderr goes on through a copy of the file descriptor. `TFXFER_VERBOSE=1` leaves everything as it is.
    """
    warnings.showwarning = _one_line
    with contextlib.suppress(OSError, AttributeError):  # a captured stderr has no descriptor
        if not os.environ.get("TFXFER_VERBOSE") and sys.stderr.fileno() == 2:
            _silence_native_stderr()


def _silence_native_stderr() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _one_line(message, category, filename, lineno, file=None, line=None) -> None:
    if category.__module__.startswith("tfxfer"):
        stderr.print(f"{category.__name__}: {message}", style="yellow")


class Live(Progress):
    """A live bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._bars = None
        if stderr.is_terminal:
            self._bars = Bars(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=stderr, transient=True,
            )  # fmt: skip
            self._bars.start()
            self._task = self._bars.add_task("starting", total=None)

    def phase(self, name: str, total: int | None = None) -> None:
        if self._bars:
            self._bars.reset(self._task, description=name, total=total)
        else:
            stderr.print(f"[{time.monotonic() - self._began:6.1f} s] {name}", markup=False)

    def update(self, done: int, total: int | None = None) -> None:
        if self._bars:
            self._bars.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        if not self._bars:
            stderr.print(f"[{time.monotonic() - self._began:6.1f} s] {text}", markup=False)

    def row(self, text: str) -> None:
        if self._bars:
            self._bars.console.print(text, markup=False)  # above the bar, and stays
        else:
            self.note(text)

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def new_table(*columns: str, title: str | None = None, **options: Any) -> Table:
    """A table whose cells wrap where they are too long: a name that is cut off is no name."""
    table = Table(title=title, title_justify="left", **options)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    return table


def interval(score: dict[str, float]) -> str:
    """A score with its interval, such as `0.857 (0.812 to 0.898)`."""
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def print_scores(scores: dict[str, Any], title: str) -> None:
    """Scores with intervals, and a line a class."""
    table = new_table("score", "value (95 % interval)", title=title)
    for name in ("accuracy", "macro_f1", "balanced_accuracy", "log_loss", "calibration_error"):
        table.add_row(name.replace("_", " "), interval(scores[name]))
    stdout.print(table)
    classes = new_table("class")
    for column in ("precision", "recall", "f1", "images"):
        classes.add_column(column, justify="right")
    for row in scores["per_class"]:
        classes.add_row(row["name"], *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")), str(row["support"]))
    stdout.print(classes)
    stdout.print(f"{scores['interval']}. {scores['covers']}")


def print_run(info: dict[str, Any], folder: Any) -> None:
    """The end of `train`: what came out and how sure we are."""
    table = new_table("", "", title=f"{folder}", show_header=False)
    data, metrics = info["data"], info["metrics"]
    counts = {part: sum(classes.values()) for part, classes in data["counts"].items()}
    table.add_row("data", f"{len(data['classes'])} classes; " + ", ".join(f"{n} {part}" for part, n in counts.items()))
    if data["quarantined"]:
        table.add_row("quarantined", f"{_counted(len(data['quarantined']), 'file')}, listed in run.json")
    told = {"leaks": "leaks", "conflicts": "conflicts", "near_duplicates_across_parts": "copies across parts"}
    for key, name in told.items():
        if data[key]:
            table.add_row(name, f"{len(data[key])}, listed in run.json")
    table.add_row("source", f"{info['source']['name']} ({info['source']['licence']})")
    for name, text in describe_continued(info.get("continued")):
        table.add_row(name, text)
    if "auto" in info["selection"]:
        table.add_row("recipe", info["selection"]["auto"]["rule"])
    table.add_row("chosen", _chosen(info))
    for name, text in describe_search(info.get("search")):
        table.add_row(name, text)
    audit = info["freeze_audit"]
    frozen = f"{audit['freeze_depth']} of {audit['num_blocks']} blocks, bit-identical after training"
    table.add_row("frozen", frozen if audit["freeze_depth"] else "nothing")
    for name, text in describe_time_limit(info):
        table.add_row(name, text)
    for part, scores in metrics.items():
        folds = " in folds" if scores.get("judged_on", "").startswith("folds") else ""
        table.add_row(f"{part} accuracy{folds}", interval(scores["accuracy"]))
        table.add_row(f"{part} macro F1", interval(scores["macro_f1"]))
    for certificate in info.get("certificates", ()):
        table.add_row(
            certificate["format"],
            f"verified, largest difference {certificate['max_abs_difference']:.1e}",
        )
    table.add_row("baseline", describe_baseline(info.get("baseline", {})))
    timings = info["timings"]
    ready = timings["model_ready_after_process_start"]
    table.add_row(
        "time", f"{timings['process_start_to_now']:.0f} s in all; model ready after {list(ready.values())[-1]:.0f} s"
    )
    stdout.print(table)
    for warning in info.get("warnings", ()):
        stdout.print(f"SplitMismatchWarning: {warning}")


def _chosen(info: dict[str, Any]) -> str:
    """What the model is, and where fine-tuning was tried in vain, by how much."""
    name = info["chosen"].replace("_", "-")
    tried = info["selection"].get("fine_tune_against_probe")
    if tried is None or tried["replaces_probe"]:
        return name
    return (
        f"{name}: fine-tuning was tried, held-out {tried['metric'].replace('_', ' ')} {tried['fine_tuned']:.3f} "
        f"against {tried['probe']:.3f} of the probe, standard error {tried['standard_error']:.3f}"
    )


def describe_search(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What a search tried, and what it is worth: (what, in words) a line."""
    if not found:
        return []
    values = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found["values"].items())
    likely, passes, metric = found["score"], found["passes"], found["metric"].replace("_", " ")
    tried = f"{_counted(found['trials'], 'trial')} by {found['tuner']}"
    tried += f", {found['failed']} failed" * bool(found["failed"])
    tried += f", {found['stopped_early']} stopped early" * bool(found["stopped_early"])
    lines = [
        ("search", f"{tried}; taken: {values}"),
        (
            "best of them",
            f"validation {metric} {likely['value']:.3f}, which flatters it; on other images likely "
            f"{likely['corrected']:.3f} ({likely['low']:.3f} to {likely['high']:.3f})",
        ),
    ]
    if len(found["equal"]) > 1:
        depths = ", ".join(str(one["freeze_depth"]) for one in found["equal"])
        lines.append(("equal depths", f"{depths} frozen blocks, within one standard error; the cheapest is taken"))
    computed, without = passes["computed"], passes["without_sharing"]
    lines.append(
        (
            "shared",
            f"{computed:,} images through frozen blocks instead of {without:,}; {passes['saved_seconds']:.0f} s saved",
        )
    )
    return lines


def print_freezing(found: dict[str, Any]) -> None:
    """What `--dry-run` shows: a row a layer with weights, for each stage."""
    if "load_report" in found:
        stdout.print(found["load_report"]["text"], markup=False)
    for name, text in describe_continued(found.get("continued")):
        stdout.print(f"{name}: {text}", markup=False)
    for stage in found["stages"]:
        stdout.print(
            f"stage {stage['name']}: freeze {stage['freeze_depth']}, batch_norm {stage['batch_norm']}; "
            f"{stage['num_trainable']:,} of {stage['num_parameters']:,} parameters train"
        )
        table = new_table("layer", "block")
        for column in ("parameters", "train"):
            table.add_column(column, justify="right")
        for layer in stage["layers"]:
            trains = layer["num_trainable"]
            table.add_row(
                layer["layer"], layer["block"], f"{layer['num_parameters']:,}", f"{trains:,}" if trains else "frozen"
            )
        stdout.print(table)
    for stage in found["stages"]:  # again, where the tables are longer than the window
        stdout.print(
            f"stage {stage['name']}: {stage['num_trainable']:,} of {stage['num_parameters']:,} parameters train"
        )


def _counted(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{plural * (count != 1)}"


def describe_continued(continued: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What goes on of an earlier run, and how its model compares: (what, in words) a line."""
    if not continued:
        return []
    classes, images = continued["classes"], dict(continued["images"])
    absent = images.pop("no_longer_in_the_data", 0)
    counts = [images] if "old" in images else list(images.values())
    old, new = (sum(count[kind] for count in counts) for kind in ("old", "new"))
    lines = [
        f"{continued['run']}: {_counted(len(classes['kept']), 'class', 'es')} kept"
        + "".join(f", {kind} {', '.join(classes[kind])}" for kind in ("new", "dropped") if classes[kind])
        + f"; {_counted(old, 'image')} of it, {new} new"
        + (f", {absent} no longer in the data" if absent else "")
        if classes["kept"]
        else f"no class of {continued['run']} is in the data: only its backbone goes on"
    ]
    found = [("continued", lines[0])]
    if "all" in continued:
        found.append(("old or new", f"{continued['verdict']}: {continued['reason']}; {_against(continued['all'])}"))
        if classes["new"]:
            found.append(("classes both know", _against(continued["known"])))
        if continued["losses"]:
            lost = [
                f"{row['name']} {row['old']:.2f} to {row['new']:.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
                for row in continued["losses"]
            ]
            found.append(("recall fell", "; ".join(lost)))
    return found


def _against(compared: dict[str, Any]) -> str:
    return (
        f"{compared['metric'].replace('_', ' ')} {compared['new']:.3f} against {compared['old']:.3f}, difference "
        f"{compared['difference']:+.3f} ({compared['low']:+.3f} to {compared['high']:+.3f}) on "
        f"{_counted(compared['num_images'], 'image')}"
    )


def describe_time_limit(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What a time limit changed: (what, in words) a line; none where there was none."""
    if "time_limit" not in info:
        return []
    limit = info["time_limit"]
    plans = [f"; {plan['stage']}: {plan['does']}" for plan in info["selection"].get("time_plan", ())]
    over = ""
    if -limit["left"] > 0.1 * limit["seconds"]:
        over = f", passed by {-limit['left']:.0f} s: a probe, its score and its exports are never left out"
    lines = [("time limit", f"{limit['seconds']:g} s{over}{''.join(plans)}")]
    if limit["left_out"]:
        lines.append(("left out", "; ".join(f"{what} ({why})" for what, why in limit["left_out"].items())))
    return lines


def describe_baseline(baseline: dict[str, Any]) -> str:
    """The verdict in one line."""
    if "best" not in baseline:
        return "not compared (--no-baseline)"
    proven = "" if baseline.get("proven", True) else f"; {baseline['note']}"
    best = baseline["scores"][baseline["best"]]
    return (
        f"{baseline['verdict']}: {baseline['metric']} {baseline['model']:.3f} against {best:.3f} of the best baseline, "
        f"{baseline['best']}; difference {baseline['difference']:+.3f} "
        f"({baseline['low']:+.3f} to {baseline['high']:+.3f}){proven}"
    )
