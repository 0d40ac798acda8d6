"""From a dataset to what training sees of it: train and validation part numbered through, and weights of the loss."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfxfer.data import Dataset
from tfxfer.errors import InputError
from tfxfer.features.solvers import Anchor
from tfxfer.specs import Plan
from tfxfer.train.outcome import TrainingData
from tfxfer.workflow.continuing import Continuing


def training_data(dataset: Dataset, plan: Plan, model: keras.Model, continuing: Continuing | None) -> TrainingData:
    """What training sees.

    Args:
        dataset: With a train and a validation part.
        plan: Image size, metric.
        model: As it was built; of a run that is continued its head is what the new one is held to.
        continuing: Of a run that is continued.

    Raises:
        InputError: Where all images of a class have weight 0.
    """
    train, val = dataset.part("train"), dataset.part("val")
    labels = np.concatenate([train.labels, val.labels])
    weights = [np.ones(len(part)) if part.weights is None else part.weights for part in (train, val)]
    weight = np.concatenate(weights).astype(np.float64)
    of_class = np.bincount(labels, weights=weight, minlength=dataset.num_classes)
    if not of_class.all():
        name = dataset.class_names[int(np.argmin(of_class))]
        raise InputError(f"All images of class {name!r} have weight 0; give it some weight, or leave the class out.")
    if plan.metric != "accuracy":  # the balanced metrics count classes, not images
        weight = weight / of_class[labels]
    return TrainingData(
        parts=tuple(dataset.pixel_rows(name, plan.image_size) for name in ("train", "val")),
        labels=labels,
        weights=weight * len(weight) / weight.sum(),
        groups=(*train.groups, *val.groups),
        rows=np.arange(len(train)),
        held=np.arange(len(train), len(labels)),
        num_classes=dataset.num_classes,
        may_pool="val" in dataset.split.get("fractions", {}),
        names=(*train.ids, *val.ids),
        **_from_before(continuing, model, (*train.sha256, *val.sha256)),
    )


def _from_before(continuing: Continuing | None, model: keras.Model, sha256: Sequence[str]) -> dict[str, Any]:
    """What training takes over from the run that is continued: its head, and which images it has seen."""
    if not continuing:
        return {}
    seen = continuing.seen(sha256)
    if not continuing.continues:
        return {"seen": seen}
    known = continuing.known
    kernel, bias = (np.where(known, value, 0.0) for value in model.get_layer("logits").get_weights())
    return {"seen": seen, "anchor": Anchor(kernel.astype(np.float32), bias.astype(np.float32), known)}
