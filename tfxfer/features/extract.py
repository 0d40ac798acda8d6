"""Run the frozen prefix once over all images and views, on the quickest engine at hand."""

import dataclasses
import functools
import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from tfxfer.features.cut import Cut

IN_MEMORY_BYTES = 2_000_000_000
VIEWS = {"plain": lambda images: images, "mirror": lambda images: images[:, :, ::-1]}


@dataclasses.dataclass(frozen=True, eq=False)
class Extracted:
    """What the frozen part computes for N images in V views.

    Attributes:
        activations: (V, N, ...) float32, what crosses the cut.
        features: (V, N, D) float32, the backbone's output.
        views: Their names.
        images_per_second: Measured, a view counted as an image.
    """

    activations: np.ndarray
    features: np.ndarray
    views: tuple[str, ...]
    images_per_second: float

    def with_views(self, count: int) -> "Extracted":
        """The first `count` views only."""
        return dataclasses.replace(
            self, activations=self.activations[:count], features=self.features[:count], views=self.views[:count]
        )


def join_views(first: Extracted, second: Extracted) -> Extracted:
    """The views of both, for the same images."""
    features = np.concatenate([first.features, second.features])
    same = first.activations is first.features
    activations = features if same else np.concatenate([first.activations, second.activations])
    return Extracted(activations, features, first.views + second.views, second.images_per_second)


class FrozenPrefix:
    """The prefix of a cut, and the features at the end of the backbone, as one function with constant weights.

    Constants let TensorFlow fold BatchNorm into the convolutions and fuse the activations: about twice the speed of
    `predict`. The weights are those at the time of making.

    Args:
        cut: Of `cut_model`.
        batch_size: Images a call; the last batch is padded so that one graph serves all.
    """

    def __init__(self, cut: Cut, batch_size: int = 64):
        self.batch_size = batch_size
        shape = (batch_size, *cut.prefix.input_shape[1:])

        @tf.function(jit_compile=False)
        def compute(images):
            activations = cut.prefix(tf.cast(images, "float32"), training=False)
            return activations, cut.tail(activations, training=False) if cut.tail else tf.identity(activations)

        concrete = compute.get_concrete_function(tf.TensorSpec(shape, "uint8"))
        self._function = convert_variables_to_constants_v2(concrete)
        self.activation_shape = tuple(concrete.structured_outputs[0].shape[1:])
        self.num_features = int(concrete.structured_outputs[1].shape[-1])
        self.ends_at_features = cut.tail is None

    @functools.cached_property
    def digest(self) -> str:
        """Of what it computes, weights and operations, not of how these are called."""
        return _graph_digest(self._function.graph.as_graph_def())

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, S, S, 3) uint8, n up to the batch size, to (activations, features)."""
        count = len(images)
        if count < self.batch_size:
            images = np.concatenate([images, np.zeros((self.batch_size - count, *images.shape[1:]), np.uint8)])
        activations, features = self._function(tf.constant(np.ascontiguousarray(images)))
        return activations.numpy()[:count], features.numpy()[:count]


def extract(
    prefix: FrozenPrefix,
    parts: Sequence[np.ndarray],
    views: tuple[str, ...] = ("plain",),
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Compute activations and features of all images in all views.

    Args:
        prefix: The frozen function.
        parts: (n, S, S, 3) uint8 arrays; their images are numbered through.
        views: Names in `VIEWS`.
        on_progress: Called with (done, total), a view counted as an image.

    Returns:
        The arrays; where they pass 2 GB, in a temporary file mapped into memory.
    """
    started = time.perf_counter()
    count = sum(map(len, parts))
    features = allocate((len(views), count, prefix.num_features))
    activations = features if prefix.ends_at_features else allocate((len(views), count, *prefix.activation_shape))
    done = 0
    for index, view in enumerate(views):
        first = 0
        for pixels in parts:
            for start in range(0, len(pixels), prefix.batch_size):
                batch = VIEWS[view](pixels[start : start + prefix.batch_size])
                rows = slice(first + start, first + start + len(batch))
                activations[index, rows], features[index, rows] = prefix(batch)
                done += len(batch)
                if on_progress:
                    on_progress(done, count * len(views))
            first += len(pixels)
    seconds = max(time.perf_counter() - started, 1e-9)
    return Extracted(activations, features, tuple(views), done / seconds)


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


def allocate(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """An array of zeros; above 2 GB in a temporary file that goes with the process."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY_BYTES:
        return np.zeros(shape, dtype)
    with tempfile.NamedTemporaryFile(dir=Path(tempfile.gettempdir()), prefix="tfxfer-") as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)  # the mapping outlives the name
