"""What training sees, and what it decided."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """The images that training may see, train and validation part numbered through.

    Attributes:
        parts: (n, S, S, 3) uint8 arrays.
        labels: (N,) int.
        weights: (N,) loss weights, mean about one.
        groups: (N,) names.
        rows, held: Numbers of the train and of the validation images.
        num_classes: K.
        names: (N,) of the images, for messages; or none.
        may_pool: Whether the validation part was split off by us, so that few images may be cross-fitted instead.
    """

    parts: tuple[np.ndarray, ...]
    labels: np.ndarray
    weights: np.ndarray
    groups: tuple[str, ...]
    rows: np.ndarray
    held: np.ndarray
    num_classes: int
    may_pool: bool
    names: tuple[str, ...] = ()

    @property
    def all_rows(self) -> np.ndarray:
        return np.concatenate([self.rows, self.held])


@dataclasses.dataclass
class Outcome:
    """What training decided and did; the model itself holds the weights.

    Attributes:
        chosen: "probe", "fine_tune" or "blend".
        history: One dict an epoch.
        selection: Every measured choice, for run.json.
        held: Numbers of the images judged while selecting.
        held_probabilities: (n, K) of what was chosen, by models that did not train on them.
        audit: Of the frozen variables.
        cache: What was computed once instead of once an epoch.
        seconds: By phase.
        interrupted, out_of_time: How it ended.
    """

    chosen: str = "probe"
    history: list[dict] = dataclasses.field(default_factory=list)
    selection: dict = dataclasses.field(default_factory=dict)
    held: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    held_probabilities: np.ndarray | None = None
    audit: dict = dataclasses.field(default_factory=dict)
    cache: dict = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
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
