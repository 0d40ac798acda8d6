"""What a network does to pixels before its first real layer: folded into a scale and an offset, and cut off.

`layers.Normalization` does not survive the way to ONNX, augmentation has no place in a saved network, and a second
rescaling of pixels that the network rescales itself is the commonest way to ruin it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tfxfer.errors import InputError
from tfxfer.sources.keras_graph import INPUT, Graph, Node, Ref
from tfxfer.sources.ranges import RANGES, range_facts

Statistics = Callable[[str], Mapping[str, np.ndarray]]
Affine = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Leading:
    """The leading operations of a network.

    Attributes:
        behind: The tensor that the network's first real layer takes.
        scale, offset: What they do to a pixel, by channel.
        channel_order: "rgb" or "bgr".
        size_px: Side that they resize to; 0 where they do not.
        takes_pixels: Whether they show that the network takes pixels in 0..255.
    """

    behind: Ref = INPUT
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)
    channel_order: str = "rgb"
    size_px: int = 0
    takes_pixels: bool = False


def find_leading(graph: Graph, statistics: Statistics) -> Leading:
    """Read the leading operations of a graph.

    Args:
        graph: Of the whole model.
        statistics: Path of a Normalization layer to its "mean" and "variance", where its config has none.

    Returns:
        What they do. 0..255 is taken for shown where they shrink numbers at least sixteenfold, or shift them by more
        than 16: other ranges need neither.
    """
    found = Leading()
    scale, offset = np.ones(3), np.zeros(3)
    while len(users := graph.users(found.behind)) == 1:
        (node,) = users
        change: dict[str, Any] = {}
        affine = _affine(node, statistics)
        if affine is not None:
            scale, offset = scale * affine[0], offset * affine[0] + affine[1]
        elif node.class_name == "AdaptImage":
            order = node.config.get("channel_order", "rgb")
            change = {"size_px": node.config["size_px"], "channel_order": order, "takes_pixels": True}
        elif node.class_name == "Resizing" and node.config.get("height") == node.config.get("width"):
            change = {"size_px": node.config["height"]}
        elif not node.class_name.startswith("Random") and not _is_cast(node):
            break
        found = dataclasses.replace(found, behind=Ref(node.call), **change)
    shown = bool((np.abs(scale) <= 1 / 16).all() or (np.abs(offset) > 16).any())
    return dataclasses.replace(
        found,
        scale=tuple(scale.tolist()),
        offset=tuple(offset.tolist()),
        takes_pixels=found.takes_pixels or shown,
    )


def card_facts(leading: Leading, input_range: str, what: str) -> dict[str, Any]:
    """`scale`, `offset` and `channel_order` for a card, of what the network does itself and what the user says.

    Raises:
        InputError: Where neither says what range the network takes, or the two contradict each other.
    """
    if leading.takes_pixels:
        if input_range not in ("", "0..255"):
            raise InputError(
                f"{what} rescales pixels inside, so it takes 0..255; with the input range {input_range!r} they would "
                "be scaled twice: drop --input-range."
            )
        return {"scale": leading.scale, "offset": leading.offset, "channel_order": leading.channel_order}
    if not input_range:
        raise InputError(
            f"{what} does not say what its pixels were scaled to: nothing at its start rescales them; give "
            f"--input-range as it was trained, one of {', '.join(RANGES)}."
        )
    facts = range_facts(input_range)
    scale, offset = np.array(leading.scale), np.array(leading.offset)
    return {
        "scale": tuple((scale * facts["scale"]).tolist()),
        "offset": tuple((scale * facts["offset"] + offset).tolist()),
        "channel_order": facts["channel_order"],
    }


def _affine(node: Node, statistics: Statistics) -> Affine | None:
    """Factor and addend of an operation, (3,) each; None where it is another."""
    try:
        found = _STEPS[node.class_name](node, statistics) if node.class_name in _STEPS else None
        if found is None:
            return None
        scale, offset = (np.broadcast_to(np.ravel(part).astype(np.float64), 3).copy() for part in found)
    except (TypeError, ValueError, KeyError):
        return None
    return (scale, offset) if np.isfinite([scale, offset]).all() else None


def _rescaling(node: Node, _: Statistics) -> tuple[Any, Any]:
    return np.asarray(node.config["scale"], float), np.asarray(node.config.get("offset", 0.0), float)


def _normalization(node: Node, statistics: Statistics) -> tuple[Any, Any] | None:
    if node.config.get("axis", -1) not in (-1, 3, [-1], [3], None, []):
        return None
    values: Mapping[str, Any] = node.config
    if values.get("mean") is None:
        values = statistics(node.layer)
    mean = np.asarray(values["mean"], float)
    deviation = np.maximum(np.sqrt(np.asarray(values["variance"], float)), 1e-7)
    return (deviation, mean) if node.config.get("invert") else (1 / deviation, -mean / deviation)


def _constant(node: Node) -> Any:
    """The number that an operation combines its tensor with."""
    if len(node.inputs()) != 1 or not node.args or not isinstance(node.args[0], Ref):
        raise ValueError
    other = node.args[1] if len(node.args) > 1 else node.kwargs.get("y", node.kwargs.get("x2"))
    return np.asarray(other, float)


def _legacy_operation(node: Node, statistics: Statistics) -> tuple[Any, Any] | None:
    name = str(node.config.get("function", "")).rpartition(".")[2]
    return _ARITHMETIC[name](_constant(node)) if name in _ARITHMETIC else None


def _operation(node: Node, _: Statistics) -> tuple[Any, Any]:
    return _ARITHMETIC[node.class_name.lower()](_constant(node))


def _is_cast(node: Node) -> bool:
    return node.class_name == "Cast" or (node.class_name == "TFOpLambda" and node.config.get("function") == "cast")


_ARITHMETIC: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "add": lambda number: (1.0, number),
    "divide": lambda number: (1 / number, 0.0),
    "multiply": lambda number: (number, 0.0),
    "subtract": lambda number: (1.0, -number),
    "truediv": lambda number: (1 / number, 0.0),
    "truedivide": lambda number: (1 / number, 0.0),
}
_STEPS: dict[str, Callable[[Node, Statistics], tuple[Any, Any] | None]] = {
    "Add": _operation,
    "Divide": _operation,
    "Multiply": _operation,
    "Normalization": _normalization,
    "Rescaling": _rescaling,
    "Subtract": _operation,
    "TFOpLambda": _legacy_operation,
    "TrueDivide": _operation,
}
