"""What recipe `auto` does: a table by labels a class and by how far the images are from those of the source.

Far is where blocks before the last know much that the last does not: out of fold, a probe on several blocks tells so
much more about the labels than the probe on the last alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfxfer.specs import PROBE_SOLVERS, Stage

# Labels a class: up to ten are few, up to a hundred some.
FEW, SOME = 10, 100
# The images are far where several blocks explain so much more of the labels' entropy than the last one does.
FAR_SHARE = 0.06


@dataclasses.dataclass(frozen=True)
class Rule:
    """A cell of the table.

    Attributes:
        does: In words.
        probes: Solvers of the head on the last block; of several the one with the least held-out log loss.
        features: What the probe reads, see `Plan.features`.
        tune: Values of the fine-tuning stage; None: there is none, unless the user asks for something in it.
    """

    does: str
    probes: tuple[str, ...] = ("convex",)
    features: str = "auto"
    tune: Mapping[str, Any] | None = None


TABLE = {
    ("few", "near"): Rule("a head in closed form or a logistic one, no fine-tuning", probes=PROBE_SOLVERS),
    ("few", "far"): Rule("a probe on several blocks, no fine-tuning", features="multi"),
    ("some", "near"): Rule("a probe, the last blocks tuned from it, blended", tune={}),
    ("some", "far"): Rule(
        "a probe, all blocks tuned from it with block-wise rates, BatchNorm by its affine part",
        tune={"freeze_depth": 0, "batch_norm": "affine", "layer_decay": 0.8},
    ),
    ("many", "near"): Rule("a probe, all blocks tuned from it", tune={"freeze_depth": 0}),
    ("many", "far"): Rule(
        "a probe, all blocks tuned from it with BatchNorm", tune={"freeze_depth": 0, "batch_norm": "train"}
    ),
}


def size_of(labels: np.ndarray) -> tuple[str, float]:
    """ "few", "some" or "many" by the median class, and its number of labels.

    Example:
        >>> size_of(np.repeat([0, 1, 2], [10, 10, 400])), size_of(np.repeat([0, 1], [80, 90]))
        (('few', 10.0), ('some', 85.0))
    """
    count = float(np.median(np.unique(labels, return_counts=True)[1]))
    return "few" if count <= FEW else "some" if count <= SOME else "many", count


def shift_of(found: Mapping[str, float], labels: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """ "near" or "far", by the gain of a probe on several blocks.

    Args:
        found: Of `gain_of`: `log_loss_last`, `gain`, `standard_error`.
        labels, weights: (n,) of the images.

    Returns:
        `shift`; `explained`, the labels' entropy less the log loss of the last block; `share`, the gain as a share of
        that, and its `standard_error`; None where the last block explains nothing, which is far.

    Example:
        >>> gain = {"log_loss_last": 0.5, "gain": 0.01, "standard_error": 0.01}
        >>> shift_of(gain, np.array([0, 1, 0, 1]), np.ones(4))["shift"]
        'near'
    """
    mass = np.bincount(labels, weights=weights)
    mass = mass[mass > 0] / mass.sum()
    explained = float(-(mass * np.log(mass)).sum()) - found["log_loss_last"]
    if explained <= 0:
        return {"shift": "far", "explained": explained, "share": None, "standard_error": None}
    share = found["gain"] / explained
    return {
        "shift": "far" if share > FAR_SHARE else "near",
        "explained": explained,
        "share": share,
        "standard_error": found["standard_error"] / explained,
    }


def asked_of(stages: Sequence[Stage], own: Sequence[Stage]) -> dict[str, Any]:
    """What the user says of the fine-tuning stage: where it differs from the recipe's own."""
    (mine,) = (stage for stage in stages if not stage.is_probe)
    (theirs,) = (stage for stage in own if not stage.is_probe)
    fields = [field.name for field in dataclasses.fields(Stage)]
    return {name: getattr(mine, name) for name in fields if getattr(mine, name) != getattr(theirs, name)}


def tuning_stage(rule: Rule, asked: Mapping[str, Any], stage: Stage, *, wanted: bool) -> Stage | None:
    """The fine-tuning stage of a rule; what is asked for wins over the table.

    Args:
        rule: Of the table.
        asked: Of `asked_of`.
        stage: The recipe's, changed by what was asked.
        wanted: Whether there must be one.
    """
    if rule.tune is None and not asked and not wanted:
        return None
    return dataclasses.replace(stage, **{key: value for key, value in (rule.tune or {}).items() if key not in asked})


def told(facts: Mapping[str, Any], rule: Rule, asked: Mapping[str, Any]) -> str:
    """The rule and what it follows from, in one line, for people."""
    how = facts["why"]
    if facts.get("share") is not None:
        how = f"several blocks explain {facts['share']:+.1%} more, standard error {facts['standard_error']:.1%}"
    elif "explained" in facts:
        how = "the last block explains nothing"
    also = f"; asked for: {', '.join(asked)}" if asked else ""
    count = f"{facts['labels_a_class']:g} labels a class ({facts['size']})"
    return f"auto: {count}, {facts['shift']} ({how}): {rule.does}{also}"
