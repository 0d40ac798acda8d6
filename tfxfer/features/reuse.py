"""Features computed once and found again by later runs, where that is quicker than computing them anew."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfxfer.features.cache import FeatureCache
from tfxfer.features.engines import TENSORFLOW, VERSIONS, EngineChoice, Engines, sample_of
from tfxfer.features.entry import Entry
from tfxfer.features.extract import Extracted, extracted_of, run_prefix
from tfxfer.features.keys import cache_key, content_digest
from tfxfer.features.precision import choose_dtype
from tfxfer.features.shelf import CacheFull
from tfxfer.features.views import RandView, View, view_function, view_key
from tfxfer.runtime.store import Rows, RowStore, TooLargeForFloat16

# Below this much computing nothing is kept: looking for it would take as long.
WORTH_SECONDS = 2.0
# Reading and writing must be so much quicker than computing.
WORTH_TIMES = 2.0
# Below this size float32 is read as quickly and is exact.
WORTH_FLOAT16_BYTES = 256_000_000
_UNMEASURED = EngineChoice(TENSORFLOW, "Nothing was measured.")


@dataclasses.dataclass(frozen=True)
class Decision:
    """How features are computed and kept, and what was measured to decide it.

    Attributes:
        used: "found", "kept" or "not kept".
        why: One sentence.
        dtype: In which activations are kept: "float32" or "float16".
        engine: What computes, and why.
        compute_seconds: Estimate for all images, of making the view too; 0 where it was not needed.
        disk_seconds: Estimate of writing and reading them once.
    """

    used: str
    why: str
    dtype: str = "float32"
    engine: EngineChoice = _UNMEASURED
    compute_seconds: float = 0.0
    disk_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "Decision":
        """What `to_dict` gave."""
        return cls(**{**facts, "engine": EngineChoice(**facts["engine"])})


class Features:
    """`extract` of one view, from the cache where it has that.

    Args:
        engines: Of the frozen function; its weights and operations are part of what an entry is found by. Views that
            share them are computed by the same engine.
        parts: (n, S, S, 3) uint8 arrays or rows in files; their pixels are the other part.
        view: Of the images.
        cache: Of features; None: the user's.
        num_views: Views that are likely to be computed in all: what converting for a quicker engine has to pay for.

    Example:
        features = Features(Engines(FrozenPrefix(cut)), parts, "plain")
        extracted, decision = features.compute(features.decide())
    """

    def __init__(
        self, engines: Engines, parts: Sequence[Rows], view: View, *, cache: FeatureCache | None = None,
        num_views: int = 1,
    ):  # fmt: skip
        self.engines, self.prefix, self.parts, self.view = engines, engines.graph, parts, view
        self.cache, self.num_views = cache or FeatureCache(), num_views
        self.count = sum(map(len, parts))
        self._content: list[str] | None = None

    def decide(self) -> Decision:
        """Look for an entry; where there is none, measure a batch: computing it, and writing and reading it."""
        found = self.find()
        if found is not None:
            dtype, choice = found
            self.engines.settle(choice)
            return Decision("found", "An earlier run computed the same from the same images.", dtype, choice)
        batch, making = self._sample()
        choice = self.engines.choose(batch, self.count * self.num_views)
        features, *crossing = self.engines.engine()(batch)
        dtype = self._dtype_for(crossing)
        seconds = self.count / choice.images_per_second + making
        measured = Decision("not kept", "There is no cache.", dtype, choice, seconds)
        if not self.cache.available:
            return measured
        if measured.compute_seconds < WORTH_SECONDS:
            return dataclasses.replace(measured, why=f"Computing takes less than {WORTH_SECONDS:g} s.")
        try:
            disk = self._time_on_disk([features, *crossing], dtype) * self.count / len(batch)
        except OSError as error:
            return dataclasses.replace(measured, why=f"The cache cannot be written: {error}.")
        measured = dataclasses.replace(measured, disk_seconds=disk)
        if disk * WORTH_TIMES > measured.compute_seconds:
            return dataclasses.replace(measured, why="Writing and reading takes as long as computing.")
        return dataclasses.replace(measured, used="kept", why="Reading is quicker than computing.")

    def find(self) -> tuple[str, EngineChoice] | None:
        """The dtype and the engine of an entry that is there; None where there is none."""
        for engine, dtype in itertools.product(self.engines.candidates, ("float32", "float16")):
            entry = self.cache.get(self._key(engine, dtype)) if self.cache.available else None
            if entry is not None:
                entry.close()
                return dtype, EngineChoice(**entry.meta)
        return None

    def costs(self) -> tuple[float, float]:
        """Seconds of computing this view of all images, and of writing and reading it once; from one batch.

        An engine must have been chosen.
        """
        batch, making = self._sample()
        self.engines.engine()(batch)  # the first call builds
        began = time.perf_counter()
        outputs = self.engines.engine()(batch)
        computing = (time.perf_counter() - began) * self.count / len(batch) + making
        try:
            return computing, self._time_on_disk(outputs, "float32") * self.count / len(batch)
        except OSError:  # a full disk: training keeps its activations elsewhere, or says so then
            return computing, 0.0

    def _sample(self) -> tuple[np.ndarray, float]:
        """A batch in this view, and the seconds that making the view of all images takes."""
        make, images = view_function(self.view), sample_of(self.parts, self.prefix.batch_size)
        if not isinstance(self.view, RandView):
            return make(images), 0.0  # nothing beside the prefix
        make(images)  # the first call builds
        began = time.perf_counter()
        batch = make(images)
        return batch, (time.perf_counter() - began) * self.count / len(batch)

    def compute(
        self, decision: Decision, *, on_progress: Callable[[int, int], None] | None = None
    ) -> tuple[Extracted, Decision]:
        """The features, found or computed as was decided, maybe by another process, and how they were come by.

        Args:
            decision: Of `decide`.
            on_progress: Called with (done, total).
        """
        self.engines.settle(decision.engine)
        try:
            if decision.used == "not kept":
                return self._computed(decision, on_progress), decision
            return self._kept(decision, on_progress)
        except TooLargeForFloat16:  # beyond what the sample made likely
            return self.compute(dataclasses.replace(decision, dtype="float32"), on_progress=on_progress)

    def _kept(self, decision: Decision, on_progress) -> tuple[Extracted, Decision]:
        def write(stores: dict[str, RowStore]) -> None:
            nonlocal decision
            self._run(stores, on_progress)
            if decision.used == "found":
                decision = dataclasses.replace(decision, used="kept", why="The entry that was found is gone.")

        try:
            entry = self.cache.get_or_fill(
                self._key(decision.engine.engine, decision.dtype),
                self.prefix.stores(self.count, decision.dtype),
                decision.engine.to_dict(),
                write,
            )
        except CacheFull as error:
            decision = dataclasses.replace(decision, used="not kept", why=str(error))
            return self._computed(decision, on_progress), decision
        return self._of(entry, decision), decision

    def _of(self, entry: Entry, decision: Decision) -> Extracted:
        names = self.prefix.stores(0, decision.dtype)
        return self._extracted({name: entry.stores[name] for name in names}, decision)

    def _computed(self, decision: Decision, on_progress) -> Extracted:
        shapes = self.prefix.stores(self.count, decision.dtype)
        stores = {name: RowStore.temporary(*kind) for name, kind in shapes.items()}
        self._run(stores, on_progress)
        return self._extracted(stores, decision)

    def _extracted(self, stores: Mapping[str, RowStore], decision: Decision) -> Extracted:
        rate = decision.engine.images_per_second
        return extracted_of(self.prefix, [stores], self.parts, (self.view,), rate)

    def _run(self, stores: dict[str, RowStore], on_progress) -> None:
        engine, batch_size = self.engines.together()
        run_prefix(engine, self.parts, self.view, stores, batch_size=batch_size, on_progress=on_progress)

    def _key(self, engine: str, dtype: str) -> str:
        if self._content is None:
            self._content = [_digest_of(part) for part in self.parts]
        return cache_key(
            graph=self.prefix.digest, images=self._content, view=view_key(self.view), batch_size=self.prefix.batch_size,
            dtype=dtype, engine=engine, version=VERSIONS[engine],
        )  # fmt: skip

    def _dtype_for(self, crossing: Sequence[np.ndarray]) -> str:
        size = sum(math.prod(shape) * 4 for shape in self.prefix.activation_shapes) * self.count
        if size < WORTH_FLOAT16_BYTES:
            return "float32"
        return "float16" if all(choose_dtype(values) == "float16" for values in crossing) else "float32"

    def _time_on_disk(self, outputs: Sequence[np.ndarray], dtype: str) -> float:
        kinds = self.prefix.stores(len(outputs[0]), dtype)
        place = self.cache.folder if self.cache.available else None
        began = time.perf_counter()
        for kind, values in zip(kinds.values(), outputs, strict=True):
            store = RowStore.temporary(*kind, folder=place)  # without a name: a kill leaves nothing behind
            store.write(0, values)
            store.flush()
            store[:]
        return time.perf_counter() - began


def _digest_of(part: Any) -> str:
    """Of pixels; those in a file know what they were decoded from, and need not be read."""
    return getattr(part, "digest", None) or content_digest(part)
