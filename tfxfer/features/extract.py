"""Run the frozen prefix once over all images and views, reading and writing while it computes."""

import dataclasses
import functools
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from tfxfer.features.activations import Activations
from tfxfer.features.crossing import Normalised, crossing_of
from tfxfer.features.cut import Cut
from tfxfer.features.rows import ViewFeatures
from tfxfer.features.views import View, view_function, view_name
from tfxfer.runtime.store import Rows, RowStore

BATCHES_AHEAD = 2


class Engine(Protocol):
    """(n, S, S, 3) uint8, n up to the batch size, to features, and what crosses the cut where it is another."""

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, ...]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Extracted:
    """What the frozen part computes for N images in V views.

    Attributes:
        activations: What crosses the cut.
        features: (V, N, D) float32, the backbone's output, in files.
        views: Their names.
        images_per_second: Measured, a view counted as an image.
        fresh_features: Features of any views, made when they are asked for; None where `features` has all views.
    """

    activations: Activations
    features: ViewFeatures
    views: tuple[str, ...]
    images_per_second: float
    fresh_features: Activations | None = None

    @property
    def features_by_view(self) -> ViewFeatures | Activations:
        """Features of all views, indexed by (views, rows)."""
        return self.features if self.fresh_features is None else self.fresh_features

    def with_views(self, count: int) -> "Extracted":
        """The first `count` views only."""
        return dataclasses.replace(
            self, activations=self.activations.first(count), features=self.features.first(count),
            views=self.views[:count],
        )  # fmt: skip


def join_views(first: Extracted, *others: Extracted) -> Extracted:
    """The views of all, for the same images."""
    activations, features, views = first.activations, first.features, first.views
    for found in others:
        activations, features = activations.joined(found.activations), features.joined(found.features)
        views += found.views
    return Extracted(activations, features, views, (first, *others)[-1].images_per_second)


class FrozenPrefix:
    """The prefix of a cut, and the features at the end of the backbone, as one function with constant weights.

    Constants let TensorFlow fold BatchNorm into the convolutions and fuse the activations: about twice the speed of
    `predict`. The weights are those at the time of making.

    Args:
        cut: Of `cut_model`.
        batch_size: Images a call; the last batch is padded so that one graph serves all.
    """

    def __init__(self, cut: Cut, batch_size: int = 64):
        began = time.perf_counter()
        self.batch_size = batch_size
        shape = (batch_size, *cut.prefix.input_shape[1:])
        # Before the first block that is the normalised pixels: quicker made anew than read.
        keeps_none = cut.depth == 0 and cut.tail is not None
        self._normalise = crossing_of(cut) if keeps_none else None
        self._normalised_shape = tuple(cut.prefix.output_shape[1:]) if keeps_none else ()

        @tf.function(jit_compile=False)
        def compute(images):
            activations = cut.prefix(tf.cast(images, "float32"), training=False)
            if cut.tail is None:
                return (activations,)
            crossing = () if keeps_none else tf.nest.flatten(activations)
            return (cut.tail(activations, training=False), *crossing)

        concrete = compute.get_concrete_function(tf.TensorSpec(shape, "uint8"))
        self.function = convert_variables_to_constants_v2(concrete)
        features, *activations = (tuple(output.shape[1:]) for output in concrete.structured_outputs)
        self.num_features = int(features[0])
        self.activation_shapes = tuple(activations)  # none where the cut is before the first block or behind the last
        self.build_seconds = time.perf_counter() - began

    def stores(self, count: int, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name to (shape, dtype) of what is kept for so many images, in the order of the outputs.

        Features stay float32: they are small, and a solver without regularisation would see the rounding.
        """
        crossing = {
            f"activations_{index}": ((count, *shape), dtype) for index, shape in enumerate(self.activation_shapes)
        }
        return {"features": ((count, self.num_features), "float32"), **crossing}

    def activations(self, stores: Mapping[str, RowStore], parts: Sequence[Rows], view: View) -> Sequence[Rows]:
        """What crosses the cut, each tensor as rows, where `stores` were filled with this view of these images."""
        if self._normalise is not None:
            return [Normalised(self._normalise, parts, view, self._normalised_shape)]
        return [store for name, store in stores.items() if name != "features"] or [stores["features"]]

    @functools.cached_property
    def digest(self) -> str:
        """Of what it computes, weights and operations, not of how these are called."""
        return _graph_digest(self.function.graph.as_graph_def())

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """(n, S, S, 3) uint8, n up to the batch size, to features, and what crosses the cut where it is another."""
        found = self.function(tf.constant(padded(images, self.batch_size)))
        return tuple(values.numpy()[: len(images)] for values in found)


def padded(images: np.ndarray, batch_size: int) -> np.ndarray:
    """A contiguous batch of the full size, black images behind those that are there."""
    if len(images) == batch_size:
        return np.ascontiguousarray(images)
    return np.concatenate([images, np.zeros((batch_size - len(images), *images.shape[1:]), np.uint8)])


def extract(
    prefix: FrozenPrefix,
    parts: Sequence[Rows],
    views: tuple[View, ...] = ("plain",),
    *,
    engine: Engine | None = None,
    dtype: str = "float32",
    on_progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Compute activations and features of all images in all views.

    Args:
        prefix: The frozen function.
        parts: (n, S, S, 3) uint8 arrays or rows in files; their images are numbered through.
        views: Of the images.
        engine: What runs it; TensorFlow by default.
        dtype: In which activations are kept: "float32", "float16".
        on_progress: Called with (done, total), a view counted as an image.

    Returns:
        What was computed, in temporary files.

    Raises:
        TooLargeForFloat16: Where an activation is.
    """
    started = time.perf_counter()
    count = sum(map(len, parts))
    stores = [{name: RowStore.temporary(*kind) for name, kind in prefix.stores(count, dtype).items()} for _ in views]
    for index, (view, found) in enumerate(zip(views, stores, strict=True)):

        def tell(done: int, total: int, before: int = index * count) -> None:
            if on_progress:
                on_progress(before + done, total * len(views))

        run_prefix(engine or prefix, parts, view, found, batch_size=prefix.batch_size, on_progress=tell)
    seconds = max(time.perf_counter() - started, 1e-9)
    return extracted_of(prefix, stores, parts, views, count * len(views) / seconds)


def run_prefix(
    engine: Engine,
    parts: Sequence[Rows],
    view: View,
    stores: Mapping[str, RowStore],
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill the stores of `FrozenPrefix.stores` with one view of all images.

    The next batches are read (and decoded, where `parts` decode what is asked for) and the last one is written while
    the engine computes.
    """
    done, count = 0, sum(map(len, parts))
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        places = ((pixels, start) for pixels in parts for start in range(0, len(pixels), batch_size))

        def read(pixels: Rows, start: int) -> np.ndarray:
            return np.ascontiguousarray(view_function(view)(pixels[start : start + batch_size]))

        def write(start: int, outputs: Sequence[np.ndarray]) -> None:
            for store, values in zip(stores.values(), outputs, strict=True):
                store.write(start, values)

        ahead = deque(reader.submit(read, *place) for place in itertools.islice(places, BATCHES_AHEAD))
        writing: Future | None = None
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(reader.submit(read, *place) for place in itertools.islice(places, 1))
            outputs = engine(batch)
            if writing is not None:
                writing.result()
            writing = writer.submit(write, done, outputs)
            done += len(batch)
            if on_progress:
                on_progress(done, count)
        if writing is not None:
            writing.result()


def extracted_of(
    prefix: FrozenPrefix, stores: Sequence[Mapping[str, RowStore]], parts: Sequence[Rows], views: Sequence[View],
    images_per_second: float,
) -> Extracted:  # fmt: skip
    """What the stores of `FrozenPrefix.stores`, of each view, hold."""
    for store in (store for found in stores for name, store in found.items() if name != "features"):
        store.read_as = "float32"
    crossing = [prefix.activations(found, parts, view) for found, view in zip(stores, views, strict=True)]
    features = ViewFeatures([found["features"] for found in stores])
    return Extracted(Activations(crossing), features, tuple(map(view_name, views)), images_per_second)


def _graph_digest(graph: Any) -> str:
    """SHA-256 over what leads to a graph's outputs: operations, constants and wiring.

    Not over names or the order of nodes: Keras counts layers up, and TensorFlow lists captured weights in any order.
    """
    nodes = {node.name: node for node in graph.node}
    found: dict[str, bytes] = {}
    for node in graph.node:  # every input stands somewhere; a stack, since networks are deeper than Python's recursion
        stack = [node.name]
        while stack:
            name = stack[-1]
            if name in found:
                stack.pop()
                continue
            sources = [_source_of(given) for given in nodes[name].input]
            waiting = [source for source, _ in sources if source not in found]
            stack += waiting
            if not waiting:
                found[name] = _node_digest(nodes[name], [(found[source], kind) for source, kind in sources])
    ends = {source for node in graph.node for source, _ in map(_source_of, node.input)}
    outputs = [found[node.name] for node in graph.node if node.name not in ends]
    return hashlib.sha256(b"".join([graph.library.SerializeToString(deterministic=True), *sorted(outputs)])).hexdigest()


def _source_of(given: str) -> tuple[str, str]:
    """The node that an input comes from, and which of its outputs; "^" for one that is only waited for."""
    name, _, output = given.removeprefix("^").partition(":")
    return name, "^" if given.startswith("^") else output


def _node_digest(node: Any, sources: list[tuple[bytes, str]]) -> bytes:
    waited = sorted(digest for digest, kind in sources if kind == "^")
    digest = hashlib.sha256(node.op.encode())
    for name in sorted(name for name in node.attr if not name.startswith("_")):
        digest.update(name.encode() + b"\0" + node.attr[name].SerializeToString(deterministic=True))
    for source, kind in sources:
        if kind != "^":
            digest.update(source + kind.encode() + b"\0")
    return hashlib.sha256(digest.digest() + b"".join(waited)).digest()
