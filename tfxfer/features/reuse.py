"""Features computed once and found again by later runs, where that is quicker than computing them anew."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfxfer.features.cache import CacheFull, Entry, FeatureCache, cache_key, content_digest
from tfxfer.features.extract import IN_MEMORY_BYTES, VIEWS, Extracted, FrozenPrefix, allocate, extract
from tfxfer.features.store import RowStore

# Below this much computing nothing is kept: looking for it would take as long.
WORTH_SECONDS = 2.0
# Reading and writing must be so much quicker than computing.
WORTH_TIMES = 2.0


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether features are kept on disk, and what was measured to decide it.

    Attributes:
        used: "found", "kept" or "not kept".
        why: One sentence.
        compute_seconds: Estimate for all images, of one measured batch; 0 where it was not needed.
        disk_seconds: Estimate of writing and reading them once.
    """

    used: str
    why: str
    compute_seconds: float = 0.0
    disk_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        return dataclasses.asdict(self)


def extract_once(
    prefix: FrozenPrefix,
    parts: Sequence[np.ndarray],
    view: str,
    *,
    cache: FeatureCache | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Extracted, Decision]:
    """`extract` of one view, from the cache where it has that.

    Args:
        prefix: The frozen function; its weights and operations are part of what an entry is found by.
        parts: (n, S, S, 3) uint8 arrays; their pixels are the other part.
        view: A name in `VIEWS`.
        cache: Of features; None: the user's.
        on_progress: Called with (done, total).

    Returns:
        The features, and how they were come by.
    """
    cache = cache or FeatureCache()
    if not cache.available:
        return extract(prefix, parts, (view,), on_progress=on_progress), Decision("not kept", "There is no cache.")
    key = cache_key(
        graph=prefix.digest, images=content_digest(parts), view=view, batch_size=prefix.batch_size,
        tensorflow=tf.__version__,
    )  # fmt: skip
    entry = cache.get(key)
    if entry is not None:
        return _read(entry, prefix, view), Decision("found", "An earlier run computed the same from the same images.")
    decision = _decide(prefix, parts, view, cache)
    found = extract(prefix, parts, (view,), on_progress=on_progress)
    if decision.used == "kept":
        decision = _keep(cache, key, found, decision)
    return found, decision


def _decide(prefix: FrozenPrefix, parts: Sequence[np.ndarray], view: str, cache: FeatureCache) -> Decision:
    """Measure a batch: computing it, and writing and reading what comes out."""
    count = sum(map(len, parts))
    batch = VIEWS[view](next(pixels for pixels in parts if len(pixels))[: prefix.batch_size])
    prefix(batch)  # the first call builds
    began = time.perf_counter()
    activations, features = prefix(batch)
    each = (time.perf_counter() - began) / prefix.batch_size
    compute = each * count
    if compute < WORTH_SECONDS:
        return Decision("not kept", f"Computing takes less than {WORTH_SECONDS:g} s.", compute)
    try:
        with tempfile.TemporaryDirectory(dir=cache.folder, prefix=".measure-") as folder:
            began = time.perf_counter()
            for name, values in (("activations", activations), ("features", features)):
                store = RowStore.create(Path(folder) / name, values.shape)
                store.write(0, values)
                store.flush()
                store[:]
            disk = (time.perf_counter() - began) / len(batch) * count
    except OSError as error:
        return Decision("not kept", f"The cache cannot be written: {error}.", compute)
    if disk * WORTH_TIMES > compute:
        return Decision("not kept", "Writing and reading takes as long as computing.", compute, disk)
    return Decision("kept", "Reading is quicker than computing.", compute, disk)


def _keep(cache: FeatureCache, key: str, found: Extracted, decision: Decision) -> Decision:
    values = {"features": found.features[0]}
    if found.activations is not found.features:
        values["activations"] = found.activations[0]

    def write(stores: dict[str, RowStore]) -> None:
        for name, array in values.items():
            for start in range(0, len(array), 256):
                stores[name].write(start, array[start : start + 256])

    shapes = {name: (array.shape, "float32") for name, array in values.items()}
    try:
        cache.get_or_fill(key, shapes, {"images_per_second": found.images_per_second}, write).close()
    except CacheFull as error:
        return dataclasses.replace(decision, used="not kept", why=str(error))
    return decision


def _read(entry: Entry, prefix: FrozenPrefix, view: str) -> Extracted:
    with entry:
        features = entry.stores["features"][:][None]
        activations = features
        if not prefix.ends_at_features:
            store = entry.stores["activations"]
            activations = allocate((1, *store.shape))
            step = max(IN_MEMORY_BYTES // 16 // max(store.nbytes // max(len(store), 1), 1), 1)
            for start in range(0, len(store), step):
                activations[0, start : start + step] = store[start : start + step]
        return Extracted(activations, features, (view,), float(entry.meta["images_per_second"]))
