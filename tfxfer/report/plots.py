"""Plots, as files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tfxfer.runtime.files import atomic_path


@dataclasses.dataclass(frozen=True)
class Point:
    """A value with its interval.

    Attributes:
        x: Where it stands, such as a number of blocks.
        value, low, high: On the other axis.
        label: Of the line it belongs to, such as a source.
    """

    x: float
    value: float
    low: float
    high: float
    label: str = ""


def write_depth_plot(
    path: Path, points: Sequence[Point], *, others: Sequence[tuple[float, float]] = (), chosen: float | None = None,
    metric: str = "accuracy",
) -> None:  # fmt: skip
    """Draw the best value of each freeze depth with its interval, and all trials as dots.

    Args:
        path: Ends in .png or .svg.
        points: The best of each depth; a line for each label.
        others: (depth, value) of all trials.
        chosen: The depth that was taken.
        metric: On the upright axis.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no window

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    if others:
        axes.scatter(
            [depth for depth, _ in others], [value for _, value in others], s=14, color="0.65", label="trials", zorder=1
        )
    for label in dict.fromkeys(point.label for point in points):
        line = sorted((point for point in points if point.label == label), key=lambda point: point.x)
        values = [point.value for point in line]
        errors = [[p.value - p.low for p in line], [p.high - p.value for p in line]]
        axes.errorbar(
            [point.x for point in line], values, yerr=errors, marker="o", capsize=3, label=label or "best of a depth"
        )
    if chosen is not None:
        axes.axvline(chosen, color="0.3", linestyle=":", label=f"taken: {chosen:g}")
    axes.set_xlabel("frozen blocks")
    axes.set_ylabel(f"validation {metric.replace('_', ' ')} (95 % interval)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
