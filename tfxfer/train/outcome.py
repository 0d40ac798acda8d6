"""What training sees, and what it decided."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfxfer.features.solvers import Anchor
from tfxfer.runtime.store import Rows
from tfxfer.train.rates import RateTest

MIN_UNSEEN = 5  # images a class that a choice can be made on


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """The images that training may see, train and validation part numbered through.

    Attributes:
        parts: (n, S, S, 3) uint8 arrays, or rows in files.
        labels: (N,) int.
        weights: (N,) loss weights, mean about one.
        groups: (N,) names.
        rows, held: Numbers of the train and of the validation images.
        num_classes: K.
        names: (N,) of the images, for messages; or none.
        may_pool: Whether the validation part was split off by us, so that few images may be cross-fitted instead.
        anchor: The head of the run that is continued.
        seen: (N,) bool, the images that this run was trained on.
    """

    parts: tuple[Rows, ...]
    labels: np.ndarray
    weights: np.ndarray
    groups: tuple[str, ...]
    rows: np.ndarray
    held: np.ndarray
    num_classes: int
    may_pool: bool
    names: tuple[str, ...] = ()
    anchor: Anchor | None = None
    seen: np.ndarray | None = None

    @property
    def all_rows(self) -> np.ndarray:
        return np.concatenate([self.rows, self.held])

    def judged(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that choices are made on: what a continued run has seen flatters it.

        Where there are too few others in some class, all of them: to judge on new classes alone would be to forget
        the old ones.
        """
        if self.seen is None:
            return rows
        unseen = rows[~self.seen[rows]]
        enough = np.bincount(self.labels[unseen], minlength=self.num_classes).min() >= MIN_UNSEEN
        return unseen if enough else rows


@dataclasses.dataclass
class Outcome:
    """What training decided and did.

    Attributes:
        model: What holds the weights that were chosen: the model that was trained, or one with another head on it.
        chosen: "probe", "fine_tune" or "blend".
        history: One dict an epoch.
        selection: Every measured choice, for run.json.
        held: Numbers of the images judged while selecting.
        held_probabilities: (n, K) of what was chosen, by models that did not train on them.
        audit: Of the frozen variables.
        cache: What was computed once instead of once an epoch.
        seconds: By phase.
        rate_tests: Range tests of learning rates, for the curves.
        graph_seconds, images_per_second: What tracing the network as a graph took, and how quick that is.
        left_out: What the time limit did not allow, and why.
        interrupted, out_of_time: How it ended.
    """

    model: Any = None
    chosen: str = "probe"
    history: list[dict] = dataclasses.field(default_factory=list)
    selection: dict = dataclasses.field(default_factory=dict)
    held: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    held_probabilities: np.ndarray | None = None
    audit: dict = dataclasses.field(default_factory=dict)
    cache: dict = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    rate_tests: list[RateTest] = dataclasses.field(default_factory=list)
    graph_seconds: float = 0.0
    images_per_second: float = 0.0
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    interrupted: bool = False
    out_of_time: bool = False

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds[phase]`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
