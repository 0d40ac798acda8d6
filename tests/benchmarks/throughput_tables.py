"""What throughput.py concludes from its rates, and how it is written down."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tta_tables import table

EXTRACTION_GOAL, FULL_STEP_GOAL = 0.9, 0.95
# Of plain Keras, by the block that is the last frozen one. The goals name blocks 13 and 16, which are ours of that name
# and, where one counts from 1 or cuts in front of them, those before.
CACHE_GOALS = {"block_12": 3.0, "block_13": 3.0, "block_15": 8.0, "block_16": 8.0}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'median': 2.0, 'low': 1.0, 'high': 3.0}
    """
    return {name: round(float(f(values)), 4) for name, f in (("median", np.median), ("low", min), ("high", max))}


def attainable(forward_rate: float, decode_seconds: float, cores: int) -> float:
    """Images a second where all cores first decode and then compute, and nothing else takes time.

    Args:
        forward_rate: f, images a second of the bare forward pass on all cores.
        decode_seconds: d, of one thread an image; 0 where images are decoded.
        cores: How many there are.

    Example:
        >>> attainable(100.0, 0.02, 2)
        50.0
    """
    return 1 / (1 / forward_rate + decode_seconds / cores)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of rates of the same rounds."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def goals_of_extraction(source: str, arms: Mapping[str, Mapping[str, Any]], cores: int) -> list[dict[str, Any]]:
    """Shares of what is attainable, round by round; the better file for onnxruntime is the bare one."""
    files = [name for name in arms if name.startswith("onnxruntime")]
    bare = arms[max(files, key=lambda name: np.median(arms[name]["rates"]))]["rates"]
    decoding = [1 / rate for rate in arms["Pillow, one thread"]["rates"]]
    goals = []
    for name, seconds in (("tfxfer, from files", decoding), ("tfxfer, decoded", [0.0] * len(bare))):
        most = [attainable(f, d, cores) for f, d in zip(bare, seconds, strict=True)]
        told, found = f"{source}: {name}, share of the attainable", ratios(arms[name]["rates"], most)
        met = found["median"] >= EXTRACTION_GOAL
        goals.append({"goal": told, **found, "wanted": EXTRACTION_GOAL, "met": met})
    return goals


def goals_of_steps(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The whole step against torch, the cached one against plain Keras."""
    goals = []
    for group in groups:
        if "torch" in group["arms"]:
            told = f"whole step, BatchNorm {group['batch_norm']}: tfxfer against torch, channels last"
            goals.append(_goal(told, group["arms"], "tfxfer", "torch", FULL_STEP_GOAL))
        if group["frozen"] in CACHE_GOALS:
            told = f"frozen to {group['frozen']}: tfxfer's cached step against Keras `fit`"
            wanted = CACHE_GOALS[group["frozen"]]
            goals.append(_goal(told, group["arms"], "tfxfer, cached", "Keras fit", wanted))
    return goals


def _goal(told: str, arms: Mapping[str, Mapping[str, Any]], ours: str, theirs: str, wanted: float) -> dict[str, Any]:
    """In wall time; the ratio in CPU time, which other jobs on the machine move less, is told beside it."""
    found = ratios(arms[ours]["rates"], arms[theirs]["rates"])
    in_cpu = ratios(arms[ours]["cpu_rates"], arms[theirs]["cpu_rates"])["median"]
    return {"goal": told, **found, "in_cpu_time": in_cpu, "wanted": wanted, "met": found["median"] >= wanted}


def as_markdown(summary: Mapping[str, Any]) -> str:
    """What belongs in RESULTS.md."""
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    low, high = summary["load_average"]
    lines = [
        f"{summary['date']}, {summary['cores']} cores, {summary['threads']} threads, load average {low:g} before and "
        f"{high:g} after, {summary['rounds']} alternating rounds (median, least to greatest), tfxfer at "
        f"{summary['commit']}; {versions}.",
        "",
    ]
    rows = [
        [f"{one['source']}, {one['image_size']} px", name, *_rates(arm), *_memory(arm)]
        for one in summary["extraction"]
        for name, arm in one["arms"].items()
    ]
    if rows:
        columns = ["features of", "by", "images a second", "a CPU second", "peak RSS", "of it anonymous"]
        lines += [*table(columns, rows), ""]
    rows = [
        [f"{one['frozen']}, BatchNorm {one['batch_norm']}", name, *_rates(arm), _kept(arm), *_memory(arm)]
        for one in summary["steps"]
        for name, arm in one["arms"].items()
    ]
    if rows:
        columns = [
            "frozen to",
            "step of",
            "images a second",
            "a CPU second",
            "kept an image",
            "peak RSS",
            "of it anonymous",
        ]
        lines += [*table(columns, rows), ""]
    rows = [
        [one["goal"], f"{one['median']:.2f} ({one['low']:.2f} to {one['high']:.2f})",
         f"{one['in_cpu_time']:.2f}" if "in_cpu_time" in one else "", f"{one['wanted']:g}",
         "met" if one["met"] else "missed"]
        for one in summary["goals"]
    ]  # fmt: skip
    lines += table(["goal", "measured", "in CPU time", "wanted", ""], rows)
    if summary["quick"]:
        lines += ["", "With --quick: too short to be believed."]
    return "\n".join(lines)


def _rates(arm: Mapping[str, Any]) -> list[str]:
    found = spread(arm["rates"])
    in_cpu = spread(arm["cpu_rates"])["median"]
    return [f"{found['median']:.0f} ({found['low']:.0f} to {found['high']:.0f})", f"{in_cpu:.0f}"]


def _memory(arm: Mapping[str, Any]) -> list[str]:
    return [f"{arm[name] / 1e6:.0f} MB" for name in ("peak_rss_bytes", "peak_anonymous_bytes")]


def _kept(arm: Mapping[str, Any]) -> str:
    size = arm["facts"].get("bytes_an_image")
    return f"{size / 1e3:.0f} kB" if size else ""
