"""What frozen blocks compute, once for all trials of a search."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import keras

from tfxfer.features.cut import Cut, cut_model
from tfxfer.features.deeper import go_deeper
from tfxfer.features.engines import Engines
from tfxfer.features.extract import Extracted, FrozenPrefix, join_views
from tfxfer.features.reuse import Features
from tfxfer.features.rows import ViewFeatures
from tfxfer.features.views import View
from tfxfer.methods.probe import Probe, fit_probe
from tfxfer.model.freeze import freeze
from tfxfer.train.outcome import TrainingData


@dataclasses.dataclass
class Passes:
    """Passes of images through frozen blocks.

    Attributes:
        computed: That were computed, of the images from pixels or from what crossed a boundary before it.
        seconds: That these took, converting for a quicker engine counted.
        wanted: That training would have needed without sharing: every image in every epoch.
        wanted_seconds: Of those, at the rate of the network as TensorFlow runs it.
    """

    computed: int = 0
    seconds: float = 0.0
    wanted: int = 0
    wanted_seconds: float = 0.0

    def __sub__(self, other: "Passes") -> "Passes":
        return Passes(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def saved_seconds(self) -> float:
        """Less the seconds of what was computed; below zero where a search was too short to gain."""
        return self.wanted_seconds - self.seconds


class SharedFeatures:
    """What crosses the blocks of one source at one image size, for every depth that is asked for.

    A deeper cut starts from what crosses the nearest shallower one, so that no block sees an image in the same view
    twice. Everything is in temporary files, and in the cache folder where that pays.

    Args:
        model: Of `build_model`, with the source's weights; not to be trained.
        data: Images, labels and parts.
        seed: Of the folds that probes are chosen by.
        on_progress: Called with (what, done, total).

    Attributes:
        passes: Through frozen blocks, so far.
    """

    def __init__(
        self, model: keras.Model, data: TrainingData, *, seed: int = 0,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ):  # fmt: skip
        self.model, self.data, self.seed, self._on_progress = model, data, seed, on_progress
        self.passes = Passes()
        self._found: dict[tuple[int, View], tuple[Cut, Extracted]] = {}
        self._seconds_of: dict[int, float] = {}  # an image through so many blocks, as TensorFlow runs them
        self._probes: dict[tuple[tuple[View, ...], str], Probe] = {}

    def at(self, depth: int, views: Sequence[View] = ("plain",)) -> Extracted:
        """What crosses behind the leading blocks.

        Args:
            depth: Of a cut that the network can be cut at.
            views: Of the images.
        """
        return join_views(*(self._view(depth, view) for view in views))

    def probe(self, views: Sequence[View], solver: str) -> Probe:
        """The head on the last features, chosen on held-out images once; `at` has been asked for these views."""
        key = (tuple(views), solver)
        if key not in self._probes:
            data = self.data
            self._probes[key] = fit_probe(
                self._features(views), data.labels, data.weights, data.groups, data.rows, data.held,
                data.num_classes, seed=self.seed, solver=solver,
            )  # fmt: skip
        return self._probes[key]

    def _features(self, views: Sequence[View]) -> ViewFeatures:
        """At the end of the network: they are the same behind every cut."""
        first, *others = [
            next(extracted.features for (_, known), (_, extracted) in self._found.items() if known == view)
            for view in views
        ]
        return functools.reduce(lambda joined, one: joined.joined(one), others, first)

    def count(self, depth: int, images: int) -> None:
        """Note that training took so many images from behind a cut, which would have been passes without sharing."""
        self.passes.wanted += images
        self.passes.wanted_seconds += images * self._seconds_of[depth]

    def _view(self, depth: int, view: View) -> Extracted:
        if (depth, view) not in self._found:
            self._found[depth, view] = self._from_shallower(depth, view) or self._from_pixels(depth, view)
        return self._found[depth, view][1]

    def _cut(self, depth: int) -> Cut:
        freeze(self.model, depth)
        cut = cut_model(self.model, depth)
        assert cut is not None  # depths are those of cuts
        return cut

    def _from_shallower(self, depth: int, view: View) -> tuple[Cut, Extracted] | None:
        shallower = [found for found, known in self._found if known == view and found < depth]
        if not shallower:
            return None
        nearest, began = max(shallower), time.perf_counter()
        deeper = go_deeper(self.model, self._cut(nearest), depth, self._found[nearest, view][1])
        if deeper is None:
            return None
        seconds, count = time.perf_counter() - began, len(self.data.labels)
        self._seconds_of.setdefault(depth, self._seconds_of[nearest] + seconds / count)
        self._note(seconds)
        return deeper

    def _from_pixels(self, depth: int, view: View) -> tuple[Cut, Extracted]:
        began = time.perf_counter()
        cut = self._cut(depth)
        features = Features(Engines(FrozenPrefix(cut)), self.data.parts, view)
        decision = features.decide()
        told = f"frozen features behind {depth} blocks, {view if isinstance(view, str) else 'augmented'}"
        extracted, decision = features.compute(
            decision, on_progress=lambda done, total: self._on_progress(told, done, total)
        )
        self._seconds_of.setdefault(depth, 1 / max(decision.engine.tensorflow_images_per_second, 1e-9))
        self._note(time.perf_counter() - began, computed=decision.used != "found")
        return cut, extracted

    def _note(self, seconds: float, *, computed: bool = True) -> None:
        self.passes.seconds += seconds
        self.passes.computed += len(self.data.labels) * computed
