"""What scaling.py concludes, and how it is written down."""

from collections.abc import Mapping, Sequence
from typing import Any

from tta_tables import table

MEMORY_GOAL = 1.1  # times as much on many images as on few, at most
PHASES = {
    "read_data": "reading", "train.features": "features", "train.probe": "probe", "train.fine_tune": "fine-tuning",
    "train.refit": "refit", "score_test": "scoring",
}  # fmt: skip
MEASURES = {
    "peak_rss_bytes": "the largest process, resident",
    "peak_anonymous_bytes_of_command": "the command's own process, anonymous",
    "peak_anonymous_bytes_of_child": "its largest child, anonymous",
}


def goals_of_memory(used: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many times the memory on the fewest images that on the most is."""
    if len(used) < 2:
        return []
    few, many = used[0], used[-1]
    return [
        {
            "goal": f"peak memory on {many['images']} images, times that on {few['images']}: {told}",
            "value": round(many[name] / few[name], 3),
            "wanted": MEMORY_GOAL,
            "met": many[name] <= MEMORY_GOAL * few[name],
        }
        for name, told in MEASURES.items()
    ]


def as_markdown(summary: Mapping[str, Any]) -> str:
    """What belongs in RESULTS.md."""
    low, high = summary["load_average"]
    versions = summary["versions"]
    lines = [
        f"{summary['date']}, {summary['cores']} cores, load average {low:g} before and {high:g} after, Python "
        f"{versions['python']}, TensorFlow {versions.get('tensorflow')}, onnxruntime {versions.get('onnxruntime')}, "
        f"tfxfer at {summary['commit']}.",
        "",
    ]
    if summary["costs"]:
        phases = [name for name in PHASES if any(name in row["seconds"] for row in summary["costs"])]
        columns = [
            "varied", "", "wall s", "CPU s", *(f"{PHASES[name]} s" for name in phases), "kept MB", "peak RSS MB"
        ]  # fmt: skip
        lines += [*table(columns, [_cost_cells(row, phases) for row in summary["costs"]]), ""]
    if summary["memory"]:
        columns = ["images", *MEASURES.values(), "most at one time, all", "wall s", "CPU s"]
        lines += [f"`{summary['memory_command']}`:", "", *table(columns, _memory_cells(summary["memory"])), ""]
    rows = [
        [one["goal"], f"{one['value']:.2f}", f"{one['wanted']:g}", "met" if one["met"] else "missed"]
        for one in summary["goals"]
    ]
    if rows:
        lines += [*table(["goal", "measured", "at most", ""], rows), ""]
    if summary["quick"]:
        lines += ["With --quick: too small to say anything.", ""]
    return "\n".join(lines).rstrip()


def _memory_cells(used: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of the table of memory."""
    return [
        [
            str(row["images"]),
            *(f"{row[name] / 1e6:.0f} MB" for name in (*MEASURES, "peak_anonymous_bytes")),
            f"{row['wall_seconds']:.0f}",
            f"{row['cpu_seconds']:.0f}",
        ]
        for row in used
    ]  # fmt: skip


def _cost_cells(row: Mapping[str, Any], phases: Sequence[str]) -> list[str]:
    times = [f"{row['seconds'].get(name, 0.0):.1f}" for name in phases]
    return [
        row["varied"], str(row["value"]), f"{row['wall_seconds']:.0f}", f"{row['cpu_seconds']:.0f}", *times,
        f"{row['stored_bytes'] / 1e6:.0f}", f"{row['peak_rss_bytes'] / 1e6:.0f}",
    ]  # fmt: skip
