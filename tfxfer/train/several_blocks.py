"""The probe on several blocks beside the one on the last: whether it is surely better, and the model that it makes."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfxfer.errors import InputError
from tfxfer.methods.probe import Probe
from tfxfer.model.taps import Tapped, tap_model
from tfxfer.specs import Plan, Stage
from tfxfer.train.outcome import TrainingData


def tapped_for(model: keras.Model, plan: Plan, convex: Stage | None, adapts: bool, data: TrainingData):
    """The model with taps, where several blocks are to be read and can be.

    Args:
        model: Of `build_model`.
        plan: `features`: "last" never, "multi" always, "auto" where nothing stands against it.
        convex: The stage of the probe, or None.
        adapts: Whether a stage has BatchNorm "adapt".
        data: With a head from before only that one's features count.

    Returns:
        A `Tapped`, or None.

    Raises:
        InputError: Where "multi" was asked for and cannot be.
    """
    if plan.features == "last":
        return None
    against = None
    if convex is None:
        against = "the recipe has no probe"
    elif convex.solver != "convex":
        against = f"the probe's solver is {convex.solver!r}, and several blocks are read by 'convex'"
    elif adapts:
        against = "batch_norm 'adapt' changes what the blocks compute"
    elif data.anchor is not None:
        against = "a continued run goes on from the head that it had"
    tapped = tap_model(model) if against is None else None
    if tapped is None and plan.features == "multi":
        against = against or f"of the source {plan.source!r} nothing but its output can be read"
        raise InputError(f"features 'multi' was asked for, but {against}; give 'auto' or 'last'.")
    return tapped


def gain_of(multi: Probe, last: Probe, groups: Sequence[str]) -> dict[str, float]:
    """How much less log loss a probe has than another on the same held-out images, and how sure that is.

    Returns:
        `log_loss_last`, `log_loss_multi`, `gain` (their difference a held-out image), and its `standard_error`, with
        images of a group counted as one draw.
    """
    gains = last.held_log_losses - multi.held_log_losses
    _, group = np.unique(np.asarray(groups)[last.held_rows], return_inverse=True)
    sums = np.bincount(group, weights=gains - gains.mean())
    count = max(len(sums), 2)
    error = float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(gains))
    return {
        "log_loss_last": last.log_loss,
        "log_loss_multi": multi.log_loss,
        "gain": float(gains.mean()),
        "standard_error": error,
    }


def with_head(model: keras.Model, tapped: Tapped, probe: Probe, rows) -> tuple[keras.Model, dict[str, Any]]:
    """The model whose head is the probe of these rows, without the blocks that it does not use; and facts of it."""
    head = probe.head(rows)
    ends = np.cumsum(tapped.widths)
    parts = np.split(head.kernel, ends[:-1])
    used = [name for name, part in zip(tapped.blocks[:-1], parts, strict=False) if part.any()]
    kept = tap_model(model, tuple(used)) if used else None
    if kept is None:
        kept = tapped
    kernel = np.concatenate([part for name, part in zip(tapped.blocks, parts, strict=True) if name in kept.blocks])
    kept.model.get_layer("logits").set_weights([kernel, head.bias])
    return kept.model, {"blocks": list(kept.blocks), "num_features": int((head.kernel != 0).any(1).sum())}
