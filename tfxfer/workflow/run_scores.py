"""The scores that a run keeps: of the images that choices were made on, and of the test part."""

from typing import Any

import numpy as np

from tfxfer.data.dataset import Dataset
from tfxfer.metrics import score, split_warning
from tfxfer.train.outcome import Outcome, TrainingData


def held_scores(dataset: Dataset, training: TrainingData, outcome: Outcome, seed: int) -> dict[str, Any]:
    """Scores of the held-out images that the outcome was chosen on.

    Args:
        dataset: With a train and a validation part.
        training: What was trained on.
        outcome: With probabilities of held-out images.
        seed: Of the bootstrap.

    Returns:
        What `metrics.score` gives, and on which images, by models that saw what.
    """
    held, probabilities = outcome.held, outcome.held_probabilities
    assert probabilities is not None
    parts = [dataset.part(name) for name in ("train", "val")]
    weighted = all(part.weights is not None for part in parts)
    weights = np.concatenate([part.weights for part in parts])[held] if weighted else None
    seen = 0 if training.seen is None else int(training.seen[held].sum())
    before = f" The run before was trained on {seen} of them." if seen else ""
    return {
        "judged_on": "validation part" if len(held) == len(training.held) else "folds of train and validation",
        "note": f"By models that did not train on these images, but chosen on them: optimistic.{before}",
        "num_images_seen_before": seen,
        **score(
            training.labels[held], probabilities, dataset.class_names,
            groups=[training.groups[row] for row in held], weights=weights, seed=seed,
        ),
    }  # fmt: skip


def scores_of_test(dataset: Dataset, probabilities: np.ndarray, seed: int) -> dict[str, Any]:
    """What `metrics.score` gives for (N, K) probabilities of the test part."""
    test = dataset.part("test")
    return score(
        test.labels, probabilities, dataset.class_names, groups=test.groups, weights=test.weights, seed=seed
    )  # fmt: skip


def mismatch(held: dict[str, Any] | None, test: dict[str, Any], metric: str) -> str | None:
    """The warning that the parts differ; None where they do not, or where a run before had seen held-out images."""
    if held is None or held["num_images_seen_before"]:
        return None
    return split_warning(held, test, metric)
