"""On what a training runs: one device, several of this machine, or several machines."""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfxfer.errors import CheckError, InputError
from tfxfer.features.extract import Engine
from tfxfer.runtime.cluster import VARIABLE, Cluster, cluster_for, read_cluster
from tfxfer.runtime.process import ended_by
from tfxfer.specs import Stage
from tfxfer.train.batches import Batch
from tfxfer.train.crew import Crew, Member, build_step, packed_share
from tfxfer.train.forgetting import Regularizer
from tfxfer.train.replicas import describe
from tfxfer.train.step import StepResult, TrainingStep, make_step, shares_of
from tfxfer.train.wire import Arrays, in_step


@dataclasses.dataclass(frozen=True, eq=False)
class Devices:
    """What takes the training steps.

    Everything else of a run (probe, decisions, scores, files) is done once, by this process; so what it decides does
    not depend on how many devices there are.

    Attributes:
        strategy: Of TensorFlow; None for one device.
        name: An entry of `STRATEGIES`.
        precision: What layers compute in.
        crew: The other workers, where this one is the chief of several.
        member: What does the chief's bidding, where it is not.
    """

    strategy: tf.distribute.Strategy | None = None
    name: str = "none"
    precision: str = "float32"
    crew: Crew | None = None
    member: Member | None = None

    @property
    def num_replicas(self) -> int:
        """Copies of the network that a batch is shared among."""
        return self.strategy.num_replicas_in_sync if self.strategy else 1

    def step(
        self,
        model: keras.Model,
        stage: Stage,
        factors: Mapping[str, float] | None = None,
        regularizer: Regularizer | None = None,
    ) -> "TrainingStep | ReplicatedStep":
        """The step of a stage, on all devices.

        Args:
            model: Activations to logits, with variables of its own; its `trainable` flags stay as they are.
            stage, factors, regularizer: As `make_step` takes them.

        Raises:
            InputError: Where the network cannot be copied.
        """
        if self.strategy is None:
            return make_step(model, stage, factors, regularizer=regularizer, precision=self.precision)
        return ReplicatedStep(model, stage, factors, regularizer, self)

    def engines(self, engine: Engine) -> Sequence[Engine]:
        """What computes frozen features: the engine, and copies of it on other workers."""
        return (self.crew.counting(engine), *self.crew.engines(engine)) if self.crew else (engine,)

    def describe(self) -> dict[str, Any]:
        """For run.json."""
        told: dict[str, Any] = {"strategy": self.name, "num_replicas": self.num_replicas}
        if self.strategy:
            told["kinds"] = sorted({device.split(":")[-2] for device in self.strategy.extended.worker_devices})
        if self.crew:
            told |= {"num_workers": self.crew.num_workers, "images_by_worker": list(self.crew.num_images)}
        return told


class ReplicatedStep:
    """A step that copies of a model take together; the model itself follows them, step by step.

    So whatever reads the model between two steps (averages, callbacks, checkpoints, scores) is as on one device.

    Args:
        model, stage, factors, regularizer: As `Devices.step` takes them.
        devices: Several.
    """

    number: int  # by which other workers know it

    def __init__(
        self,
        model: keras.Model,
        stage: Stage,
        factors: Mapping[str, float] | None,
        regularizer: Regularizer | None,
        devices: Devices,
    ):
        assert devices.strategy is not None  # or there is nothing to be replicated
        self.model, self._crew = model, devices.crew
        terms, arrays = regularizer.describe(model.variables) if regularizer else (None, [])
        facts = {
            "network": describe(model), "stage": stage.to_dict(), "factors": factors, "terms": terms,
            "precision": devices.precision,
        }  # fmt: skip
        named = {f"terms/{index}": np.asarray(array) for index, array in enumerate(arrays)}
        if self._crew:
            self._crew.opened(self, {"do": "step", **facts}, named)
        with in_step():
            self._replicas, self._step = build_step(facts, named, devices.strategy)
        self._variables = list(model.variables)
        self._follow = tf.function(lambda: self._replicas.copy_to(self._variables))

    @property
    def optimizer(self) -> keras.optimizers.Optimizer:
        """Its variables are the strategy's."""
        return self._step.optimizer

    @property
    def variables(self) -> list[Any]:
        """What a step remembers beside the model."""
        return self._step.variables

    def push(self) -> None:
        """The variables of model and step were set: set those of all copies."""
        values = [variable.numpy() for variable in self._variables]
        self._replicas.set(values)
        if self._crew:
            state = {"model": values, "step": [variable.numpy() for variable in self.variables]}
            arrays = {f"{kind}/{index}": value for kind, found in state.items() for index, value in enumerate(found)}
            self._crew.tell({"do": "set", "number": self.number}, arrays)

    def __call__(self, batch: Batch) -> StepResult:
        """Train on one batch.

        Raises:
            WorkerLost: Where another worker is gone.
        """
        shares, numbers = shares_of(batch, self._step.num_replicas), self._step.numbers
        if self._crew:
            rate = float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))
            told = {"do": "train", "number": self.number, "learning_rate": rate, "count": len(batch.rows)}

            def of_worker(index: int) -> Arrays:
                own = shares[index * len(numbers) : (index + 1) * len(numbers)]
                packed = (packed_share(share, place) for place, share in enumerate(own))
                return {name: value for found in packed for name, value in found.items()}

            self._crew.tell(told, of_worker)
        with in_step():
            result = self._step.on_shares([shares[number] for number in numbers], len(batch.rows))
        self._follow()
        return result

    def check(self) -> None:
        """Make sure that all copies of the model are alike, to the last bit.

        Raises:
            CheckError: Where they are not.
        """
        found = self._replicas.digests()
        if self._crew:
            answers = self._crew.ask({"do": "digests", "number": self.number})
            found += [digest for told, _ in answers for digest in told["digests"]]
        if len(set(found)) > 1:
            raise CheckError(
                f"The {len(found)} copies of the network are no longer alike after training; nothing of it is kept. "
                "Train with strategy 'none', and report this with run.json."
            )


def choose_devices(asked: "str | tf.distribute.Strategy | Devices" = "auto") -> Devices:
    """What to train on. Of several machines each must ask, before it does anything else with TensorFlow.

    Args:
        asked: An entry of `STRATEGIES`, or a strategy of TensorFlow. "auto": several machines where TF_CONFIG names
            them, else several GPUs where there are, else one device.

    Raises:
        InputError: Where that is not to be had here.
    """
    if isinstance(asked, Devices):
        return asked
    if isinstance(asked, tf.distribute.Strategy):
        return _of_strategy(asked)
    cluster = cluster_for(asked)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:  # by default TensorFlow takes all memory of all of them at once
        with contextlib.suppress(RuntimeError):  # it is in use already
            tf.config.experimental.set_memory_growth(gpu, True)
    if cluster is not None:
        return _several_machines(cluster)
    if asked == "mirrored" or (asked == "auto" and len(gpus) > 1):
        return _mirrored()
    return Devices()


@functools.cache
def _several_machines(cluster: Cluster) -> Devices:
    """Once a process: TensorFlow joins a cluster when it starts, and never again."""
    try:
        with ended_by(signal.SIGINT):  # SIGTERM TensorFlow takes for itself until all are there
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise InputError(
            f"{VARIABLE} names {len(cluster.addresses)} workers, but TensorFlow is at work here already ({error}); "
            "call fit before anything else of TensorFlow, or make the tf.distribute.MultiWorkerMirroredStrategy at the "
            "beginning and give it as `strategy`."
        ) from None
    return _of_workers(strategy, cluster)


def _of_workers(strategy: tf.distribute.Strategy, cluster: Cluster) -> Devices:
    if cluster.is_chief:
        return Devices(strategy, "multi_worker", crew=Crew(strategy, len(cluster.addresses)))
    return Devices(strategy, "multi_worker", member=Member(strategy, cluster.index))


def _mirrored() -> Devices:
    found = [tf.config.list_logical_devices(kind) for kind in ("GPU", "CPU")]
    several = next((devices for devices in found if len(devices) > 1), None)
    if several is None:
        raise InputError(
            f"strategy 'mirrored' wants several devices, and TensorFlow sees {len(found[0])} GPUs on this machine; "
            "give 'auto' or 'none'."
        )
    return Devices(tf.distribute.MirroredStrategy([device.name for device in several]), "mirrored")


def _of_strategy(strategy: tf.distribute.Strategy) -> Devices:
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        cluster = read_cluster()
        if cluster is not None:
            return _of_workers(strategy, cluster)
    if strategy.num_replicas_in_sync == 1:
        return Devices()
    if isinstance(strategy, tf.distribute.MirroredStrategy | tf.distribute.MultiWorkerMirroredStrategy):
        return Devices(strategy, "mirrored")
    raise InputError(
        f"strategy must be a MirroredStrategy or a MultiWorkerMirroredStrategy, not a {type(strategy).__name__}: other "
        "strategies do not take a step on all devices at once, or cannot hold the network."
    )
