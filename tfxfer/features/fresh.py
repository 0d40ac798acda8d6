"""Views that are made when training asks for them, instead of some that are kept; and which of both is quicker."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfxfer.features.activations import Activations, Crossing
from tfxfer.features.crossing import Compute
from tfxfer.features.extract import FrozenPrefix
from tfxfer.features.views import augmented
from tfxfer.runtime.store import Rows

# By so much making new views must be quicker; for less, runs of the same seed should not differ by chance.
MARGIN_SECONDS = 2.0
ENDLESS = 2**31 - 1  # so many views that a draw among them is a view of its own


@dataclasses.dataclass(frozen=True)
class ViewsDecision:
    """How augmented views are come by, and what was measured to decide it.

    Attributes:
        how: "cached" (the same few in all epochs) or "fresh" (others in each).
        num_views: Of each image, the plain one counted; 0 where they are fresh.
        why: One sentence.
        cached_seconds: Estimate of making those views that no earlier run has left, and of reading them in training.
        fresh_seconds: Estimate of making new ones in training.
    """

    how: str
    num_views: int
    why: str
    cached_seconds: float = 0.0
    fresh_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "ViewsDecision":
        """What `to_dict` gave."""
        return cls(**facts)


def decide_views(
    num_views: int, missing: int, passes: float, *, view_seconds: float, disk_seconds: float, fresh_seconds: float
) -> ViewsDecision:
    """Keep views unless making new ones is quicker by `MARGIN_SECONDS`.

    Args:
        num_views: Asked for, the plain one counted.
        missing: Of these, those that are not in the feature cache.
        passes: Epochs of all trainings that are likely to come.
        view_seconds: Of computing one view of all images.
        disk_seconds: Of writing and reading one.
        fresh_seconds: Of one pass over new views of all images.

    Example:
        >>> costs = {"view_seconds": 10.0, "disk_seconds": 1.0, "fresh_seconds": 10.0}
        >>> decide_views(4, 3, 12, **costs).how, decide_views(4, 3, 2, **costs).how, decide_views(4, 0, 2, **costs).how
        ('cached', 'fresh', 'cached')
    """
    cached = missing * (view_seconds + disk_seconds) + passes * disk_seconds
    fresh = passes * fresh_seconds
    if cached <= fresh + MARGIN_SECONDS:
        why = "Keeping the views is as quick as making new ones in each epoch, or quicker."
        return ViewsDecision("cached", num_views, why, cached, fresh)
    why = "Making new views in each epoch is quicker than keeping some."
    return ViewsDecision("fresh", 0, why, cached, fresh)


class FreshViews(Activations):
    """Something of images in views, computed for new views whenever it is asked for.

    There is no end of views; view 0 is the plain one, which is kept.

    Args:
        compute: (n, S, S, 3) uint8, any n, to arrays (n, ...); by `crossing_of` or `features_of`.
        parts: (n, S, S, 3) uint8 arrays or rows in files; their images are numbered through.
        plain: The same of the plain images.
        seed: Of the views.
    """

    def __init__(self, compute: Compute, parts: Sequence[Rows], plain: Activations, seed: int):
        super().__init__(plain.views[:1])
        self.compute, self.parts, self.seed = compute, parts, seed
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: tuple[Any, Any]) -> Crossing:
        """Rows by (view, rows); the plain view alone is read from where it is kept."""
        views, rows = index
        if np.ndim(views) == 0 and int(views) == 0:
            return super().__getitem__(index)
        rows = np.asarray(rows)
        found = self.compute(augmented(self._pixels(rows), self.seed, np.broadcast_to(views, rows.shape)))
        return found if len(found) > 1 else found[0]

    def seconds_an_image(self, batch_size: int) -> float:
        """Of making new views, measured on a batch."""
        rows = np.arange(min(batch_size, int(self._ends[-1])))
        _ = self[1, rows]  # the first call builds
        began = time.perf_counter()
        _ = self[2, rows]
        return (time.perf_counter() - began) / len(rows)

    def _pixels(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), *self.parts[0].shape[1:]), np.uint8)
        owners = np.searchsorted(self._ends, rows, side="right")
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            begins = self._ends[owner] - len(self.parts[owner])
            found[places] = self.parts[owner][rows[places] - begins]
        return found


def features_of(prefix: FrozenPrefix) -> Compute:
    """The features at the backbone's end, by the weights that the prefix was made with."""

    def compute(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        step = prefix.batch_size
        return (np.concatenate([prefix(pixels[start : start + step])[0] for start in range(0, len(pixels), step)]),)

    return compute
