"""Feature transfer: a linear head on frozen features, solved, and chosen on held-out images."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from tfxfer.errors import InputError
from tfxfer.features.closed_form import Prototypes, RidgePath
from tfxfer.features.multi_block import MultiBlock
from tfxfer.features.rows import ViewFeatures
from tfxfer.features.solvers import Anchor, LinearHead, LogisticPath, choose_strength, log_softmax, weighted_log_loss

# Gives arrays and facts of something named: as they are made, or as a journal has them from before.
Memo = Callable[[str, Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]], tuple[dict, dict]]

MAX_FOLDED_IMAGES = 2000
NUM_FOLDS = 5
# How much harder than new classes the known ones of a continued run are held to the head from before; all are tried,
# and the last: not at all, a head of its own.
STIFFNESSES = (float("inf"), 30.0, 1.0, 0.0)


class Logistic:
    """Logistic regressions, perhaps drawn towards a head from before."""

    def __init__(self, features, labels, num_classes: int, weights=None, anchor: Anchor | None = None):
        self.path = LogisticPath(features, labels, num_classes, weights, anchor)

    def _stiff(self, stiffness: float) -> LogisticPath:
        return self.path if stiffness == 1.0 else self.path.stiffened(stiffness)

    def choose(self, folds) -> tuple[dict, np.ndarray]:
        """`strength`, `stiffness` where there is an anchor, `log_loss`; and (N, K) held-out log probabilities."""
        tested = np.concatenate([test for _, test in folds])
        labels, weights = self.path.labels[tested], self.path.weights[tested]
        found = {}
        for stiffness in _stiffnesses(self.path.anchor):
            strength, scores = choose_strength(self._stiff(stiffness), folds)
            found[stiffness] = weighted_log_loss(scores[tested], labels, weights), strength, scores
        stiffness = min(found, key=lambda key: found[key][0])
        loss, strength, scores = found[stiffness]
        # JSON has no infinity.
        stiff = {"stiffness": str(stiffness)} if self.path.anchor is not None else {}
        return {"strength": strength, **stiff, "log_loss": loss}, scores

    def head(self, rows, *, strength: float, log_loss: float, stiffness: str = "1.0") -> LinearHead:
        """The head trained on some rows."""
        path = self._stiff(float(stiffness))
        return path.to_head(path.optimum(strength, rows=rows), strength, log_loss)


# Each takes (features, labels, num_classes, weights), has `choose(folds)` and `head(rows, **choice)`.
SOLVERS = {"convex": Logistic, "ridge": RidgePath, "prototype": Prototypes, "blocks": MultiBlock}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A probe and how it was chosen.

    Attributes:
        solver: An entry of `SOLVERS`.
        choice: What it chose, as JSON holds it: `strength` of the regularisation, `stiffness` (how much harder the
            columns of known classes are held to an anchor; "inf": they are the anchor's, "0.0": a head of its own was
            better), `distance`, `temperature` of scores that are no logits, `log_loss`.
        num_views: Views of each image that it was trained on.
        chosen_by: For tables, such as "5-fold log loss".
        held_log_losses: (n,) of each image judged, for paired comparisons.
        held_rows: (n,) their numbers.
        temperature: By which its logits are too large on the images it was trained on.
    """

    solver: str
    choice: Mapping[str, Any]
    num_views: int
    chosen_by: str
    temperature: float
    held_log_losses: np.ndarray = dataclasses.field(repr=False)
    held_rows: np.ndarray = dataclasses.field(repr=False)
    _problem: Callable[[], Any] = dataclasses.field(repr=False)
    _num_images: int = dataclasses.field(repr=False)
    _memo: Memo = dataclasses.field(repr=False)
    _name: str = "probe"

    @property
    def log_loss(self) -> float:
        """The held-out log loss of what was chosen."""
        return self.choice["log_loss"]

    def head(self, rows) -> LinearHead:
        """The head trained on some of the images, as a Dense layer."""

        def solve():
            head = self._problem().head(_in_views(rows, self._num_images, self.num_views), **self.choice)
            return {"kernel": head.kernel, "bias": head.bias}, {}

        digest = hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()[:16]
        found, _ = self._memo(f"{self._name} head, {self.num_views} views, rows {digest}", solve)
        return LinearHead(found["kernel"], found["bias"], self.choice.get("strength", 0.0), self.log_loss)


def fit_probe(
    features, labels, weights, groups, rows, held, num_classes: int, *, seed: int = 0, memo: Memo | None = None,
    anchor: Anchor | None = None, judged=None, solver: str = "convex", options: Mapping[str, Any] | None = None,
) -> Probe:  # fmt: skip
    """Choose the regularisation of a linear head on frozen features.

    Below 2 000 images by stratified, grouped cross-validation of the training rows, which costs no forward pass;
    above by the held-out rows. Always by log loss.

    Args:
        features: (V, N, D) float32, views of the images, an array or `ViewFeatures`; held-out images count in the
            first view only.
        labels: (N,) int.
        weights: (N,) loss weights.
        groups: (N,) names; a group never crosses folds.
        rows: Images trained on.
        held: Images of the validation part.
        num_classes: K.
        seed: Of the folds.
        memo: Where the choice and the heads are kept.
        anchor: The head of a run that is continued: the probe is drawn towards it, and how much of it its classes keep
            is chosen with the strength; all of it and none of it are among the choices. Only "convex" takes one.
        judged: The rows that choices are made on; all by default.
        solver: "convex" (logistic regression), "ridge" or "prototype"; or "blocks", logistic regression on the last
            block's features and the most relevant of the others.
        options: Of the solver.

    Returns:
        The probe; `probe.head(rows)` solves it.

    Raises:
        InputError: Where an anchor is given to another solver.

    Reference:
        Kumar, Raghunathan, Jones, Ma, Liang. Fine-Tuning can Distort Pretrained Features and Underperform
        Out-of-Distribution. ICLR 2022 (the first half of LP-FT).
    """
    if anchor is not None and solver != "convex":
        raise InputError(
            f"A run is continued by the solver 'convex', not {solver!r}; leave the probe's solver as it is."
        )
    features = ViewFeatures.of(features)
    num_views, num_images, _ = features.shape
    memo = memo or (lambda name, make: make())
    name = "probe" if solver == "convex" else f"probe by {solver}"
    options = dict(options or {}) if anchor is None else {"anchor": anchor}

    @functools.cache
    def problem() -> Any:
        flat_labels, flat_weights = (np.tile(values, num_views) for values in (labels, weights))
        return SOLVERS[solver](features.flat, flat_labels, num_classes, flat_weights, **options)

    def choose():
        folds, chosen_by = make_folds(labels, groups, rows, held, seed=seed)
        folds = judged_on(folds, judged)
        expanded = [(_in_views(train, num_images, num_views), test) for train, test in folds]
        choice, scores = problem().choose(expanded)
        tested = np.concatenate([test for _, test in folds])
        losses = -scores[tested, labels[tested]] * weights[tested]
        facts = {"choice": choice, "chosen_by": f"{chosen_by} log loss"}
        return {"held_log_losses": losses, "held_rows": tested}, facts

    arrays, facts = memo(f"{name}, {num_views} views", choose)
    probe = Probe(
        solver, **arrays, **facts, num_views=num_views, temperature=1.0, _problem=problem, _num_images=num_images,
        _memo=memo, _name=name,
    )  # fmt: skip
    logits = probe.head(rows).logits_of(features[0], rows)
    return dataclasses.replace(probe, temperature=_temperature(logits, labels[rows], weights[rows], probe.log_loss))


def _stiffnesses(anchor: Anchor | None) -> tuple[float, ...]:
    if anchor is None:
        return (1.0,)
    # Without new classes to compare with, harder is only a larger strength.
    return tuple(s for s in STIFFNESSES if s in (0.0, 1.0, float("inf")) or not anchor.known.all())


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


def judged_on(pairs, judged) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pairs with those of their held-out rows that choices may be made on; pairs without one are left out."""
    if judged is None:
        return pairs
    kept = [(train, test[np.isin(test, judged)]) for train, test in pairs]
    return [pair for pair in kept if len(pair[1])]


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
