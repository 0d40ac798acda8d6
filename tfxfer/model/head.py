"""Heads: the new output of a model."""

import dataclasses

import keras

from tfxfer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Classes:
    """A head for one label an image: softmax over named classes.

    Attributes:
        names: Class names in the order of the output; at least two, all different.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(str(name) for name in self.names))
        if len(self.names) < 2 or len(set(self.names)) != len(self.names):
            raise InputError(f"A head needs at least two classes with different names, got {list(self.names)}.")


def as_head(head) -> Classes:
    """Read what users pass as `head`: `Classes`, a number of classes, names, or a Dataset (its classes).

    Raises:
        InputError: Where it is none of these.

    Example:
        >>> as_head(3)
        Classes(names=('0', '1', '2'))
    """
    if isinstance(head, Classes):
        return head
    if isinstance(head, int) and not isinstance(head, bool):
        return Classes(tuple(str(index) for index in range(head)))
    if hasattr(head, "class_names"):
        return Classes(tuple(head.class_names))
    if isinstance(head, list | tuple) and all(isinstance(name, str) for name in head):
        return Classes(tuple(head))
    raise InputError(
        f"The head must be Classes(names), a number of classes, class names or a Dataset, not {type(head).__name__}."
    )


def attach_head(features, head: Classes, *, dropout: float, logits: bool):
    """Dropout, a Dense layer and, unless `logits`, a float32 softmax named `probabilities`.

    Args:
        features: (N, D) symbolic tensor.
        head: Its classes.
        dropout: Rate in [0, 1).
        logits: Stop at the Dense layer, for losses that want logits.
    """
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must lie in [0, 1), not {dropout}.")
    x = keras.layers.Dropout(dropout, name="dropout")(features)
    x = keras.layers.Dense(len(head.names), dtype="float32", name="logits")(x)
    return x if logits else keras.layers.Activation("softmax", dtype="float32", name="probabilities")(x)
