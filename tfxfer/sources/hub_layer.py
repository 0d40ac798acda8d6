"""A Keras layer around a SavedModel: Keras sees, freezes, trains, saves and reloads the variables inside."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfxfer.errors import InputError
from tfxfer.sources.hub_anatomy import STATISTICS, Anatomy, Slot
from tfxfer.sources.hub_blocks import group_slots
from tfxfer.sources.hub_outputs import take_output
from tfxfer.sources.hub_program import Program

ONES = ("gamma", "scale", "moving_variance", "moving_var", "running_variance", "running_var")
ZEROS = ("beta", "offset", "bias", "biases", "moving_mean", "running_mean")


@keras.saving.register_keras_serializable(package="tfxfer")
class HubLayer(keras.layers.Layer):
    """A loaded SavedModel as a layer whose weights are the program's own variables.

    While anything in it is frozen, or batch_norm is not "train", the program runs with training=False, so that the
    statistics of its normalisations stay: training=True would move those of frozen blocks as well.

    A saved model holds the SavedModel among its assets, so that it loads where the original is gone; the gate for
    model files is passed again then. Such a layer cannot be cloned: a config alone has no program.

    Args:
        anatomy: Of the program; `Anatomy` or its dict.
        sha256: Of the program's folder.
        tail: Shape of the output without the batch.
        output: Which of several outputs; "" where there is one.
        batch_norm: State of normalisations that are not frozen, as `freeze` takes it.
        frozen: Names of frozen blocks.
        program: Where it is loaded already.

    Call arguments:
        images: (N, S, S, 3) float32.
        training: Keras' own.
    """

    def __init__(
        self,
        anatomy: Anatomy | Mapping[str, Any],
        sha256: str,
        tail: Sequence[int],
        output: str = "",
        batch_norm: str = "affine",
        frozen: Sequence[str] = (),
        program: Program | None = None,
        **kwargs,
    ):
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.anatomy = anatomy if isinstance(anatomy, Anatomy) else Anatomy.from_dict(anatomy)
        self.sha256, self.tail, self.output_name = sha256, tuple(tail), output
        self._batch_norm, self._frozen_at_start = batch_norm, frozenset(frozen)
        self._program = program
        self._slots: tuple[keras.Variable, ...] = ()
        self._index_of_block = {name: tuple(found) for name, found in group_slots(self.anatomy.slots).items()}

    def build(self, input_shape=None):
        names = [slot.name.replace("/", ".") for slot in self.anatomy.slots]
        self._slots = tuple(
            self.add_weight(
                shape=slot.shape, initializer="zeros", dtype=slot.dtype, trainable=slot.trainable, autocast=False,
                name=name,
            )
            for name, slot in zip(names, self.anatomy.slots, strict=True)
        )  # fmt: skip
        if self._program is not None:
            self._adopt(self._program)
        if not self.anatomy.is_signature:
            self.freeze_blocks(self._frozen_at_start, batch_norm=self._batch_norm)

    def _adopt(self, program: Program) -> None:
        """Let each weight be the program's variable instead of a copy."""
        for weight, variable in zip(self._slots, program.variables, strict=True):
            weight._initialize(variable)

    # -- blocks -------------------------------------------------------------------------------------------------------

    @property
    def variable_blocks(self) -> dict[str, list[keras.Variable]]:
        """The weights by block, in the order in which the program reads them."""
        return {name: [self._slots[index] for index in found] for name, found in self._index_of_block.items()}

    @property
    def moves_statistics(self) -> bool:
        """Whether a training step runs the program in its training mode."""
        return (
            self._batch_norm == "train"
            and self.anatomy.has_training_mode
            and self.trainable
            and all(v.trainable for v, s in zip(self._slots, self.anatomy.slots, strict=True) if s.trainable)
        )

    def freeze_blocks(self, frozen: frozenset[str], *, batch_norm: str = "affine") -> None:
        """Freeze these blocks and train the others.

        Args:
            frozen: Names in `variable_blocks`.
            batch_norm: "frozen" and "adapt": gamma and beta of normalisations stay; "affine": they train; "train":
                the statistics move as well, where nothing at all is frozen.

        Raises:
            InputError: Where the program cannot train; or its statistics cannot move, for want of a training mode or
                since it stands in several replicas.
        """
        if self.anatomy.is_signature:
            if set(self._index_of_block) - set(frozen):
                raise InputError(
                    "The loaded SavedModel has signatures only, no __call__: it can be used as it is, not trained; "
                    "freeze all of it (--freeze all, or --method probe)."
                )
            return
        scopes = {slot.name.rpartition("/")[0] for slot in self.anatomy.slots if _is_statistic(slot)}
        if batch_norm == "train" and not frozen and scopes and not self.anatomy.has_training_mode:
            raise InputError(
                "The loaded SavedModel has no training mode, so its statistics cannot move: give another batch_norm "
                "than 'train'."
            )
        if batch_norm == "train" and not frozen and scopes and any(_in_replicas(v) for v in self._slots):
            raise InputError(
                "Each replica would move its own statistics inside the loaded SavedModel and they would drift apart; "
                "give another batch_norm than 'train', or train on one device."
            )
        moving = batch_norm in ("affine", "train")
        for name, found in self._index_of_block.items():
            for index in found:
                slot = self.anatomy.slots[index]
                stays = slot.name.rpartition("/")[0] in scopes and len(slot.shape) < 2 and not moving
                self._slots[index].trainable = slot.trainable and name not in frozen and not stays
        self._batch_norm = batch_norm

    def randomise(self, seed: int) -> None:
        """Forget what was learned: kernels get fresh values (Glorot), normalisations become the identity, biases zero;
        vectors whose names say nothing are shuffled."""
        random = np.random.default_rng(seed)
        for weight, slot in zip(self._slots, self.anatomy.slots, strict=True):
            leaf, value = slot.name.rpartition("/")[2], weight.numpy()
            if not np.issubdtype(value.dtype, np.floating):
                continue
            if value.ndim >= 2:
                limit = np.sqrt(6 / (np.prod(value.shape[:-2]) * sum(value.shape[-2:])))
                value = random.uniform(-limit, limit, value.shape)
            elif leaf in ONES:
                value = np.ones_like(value)
            elif leaf in ZEROS:
                value = np.zeros_like(value)
            elif value.ndim:
                value = random.permutation(value)
            weight.assign(value.astype(slot.dtype))

    @property
    def resources(self) -> list[Any]:
        """What an exporter must track beside the weights."""
        return self._program.resources if self._program else []

    # -- computation --------------------------------------------------------------------------------------------------

    def call(self, images, training=None):
        if self._program is None:
            raise InputError(
                f"{self.name} has no program: it comes with a .keras file or from load_backbone, and cannot be cloned."
            )
        outputs = self._program(images, training=bool(training) and self.moves_statistics)
        return tf.ensure_shape(take_output(outputs, self.output_name), (None, *self.tail))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.tail)

    # -- saving -------------------------------------------------------------------------------------------------------

    def get_config(self):
        frozen = [
            name
            for name, found in self._index_of_block.items()
            if self._slots and not any(self._slots[i].trainable for i in found)
        ]
        return {
            **super().get_config(),
            "anatomy": self.anatomy.to_dict(),
            "sha256": self.sha256,
            "tail": list(self.tail),
            "output": self.output_name,
            "batch_norm": self._batch_norm,
            "frozen": frozen if self.built else sorted(self._frozen_at_start),
        }

    def save_assets(self, store):
        if self._program is None:
            raise InputError(f"{self.name} has no program to save.")
        shutil.copytree(self._program.folder, Path(store) / "saved_model")

    def load_assets(self, store):
        program = Program(Path(store) / "saved_model", self.sha256)
        if program.anatomy != self.anatomy:
            raise InputError(f"The config of {self.name} does not fit the program that was saved with it.")
        for weight, variable in zip(self._slots, program.variables, strict=True):
            variable.assign(weight.value)  # the weights were loaded before the assets
        self._program = program
        self._adopt(program)


def _is_statistic(slot: Slot) -> bool:
    return STATISTICS.fullmatch(slot.name.rpartition("/")[2]) is not None


def _in_replicas(weight: keras.Variable) -> bool:
    return isinstance(weight.value, tf.distribute.DistributedValues) and len(weight.value.values) > 1
