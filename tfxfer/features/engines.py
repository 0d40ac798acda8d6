"""The quickest way to run a frozen prefix: TensorFlow's graph, or onnxruntime where the images pay for converting."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
import tensorflow as tf

from tfxfer.features.cache import FeatureCache
from tfxfer.features.convert import CONVERTER, convert_graph
from tfxfer.features.extract import Engine, FrozenPrefix, padded
from tfxfer.features.keys import cache_key
from tfxfer.features.shelf import CacheFull
from tfxfer.features.together import Together
from tfxfer.runtime.images import available_cores
from tfxfer.runtime.store import Rows

TENSORFLOW, ONNXRUNTIME = "tensorflow", "onnxruntime"
VERSIONS = {TENSORFLOW: tf.__version__, ONNXRUNTIME: f"{onnxruntime.__version__}, {CONVERTER}"}
# By so much onnxruntime was quicker where it was measured (1.5 to 2.2 times); what it is here shows after converting.
EXPECTED_TIMES = 1.5
# Converting took about as long as building the graph, and the converter must be imported.
IMPORT_SECONDS = 1.0
# Of the largest value of an output; convolutions of both engines agreed to 3e-6 of it.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """Which engine runs a prefix, and what was measured to choose it.

    Attributes:
        engine: "tensorflow" or "onnxruntime".
        why: One sentence.
        images_per_second: Of the engine, on one batch of real images; 0 where nothing was measured.
        tensorflow_images_per_second: Of the graph, on the same batch.
        conversion_seconds: Spent on converting; 0 where the converted graph was found in the cache.
    """

    engine: str
    why: str
    images_per_second: float = 0.0
    tensorflow_images_per_second: float = 0.0
    conversion_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        return dataclasses.asdict(self)


class OnnxPrefix:
    """A converted prefix in onnxruntime, on all cores.

    Args:
        batch_size: Images a call.
        content: An ONNX file.
    """

    def __init__(self, batch_size: int, content: bytes):
        self.batch_size, self.content = batch_size, content
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_cores()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        found = self._session.run(None, {self._input: padded(images, self.batch_size)})
        return tuple(values[: len(images)] for values in found)


class Engines:
    """The engines of one prefix; one of them is chosen, once, for all views.

    Args:
        graph: The prefix in TensorFlow.
        cache: Where converted graphs are kept; None: the user's.
        copies: Of the chosen engine gives all that are to compute, itself among them; it alone by default.
    """

    def __init__(
        self, graph: FrozenPrefix, *, cache: FeatureCache | None = None,
        copies: Callable[[Engine], Sequence[Engine]] = lambda engine: (engine,),
    ):  # fmt: skip
        self._copies = copies
        self._all: tuple[Engine, ...] = ()
        self.graph, self.cache = graph, cache or FeatureCache()
        self.choice: EngineChoice | None = None
        self._onnx: OnnxPrefix | None = None

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the engines that features may come from, the preferred one first."""
        return (self.choice.engine,) if self.choice else (ONNXRUNTIME, TENSORFLOW)

    def settle(self, choice: EngineChoice) -> None:
        """Use what was chosen before, maybe by another process."""
        self.choice = choice

    def engine(self) -> Engine:
        """The chosen engine."""
        assert self.choice is not None
        if self.choice.engine == TENSORFLOW:
            return self.graph
        if self._onnx is None:
            self._onnx, _ = self._converted()
        return self._onnx

    def graph_speed(self, parts: Sequence[Rows]) -> float:
        """Images a second of the TensorFlow graph, measured now."""
        return _speed(self.graph, sample_of(parts, self.graph.batch_size))

    def together(self) -> tuple[Engine, int]:
        """The chosen engine and its copies as one, and the images that it takes in one call."""
        self._all = self._all or tuple(self._copies(self.engine()))
        whole = Together(self._all) if len(self._all) > 1 else self._all[0]
        return whole, self.graph.batch_size * len(self._all)

    def choose(self, batch: np.ndarray, count: int) -> EngineChoice:
        """Measure, convert where that is likely to pay, and check that both engines give the same.

        Args:
            batch: (n, S, S, 3) uint8, real images, n up to the batch size.
            count: Images to be run, each view counted.
        """
        if self.choice is None:
            self.choice = self._choose(batch, count)
        return self.choice

    def _choose(self, batch: np.ndarray, count: int) -> EngineChoice:
        expected = self.graph(batch)  # the first call builds
        speed = _speed(self.graph, batch)

        def graph(why: str, seconds: float = 0.0) -> EngineChoice:
            return EngineChoice(TENSORFLOW, why, speed, speed, seconds)

        if tf.config.list_physical_devices("GPU"):
            return graph("There is a GPU.")
        kept = self._is_kept()
        price = IMPORT_SECONDS + self.graph.build_seconds
        gain = count / speed * (1 - 1 / EXPECTED_TIMES)
        if not kept and gain < price:
            return graph(f"Converting for onnxruntime would take {price:.1f} s and save about {gain:.1f} s.")
        try:
            onnx, seconds = self._converted()
            found = onnx(batch)
        except Exception as error:  # converter and runtime raise anything at an operation they do not know
            return graph(f"It cannot be converted for onnxruntime: {str(error).strip().splitlines()[0][:200]}.")
        for ours, theirs in zip(found, expected, strict=True):
            largest = float(np.abs(ours - theirs).max())
            if not largest <= TOLERANCE * max(float(np.abs(theirs).max()), 1e-30):
                return graph(f"onnxruntime gives other numbers, by {largest:.2g}.", seconds)
        quick = _speed(onnx, batch)
        if quick < speed:
            return graph(f"onnxruntime is slower: {quick:.0f} images a second.", seconds)
        self._onnx = onnx
        return EngineChoice(ONNXRUNTIME, f"{quick / speed:.1f} times as fast as the graph.", quick, speed, seconds)

    def _key(self) -> str:
        return cache_key(onnx=self.graph.digest, batch_size=self.graph.batch_size, converter=CONVERTER)

    def _is_kept(self) -> bool:
        entry = self.cache.get(self._key())
        if entry is None:
            return False
        entry.close()
        return True

    def _converted(self) -> tuple[OnnxPrefix, float]:
        """The prefix in onnxruntime, and the seconds that converting took."""
        entry = self.cache.get(self._key())
        if entry is not None:
            with entry:
                return OnnxPrefix(self.graph.batch_size, entry.stores["model"][:].tobytes()), 0.0
        began = time.perf_counter()
        content = convert_graph(self.graph.function)
        seconds = time.perf_counter() - began
        rows = np.frombuffer(content, np.uint8)
        if self.cache.available:
            try:
                shapes = {"model": (rows.shape, "uint8")}
                self.cache.get_or_fill(self._key(), shapes, {}, lambda stores: stores["model"].write(0, rows)).close()
            except CacheFull:
                pass  # the next run converts anew
        return OnnxPrefix(self.graph.batch_size, content), seconds


def quickest(graph: FrozenPrefix, parts: Sequence[Rows]) -> Engine:
    """The engine for one pass over all images.

    Args:
        graph: The prefix.
        parts: (n, S, S, 3) uint8 arrays.
    """
    engines = Engines(graph)
    engines.choose(sample_of(parts, graph.batch_size), sum(map(len, parts)))
    return engines.engine()


def sample_of(parts: Sequence[Rows], count: int) -> np.ndarray:
    """Images from all over the largest part; folders are sorted by class."""
    pixels = max(parts, key=len)
    return pixels[np.linspace(0, len(pixels) - 1, min(count, len(pixels))).astype(int)]


def _speed(engine: Engine, batch: np.ndarray) -> float:
    """Images a second of the quicker of two calls."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        engine(batch)
        seconds.append(time.perf_counter() - began)
    return len(batch) / max(min(seconds), 1e-9)
