"""The gate against negative transfer: what the transferred model must beat, and whether it does."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from scipy.special import softmax

from tfxfer.features.cut import cut_model
from tfxfer.features.engines import quickest
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.methods.probe import fit_probe
from tfxfer.metrics import metric_value
from tfxfer.model.blocks import list_blocks
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze
from tfxfer.runtime.images import resize_image
from tfxfer.runtime.store import Rows
from tfxfer.select.pixels import PIXEL_SIZE_PX, pixel_baselines
from tfxfer.select.verdict import verdict
from tfxfer.specs import Plan, Source
from tfxfer.train.outcome import TrainingData

MARGIN = 0.01
ON_PIXELS, RANDOM_FEATURES = "classifiers on pixels", "random weights, same head"


def quick_baselines(
    card: Source,
    plan: Plan,
    data: TrainingData,
    test_pixels: Rows,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, np.ndarray]:
    """Baselines that cost seconds, trained on the train and validation part.

    Args:
        card: The source, for its architecture.
        plan: Image size, seed.
        data: What training saw.
        test_pixels: (M, S, S, 3) uint8.
        wanted: Asked about `ON_PIXELS` and `RANDOM_FEATURES` when their turn comes.

    Returns:
        Names to (M, K) probabilities on the test images: the majority class, logistic regression and SVC on small
        raw pixels, and the source's architecture with random weights under the same convex head.
    """
    small = [_shrink(pixels) for pixels in (*data.parts, test_pixels)]
    found = pixel_baselines(
        np.concatenate(small[:-1]), data.labels, small[-1],
        num_classes=data.num_classes, seed=plan.seed, groups=data.groups, sample_weight=data.weights,
        classifiers=wanted(ON_PIXELS),
    )  # fmt: skip
    if wanted(RANDOM_FEATURES):
        found[RANDOM_FEATURES] = random_features_baseline(card, plan, data, test_pixels)
    return found


def random_features_baseline(card: Source, plan: Plan, data: TrainingData, test_pixels: Rows) -> np.ndarray:
    """The same network without its pretrained weights, frozen, under the same convex head: (M, K) probabilities."""
    keras.utils.set_random_seed(plan.seed)
    model = build_model(card, data.num_classes, image_size=plan.image_size, weights=False, seed=plan.seed)
    freeze(model, "all", batch_norm="frozen")
    cut = cut_model(model, len(list_blocks(model)))
    assert cut is not None  # a cut behind the last block crosses the features alone
    prefix, parts = FrozenPrefix(cut), (*data.parts, test_pixels)
    found = extract(prefix, parts, engine=quickest(prefix, parts))
    count = len(data.labels)
    rows = data.all_rows
    probe = fit_probe(
        found.features.picked(np.arange(count)),
        data.labels,
        data.weights,
        data.groups,
        rows,
        rows[:0],
        data.num_classes,
        seed=plan.seed,
    )
    tested = np.arange(count, count + len(test_pixels))
    return softmax(probe.head(rows).logits_of(found.features[0], tested), axis=1)


def judge_baselines(
    probabilities: np.ndarray, baselines: dict[str, np.ndarray], labels, groups, weights, *, metric: str, seed: int
) -> dict[str, Any]:
    """Compare a model with the best of its baselines on the same test images.

    Args:
        probabilities: (M, K), or (S, M, K) for S seeds.
        baselines: Names to the same.
        labels, groups, weights: Of the test images; weights may be None.
        metric: What is compared.
        seed: Of the bootstrap.

    Returns:
        scores of all, the best one's name, difference, interval, margin, verdict.
    """
    scores = {name: _mean_metric(metric, labels, table, weights) for name, table in baselines.items()}
    best = max(scores, key=scores.__getitem__)
    found = verdict(
        probabilities, baselines[best], labels,
        groups=groups, weights=weights, metric=metric, margin=MARGIN, seed=seed,
    )  # fmt: skip
    ours = _mean_metric(metric, labels, probabilities, weights)
    return {"metric": metric, "model": ours, "scores": scores, "best": best, **found}


def _mean_metric(metric: str, labels, probabilities, weights) -> float:
    tables = probabilities if probabilities.ndim == 3 else probabilities[None]
    return float(np.mean([metric_value(metric, labels, table, weights=weights) for table in tables]))


def _shrink(pixels: Rows) -> np.ndarray:
    if not len(pixels):
        return np.zeros((0, PIXEL_SIZE_PX, PIXEL_SIZE_PX, 3), np.uint8)
    return np.stack([resize_image(pixels[row], PIXEL_SIZE_PX) for row in range(len(pixels))])
