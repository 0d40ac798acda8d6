"""Several processes at one training: the chief decides, reads and writes; the others compute what it sends them."""

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from tfxfer.features.extract import Engine
from tfxfer.features.portable import pack, unpack
from tfxfer.specs import Stage
from tfxfer.train.forgetting import terms_of
from tfxfer.train.replicas import Replicas
from tfxfer.train.step import Share, TrainingStep, make_step
from tfxfer.train.wire import Arrays, Wire, WorkerLost, in_step

# Of the first wire; strategies count theirs up from 1.
FIRST_KEY = 1_000_000


class Crew:
    """The other workers, as the chief sees them.

    Args:
        strategy: A MultiWorkerMirroredStrategy, of the chief.
        num_workers: The chief included.
    """

    def __init__(self, strategy: tf.distribute.Strategy, num_workers: int):
        device = device_of(strategy)
        self.num_workers = num_workers
        self._out = {index: Wire(device, FIRST_KEY + 2 * index) for index in range(1, num_workers)}
        self._in = {index: Wire(device, FIRST_KEY + 2 * index + 1) for index in range(1, num_workers)}
        self._pool = ThreadPoolExecutor(num_workers - 1)
        self._numbers = itertools.count()
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.num_images = [0] * num_workers  # whose frozen features each has computed

    def tell(self, facts: Mapping[str, Any], arrays: Arrays | Callable[[int], Arrays] | None = None) -> None:
        """Send all others the same, or to each by its index."""

        def send(index: int) -> None:
            self._out[index].send(facts, arrays(index) if callable(arrays) else arrays)

        list(self._pool.map(send, self._out))

    def ask(self, facts: Mapping[str, Any]) -> list[tuple[dict[str, Any], Arrays]]:
        """Tell all others, and hear each."""
        self.tell(facts)
        return list(self._pool.map(lambda index: self._in[index].receive(), self._in))

    def opened(self, owner: Any, facts: Mapping[str, Any], arrays: Arrays) -> int:
        """Let all others make something; the number by which they know it, as long as `owner` lives."""
        number = next(self._numbers)
        owner.number = number
        self._alive.add(owner)
        self.tell({**facts, "number": number, "alive": [each.number for each in self._alive]}, arrays)
        return number

    def engines(self, engine: Engine) -> list[Engine]:
        """A copy of an engine on each of the others."""
        facts, content = pack(engine)
        held = _Held()
        self.opened(held, {"do": "engine", **facts}, {"content": content})
        return [self._remote(index, held) for index in self._out]

    def _remote(self, index: int, held: "_Held") -> Engine:
        def compute(images: np.ndarray) -> tuple[np.ndarray, ...]:
            self._out[index].send({"do": "images", "number": held.number}, {"images": images})
            _, found = self._in[index].receive()
            self.num_images[index] += len(images)
            return tuple(found.values())

        return compute

    def counting(self, engine: Engine) -> Engine:
        """The chief's own engine, its images counted too."""

        def compute(images: np.ndarray) -> tuple[np.ndarray, ...]:
            self.num_images[0] += len(images)
            return engine(images)

        return compute

    def end(self, facts: Mapping[str, Any]) -> None:
        """Let the others go; what they are told is how this training ended."""
        for wire in self._out.values():
            try:
                wire.send({"do": "end", **facts})
            except WorkerLost:  # it knows by itself
                continue


class _Held:
    """Something that the others have made."""

    number: int


class Member:
    """A worker that is not the chief: does what it is told, until the end.

    Args:
        strategy: A MultiWorkerMirroredStrategy.
        index: Of this worker, from 1.
    """

    def __init__(self, strategy: tf.distribute.Strategy, index: int):
        device = device_of(strategy)
        self.strategy, self.index = strategy, index
        self._in, self._out = Wire(device, FIRST_KEY + 2 * index), Wire(device, FIRST_KEY + 2 * index + 1)
        self._made: dict[int, Any] = {}

    def serve(self) -> dict[str, Any]:
        """Work until the chief ends; what it says of that.

        Raises:
            WorkerLost: Where it ends without a word.
        """
        doing = {
            "step": self._make_step, "engine": self._make_engine, "set": self._set, "train": self._train,
            "images": self._compute, "digests": self._tell_digests,
        }  # fmt: skip
        while True:
            facts, arrays = self._in.receive()
            what = facts.pop("do")
            if what == "end":
                self._made.clear()
                return facts
            for number in set(self._made).difference(facts.get("alive", self._made)):
                del self._made[number]
            with in_step():
                doing[what](facts, arrays)

    def _make_step(self, facts: dict[str, Any], arrays: Arrays) -> None:
        self._made[facts["number"]] = build_step(facts, arrays, self.strategy)

    def _make_engine(self, facts: dict[str, Any], arrays: Arrays) -> None:
        self._made[facts["number"]] = unpack(facts, arrays["content"])

    def _set(self, facts: dict[str, Any], arrays: Arrays) -> None:
        replicas, step = self._made[facts["number"]]
        replicas.set(_listed(arrays, "model"))
        for variable, value in zip(step.variables, _listed(arrays, "step"), strict=True):
            variable.assign(value)

    def _train(self, facts: dict[str, Any], arrays: Arrays) -> None:
        _, step = self._made[facts["number"]]
        step.optimizer.learning_rate = facts["learning_rate"]
        step.on_shares([unpacked_share(arrays, place) for place in range(len(step.numbers))], facts["count"])

    def _compute(self, facts: dict[str, Any], arrays: Arrays) -> None:
        outputs = self._made[facts["number"]](arrays["images"])
        self._out.send({}, {str(place): values for place, values in enumerate(outputs)})

    def _tell_digests(self, facts: dict[str, Any], arrays: Arrays) -> None:
        replicas, _ = self._made[facts["number"]]
        self._out.send({"digests": replicas.digests()})


def build_step(
    facts: Mapping[str, Any], arrays: Arrays, strategy: tf.distribute.Strategy
) -> tuple[Replicas, TrainingStep]:
    """Copies of a network, and the step that they take together.

    Args:
        facts: `network` (of `describe`), `stage`, `factors`, `precision`, `terms` (of `Regularizer.describe`, or None).
        arrays: Those of the terms, `terms/0` and so on.
        strategy: Where; all its workers must do this at once.
    """
    replicas = Replicas(facts["network"], strategy)
    terms = facts["terms"] and terms_of(facts["terms"], _listed(arrays, "terms"), replicas.variables)
    stage, precision = Stage.from_dict(facts["stage"]), facts["precision"]
    return replicas, make_step(replicas.model, stage, facts["factors"], strategy, terms, precision)


def packed_share(share: Share, place: int) -> Arrays:
    """A share as arrays of a message, where it has several."""
    crossing = share.activations if isinstance(share.activations, tuple) else (share.activations,)
    named = {f"{place}/activations/{index}": tensor for index, tensor in enumerate(crossing)}
    return {
        **named,
        f"{place}/targets": share.targets,
        f"{place}/weights": share.weights,
        f"{place}/recorded": share.recorded,
    }


def unpacked_share(arrays: Arrays, place: int) -> Share:
    """What `packed_share` was given."""
    crossing = tuple(_listed(arrays, f"{place}/activations"))
    rest = (arrays[f"{place}/{name}"] for name in ("targets", "weights", "recorded"))
    return Share(crossing if len(crossing) > 1 else crossing[0], *rest)


def device_of(strategy: tf.distribute.Strategy) -> str:
    """The CPU of this worker."""
    resolver = strategy.cluster_resolver
    return f"/job:{resolver.task_type}/task:{resolver.task_id}/device:CPU:0"


def _listed(arrays: Arrays, kind: str) -> Sequence[np.ndarray]:
    count = sum(name.startswith(f"{kind}/") for name in arrays)
    return [arrays[f"{kind}/{index}"] for index in range(count)]
