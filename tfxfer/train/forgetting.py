"""Regularizers against forgetting, as a training step takes them: what they add to its loss, and what they need."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from tfxfer.errors import InputError
from tfxfer.features.extract import Extracted
from tfxfer.features.rows import row_blocks
from tfxfer.features.solvers import log_softmax
from tfxfer.methods.losses import category_relationship, knowledge_retention_loss, soft_cross_entropy
from tfxfer.methods.regularizers import L2SPGroups, l2_sp_groups, l2_sp_penalty
from tfxfer.model.freeze import Depth, freeze
from tfxfer.specs import Stage

SOURCE_LOGITS = "source_logits"
OF_IMAGES = {"lwf": knowledge_retention_loss, "co_tuning": soft_cross_entropy}

# (views, rows, targets) of a batch, each (n, ...), to (n, S).
Recorder = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class SourceHead(NamedTuple):
    """The source's own output on its features: kernel (D, S) and bias (S,)."""

    kernel: np.ndarray
    bias: np.ndarray


class LossTerms(Protocol):
    """What a training step adds to its loss.

    Attributes:
        num_recorded: S, the width of what is recorded of each image; 0 for nothing.
    """

    num_recorded: int

    def of_images(self, others: Sequence, recorded):
        """(n,) added to the losses of the images: from the outputs behind the first, and what was recorded."""
        ...

    def of_weights(self):
        """A scalar added to the loss of a batch."""
        ...


class Regularizer(LossTerms, Protocol):
    """What a training asks of it."""

    def attach(self, suffix: keras.Model) -> keras.Model:
        """What is trained in the suffix's place; its first output are the suffix's logits."""
        ...

    def start(self) -> None:
        """Set what it trains along to its beginning."""
        ...

    def recorder(self, rows: np.ndarray) -> Recorder | None:
        """What a run on these rows records of a batch."""
        ...

    def describe(self, variables: Sequence[keras.Variable]) -> tuple[dict, list[np.ndarray]]:
        """For `terms_of`: what JSON holds of it, and arrays; `variables` are those of what is trained."""
        ...


def make_regularizer(
    stage: Stage,
    model: keras.Model,
    source_weights: Mapping[int, np.ndarray],
    source_head: SourceHead | None,
    extracted: Extracted,
    labels: np.ndarray,
) -> Regularizer | None:
    """The regularizer of a stage; None where it has none, or one of no strength.

    Args:
        stage: Which, and how strong.
        model: Of `build_model`, after `freeze`.
        source_weights: Of the variables as the source has them, by `id` of the variable.
        source_head: The source's own output, for "lwf" and "co_tuning".
        extracted: Features of N images in V views, as the source computes them.
        labels: (N,) int.

    Raises:
        InputError: Where nothing of the backbone trains, so that it would do nothing.
    """
    if not stage.regularizer or not stage.strength:
        return None
    groups = _groups(stage, model)
    if stage.regularizer == "l2_sp":
        return _L2SP(groups.shared, [source_weights[id(v)] for v in groups.shared], groups.head, stage.strength)
    assert source_head is not None  # whoever calls has loaded it
    kind = _LearningWithoutForgetting if stage.regularizer == "lwf" else _CoTuning
    return kind(source_head, extracted.features_by_view, labels, stage.strength)


def refuse_regularizer(stage: Stage, model: keras.Model, depth: Depth) -> None:
    """Refuse a regularizer that would do nothing, before anything is computed; what the model freezes is set anew.

    Args:
        stage: Any.
        model: Of `build_model`.
        depth: What the stage freezes.

    Raises:
        InputError: Where nothing of the backbone trains.
    """
    if stage.regularizer and stage.strength:
        _groups(stage, freeze(model, depth, batch_norm=stage.batch_norm, parameters=stage.parameters))


def _groups(stage: Stage, model: keras.Model) -> L2SPGroups:
    groups = l2_sp_groups(model)
    if not groups.shared:
        raise InputError(
            f"Stage {stage.name!r} trains the head alone, so regularizer {stage.regularizer!r} would do nothing; "
            "drop it, or freeze fewer blocks."
        )
    return groups


class _L2SP:
    """See `tfxfer.methods.regularizers.l2_sp_penalty`; beta is the paper's 0.01."""

    num_recorded = 0

    def __init__(self, shared, start, head, strength: float):
        self.shared, self.head, self.strength = shared, head, strength
        self.start_weights = [keras.ops.convert_to_tensor(value) for value in start]

    def attach(self, suffix):
        return suffix

    def start(self):
        return

    def recorder(self, rows):
        return None

    def of_images(self, others, recorded):
        return 0.0

    def describe(self, variables):
        places = {id(variable): place for place, variable in enumerate(variables)}
        groups = {"shared": [places[id(v)] for v in self.shared], "head": [places[id(v)] for v in self.head]}
        return {"strength": self.strength, **groups}, [np.asarray(value) for value in self.start_weights]

    def of_weights(self):
        return l2_sp_penalty(self.shared, self.start_weights, self.strength, self.head)


class _OfImages:
    """`strength` times what an image's loss gets from the source's output and from what was recorded of it."""

    def __init__(self, kind: str, strength: float, num_recorded: int):
        self.kind, self.strength, self.num_recorded = kind, strength, num_recorded

    def of_images(self, others, recorded):
        return self.strength * OF_IMAGES[self.kind](recorded, others[0])

    def of_weights(self):
        return 0.0

    def describe(self, variables):
        return {"kind": self.kind, "strength": self.strength, "num_recorded": self.num_recorded}, []


def terms_of(told: Mapping[str, Any], arrays: Sequence[np.ndarray], variables: Sequence[keras.Variable]) -> LossTerms:
    """The terms of `Regularizer.describe`, with the variables of a copy of what is trained, in the same order."""
    if "kind" in told:
        return _OfImages(told["kind"], told["strength"], told["num_recorded"])
    shared, head = ([variables[place] for place in told[group]] for group in ("shared", "head"))
    return _L2SP(shared, arrays, head, told["strength"])


class _OldHead(_OfImages):
    """The source's own output on the same features; it trains along and is not kept."""

    kind: str

    def __init__(self, head: SourceHead, features, labels: np.ndarray, strength: float):
        super().__init__(self.kind, strength, len(head.bias))
        self.head, self.features, self.labels = head, features, labels
        self.layer = keras.layers.Dense(self.num_recorded, dtype="float32", name=SOURCE_LOGITS)

    def attach(self, suffix):
        inputs = suffix.inputs[0] if len(suffix.inputs) == 1 else tuple(suffix.inputs)
        tail = next((layer for layer in suffix.layers if isinstance(layer, keras.Model)), None)
        features = inputs if tail is None else tail(inputs)
        logits = suffix.get_layer("logits")(suffix.get_layer("dropout")(features))
        return keras.Model(inputs, (logits, self.layer(features)), name="suffix_with_source_head")

    def start(self):
        self.layer.set_weights([self.head.kernel, self.head.bias])

    def logits(self, features: np.ndarray) -> np.ndarray:
        return np.asarray(features, np.float32) @ self.head.kernel + self.head.bias


class _LearningWithoutForgetting(_OldHead):
    """The source's outputs on the images of a batch, before training, are kept: a product with features that are
    there."""

    kind = "lwf"

    def recorder(self, rows):
        return lambda views, rows, targets: self.logits(self.features[views, rows])


class _CoTuning(_OldHead):
    """The source's classes that go with each class, learned from the rows of a run in the plain view."""

    kind = "co_tuning"

    def recorder(self, rows):
        relationship = self.relationship(rows)
        return lambda views, rows, targets: targets @ relationship

    def relationship(self, rows: np.ndarray) -> np.ndarray:
        """(K, S); a class without an image among the rows has zeros, which nothing asks for."""
        present, labels = np.unique(self.labels[rows], return_inverse=True)
        blocks = row_blocks(len(rows), self.features.shape[-1])
        logits = np.concatenate([self.logits(self.features[0, rows[block]]) for block in blocks])
        probabilities = np.exp(log_softmax(logits))
        table = np.zeros((self.labels.max() + 1, self.num_recorded), np.float32)
        table[present] = category_relationship(probabilities, labels, len(present))
        return table
