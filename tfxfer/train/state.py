"""The state of a user's callbacks: what a checkpoint keeps of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

PLAIN = (bool, int, float, str, type(None))


def callback_states(callbacks: Sequence[keras.callbacks.Callback]) -> tuple[dict[str, np.ndarray], list[dict]]:
    """The plain attributes of each (numbers, text, arrays, lists of them): best values, counts, best weights.

    Args:
        callbacks: In their order. What is no plain value, such as an open file, is theirs to open again.

    Example:
        >>> watch = keras.callbacks.EarlyStopping(monitor="loss")
        >>> watch.on_train_begin()
        >>> callback_states([watch])[1][0]["values"]["wait"]
        0
    """
    arrays: dict[str, np.ndarray] = {}
    facts = []
    for number, callback in enumerate(callbacks):
        plain: dict[str, Any] = {}
        for name, value in vars(callback).items():
            if isinstance(value, np.generic):
                value = value.item()
            if isinstance(value, PLAIN) or (isinstance(value, list) and all(isinstance(v, PLAIN) for v in value)):
                plain[name] = value
            elif isinstance(value, np.ndarray):
                arrays[f"callback/{number}/{name}"] = value
            elif isinstance(value, list) and all(isinstance(v, np.ndarray) for v in value):
                plain[name] = {"arrays": len(value)}
                arrays |= {f"callback/{number}/{name}/{index}": part for index, part in enumerate(value)}
        facts.append({"class": type(callback).__name__, "values": plain})
    return arrays, facts


def set_callback_states(
    callbacks: Sequence[keras.callbacks.Callback], arrays: Mapping[str, np.ndarray], facts: Sequence[Mapping]
) -> None:
    """Set what `callback_states` gave, on callbacks of the same classes in the same order; others begin anew."""
    left = dict(enumerate(facts))
    for callback in callbacks:
        number = next((key for key, fact in left.items() if fact["class"] == type(callback).__name__), None)
        if number is None:
            continue
        for name, value in left.pop(number)["values"].items():
            if isinstance(value, Mapping):
                value = [arrays[f"callback/{number}/{name}/{index}"] for index in range(value["arrays"])]
            setattr(callback, name, value)
        prefix = f"callback/{number}/"
        for key, array in arrays.items():
            if key.startswith(prefix) and "/" not in key.removeprefix(prefix):
                setattr(callback, key.removeprefix(prefix), array)
