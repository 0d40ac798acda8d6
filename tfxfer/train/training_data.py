"""From a dataset to what training sees of it: train and validation part numbered through, and weights of the loss."""

import numpy as np

from tfxfer.data import Dataset
from tfxfer.errors import InputError
from tfxfer.features.solvers import Anchor
from tfxfer.specs import Plan
from tfxfer.train.outcome import TrainingData


def training_data(
    dataset: Dataset, plan: Plan, *, anchor: Anchor | None = None, seen: np.ndarray | None = None
) -> TrainingData:
    """What training sees.

    Args:
        dataset: With a train and a validation part.
        plan: Image size, metric.
        anchor, seen: Of a run that is continued, see `TrainingData`.

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
        anchor=anchor,
        seen=seen,
    )
