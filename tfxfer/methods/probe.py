"""Feature transfer: a regularised logistic head on frozen features, its strength chosen on held-out images."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from tfxfer.features.solvers import LinearHead, LogisticPath, choose_strength, log_softmax, weighted_log_loss

# Gives arrays and facts of something named: as they are made, or as a journal has them from before.
Memo = Callable[[str, Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]], tuple[dict, dict]]

MAX_FOLDED_IMAGES = 2000
NUM_FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Probe:
    """A probe and how it was chosen.

    Attributes:
        strength: Of the regularisation.
        num_views: Views of each image that it was trained on.
        chosen_by: For tables, such as "5-fold log loss".
        log_loss: The held-out log loss of that choice.
        held_log_losses: (n,) of each image judged, for paired comparisons.
        temperature: By which its logits are too large on the images it was trained on.
    """

    strength: float
    num_views: int
    chosen_by: str
    log_loss: float
    temperature: float
    held_log_losses: np.ndarray = dataclasses.field(repr=False)
    _path: Callable[[], LogisticPath] = dataclasses.field(repr=False)
    _num_images: int = dataclasses.field(repr=False)
    _memo: Memo = dataclasses.field(repr=False)

    def head(self, rows) -> LinearHead:
        """The head trained on some of the images, as a Dense layer."""

        def solve():
            path = self._path()
            theta = path.optimum(self.strength, rows=_in_views(rows, self._num_images, self.num_views))
            head = path.to_head(theta, self.strength, self.log_loss)
            return {"kernel": head.kernel, "bias": head.bias}, {}

        digest = hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()[:16]
        found, _ = self._memo(f"probe head, {self.num_views} views, rows {digest}", solve)
        return LinearHead(found["kernel"], found["bias"], self.strength, self.log_loss)


def fit_probe(
    features, labels, weights, groups, rows, held, num_classes: int, *, seed: int = 0, memo: Memo | None = None
) -> Probe:
    """Choose the regularisation of a logistic head on frozen features.

    Below 2 000 images by stratified, grouped cross-validation of the training rows, which costs no forward pass;
    above by the held-out rows. Always by log loss.

    Args:
        features: (V, N, D) float32, views of the images; held-out images count in the first view only.
        labels: (N,) int.
        weights: (N,) loss weights.
        groups: (N,) names; a group never crosses folds.
        rows: Images trained on.
        held: Images of the validation part.
        num_classes: K.
        seed: Of the folds.
        memo: Where the choice and the heads are kept.

    Returns:
        The probe; `probe.head(rows)` solves it.

    Reference:
        Kumar, Raghunathan, Jones, Ma, Liang. Fine-Tuning can Distort Pretrained Features and Underperform
        Out-of-Distribution. ICLR 2022 (the first half of LP-FT).
    """
    num_views, num_images, width = features.shape
    memo = memo or (lambda name, make: make())

    @functools.cache
    def path() -> LogisticPath:
        return LogisticPath(
            features.reshape(num_views * num_images, width),
            np.tile(labels, num_views),
            num_classes,
            np.tile(weights, num_views),
        )

    def choose():
        folds, chosen_by = make_folds(labels, groups, rows, held, seed=seed)
        expanded = [(_in_views(train, num_images, num_views), test) for train, test in folds]
        strength, scores = choose_strength(path(), expanded)
        judged = np.concatenate([test for _, test in folds])
        loss = weighted_log_loss(scores[judged], labels[judged], weights[judged])
        facts = {"strength": strength, "chosen_by": f"{chosen_by} log loss", "log_loss": loss}
        return {"held_log_losses": -scores[judged, labels[judged]] * weights[judged]}, facts

    arrays, facts = memo(f"probe, {num_views} views", choose)
    probe = Probe(
        num_views=num_views, temperature=1.0, **arrays, **facts, _path=path, _num_images=num_images, _memo=memo
    )
    logits = probe.head(rows).logits(features[0][rows])
    return dataclasses.replace(probe, temperature=_temperature(logits, labels[rows], weights[rows], facts["log_loss"]))


def make_folds(
    labels, groups, rows, held, *, seed: int = 0, num_folds: int = NUM_FOLDS
) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """Pairs (train rows, held-out rows): stratified, grouped folds of `rows`, or (rows, held) for many images.

    Returns:
        The pairs, and their name for tables.
    """
    rows, held = np.asarray(rows), np.asarray(held)
    if len(rows) >= MAX_FOLDED_IMAGES and len(held):
        return [(rows, held)], "validation"
    names = np.asarray(groups)[rows]
    of_class = [len(set(names[labels[rows] == label])) for label in np.unique(labels[rows])]
    splits = int(np.clip(min(of_class), 2, num_folds))
    folder = StratifiedGroupKFold(splits, shuffle=True, random_state=seed)
    pairs = [(rows[train], rows[test]) for train, test in folder.split(rows, labels[rows], names)]
    return [pair for pair in pairs if len(pair[0]) and len(pair[1])], f"{splits}-fold"


def _in_views(rows, num_images: int, num_views: int) -> np.ndarray:
    return np.concatenate([np.asarray(rows) + view * num_images for view in range(num_views)])


def _temperature(logits, labels, weights, target_loss: float) -> float:
    """The temperature, at least 1, at which the training images are as uncertain as held-out ones really are.

    A probe fits its own images so well that their gradients vanish; at this temperature they are what they would be
    on new images, and fine-tuning has something to learn from.
    """
    low, high = 1.0, 50.0
    for _ in range(40):  # the loss grows with the temperature once the images are fitted, so halving finds it
        middle = (low * high) ** 0.5
        loss = weighted_log_loss(log_softmax(logits / middle), labels, weights)
        low, high = (middle, high) if loss < target_loss else (low, middle)
    return float(low)
