"""Where a network can be parted: the layers between points that one tensor alone crosses, grouped into blocks."""

import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import keras

# What names a unit of an architecture, in the names of its layers: block_1_expand, conv2_block3_1_conv, block1a_bn,
# expanded_conv_2_project, convnext_tiny_stage_0_block_1_gamma, normal_left1_5 (a cell of NASNet).
_UNIT = re.compile(
    r"^(expanded_conv(?=_[a-z])|block(?:35|17|8)_\d+|.*?(?:block|layer|stage|expanded_conv|cell|conv_dw|conv_pw)_?\d+[a-z]?(?:_block_?\d+)?)"
    r"(?:_|$)"
)
TAP = "tap_"  # how the layers begin that read a block for the head, see `tfxfer.model.taps`
_CELL = re.compile(r"^(?:normal|reduction|adjust|separable_conv).*?_((?:stem_|reduce_)?\d+)$")


def operations_of(network: keras.Model) -> list:
    """The operations of a functional or sequential network in the order of computation, inputs left out; for any
    other, its layers."""
    functional = _functional(network)
    found = network.layers if functional is None else functional.operations
    return [operation for operation in found if not isinstance(operation, keras.layers.InputLayer)]


def segments(network: keras.Model) -> list[list[keras.layers.Layer]]:
    """The layers of a network in runs, such that between two runs exactly one tensor crosses.

    Args:
        network: Functional or sequential; of any other, each layer is a run.

    Returns:
        All layers but the input and taps, in order, without empty runs; operations that are no layers (`x + y`) stay
        unseen.
    """
    operations = [operation for operation in operations_of(network) if not operation.name.startswith(TAP)]
    functional = _functional(network)
    if functional is None:
        return [[layer] for layer in operations]
    runs: list[list[keras.layers.Layer]] = [[]]
    for operation, clean in zip(operations, _clean_after(functional, operations), strict=True):
        if isinstance(operation, keras.layers.Layer):
            runs[-1].append(operation)
        if clean and runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def grouped(network: keras.Model) -> list[tuple[str, list[keras.layers.Layer]]]:
    """Blocks of a network that has no card: names and layers.

    A block is a run of layers that one tensor enters and one leaves, beginning with weights that are no BatchNorm's;
    runs whose names share a unit of the architecture ("block_3") are one. Where cells overlap so that no cut is
    possible (NASNet), the units in the names part them all the same: freezing does not need a cut.
    """
    groups: list[tuple[str, list[keras.layers.Layer]]] = []
    current = None
    for run in _parted(segments(network)):
        unit = _unit_of(run)
        begins = any(has_own_weights(layer) for layer in run)
        if groups and (not begins or (unit is not None and unit == current)):
            groups[-1][1].extend(run)
            continue
        current = unit
        groups.append((unit or _plain_name(run), list(run)))
    if len(groups) > 1 and not any(has_own_weights(layer) for layer in groups[0][1]):
        first = groups.pop(0)
        groups[0] = (groups[0][0], [*first[1], *groups[0][1]])
    return _unique(groups)


def has_own_weights(layer: keras.layers.Layer) -> bool:
    """Whether a layer has weights that are no statistics and shifts of a normalisation of batches or inputs."""
    kinds = (keras.layers.BatchNormalization, keras.layers.Normalization)
    return bool(layer.weights) and not isinstance(layer, kinds)


def _functional(network: keras.Model):
    """The Functional behind a model, None where there is no graph to look at."""
    if isinstance(network, keras.Sequential):
        network = getattr(network, "_functional", None)
    return network if hasattr(network, "_nodes_by_depth") and hasattr(network, "operations") else None


def tensors_behind(network: keras.Model, layers: Collection[str]) -> list | None:
    """The tensors that cross from some leading layers of a network to what follows, the fewest bytes of them.

    What follows the layers without weights of its own and computes the same each time (a sum, an activation, pooling)
    may come before the cut where that makes what crosses smaller.

    Args:
        network: Functional or sequential; of any other nothing inside can be reached.
        layers: Names of the layers up to the cut.

    Returns:
        The tensors; None where there are none, as a layer before the cut needs one behind it.
    """
    functional = _functional(network)
    if functional is None:
        return None
    nodes = [
        node for depth in sorted(functional._nodes_by_depth, reverse=True) for node in _nodes_at(functional, depth)
    ]
    known = {id(tensor) for tensor in functional.inputs}
    waiting = [node for node in nodes if node.operation.name in layers]
    before = _closed(nodes, known, lambda node: node.operation.name in layers or _is_plain(node.operation))
    if not {id(node) for node in waiting} <= before:
        return None
    # First without the plain operations that no layer before the cut needs, then with one more of them at a time.
    needed = _needed_by(nodes, waiting)
    best = _crossing(functional, nodes, needed)
    taken = set(needed)
    for node in nodes:
        if id(node) in before - taken:
            taken.add(id(node))
            found = _crossing(functional, nodes, taken)
            if _bytes_of(found) <= _bytes_of(best):
                best = found
    return best


def _nodes_at(functional, depth: int) -> list:
    nodes = functional._nodes_by_depth[depth]
    return [node for node in nodes if not isinstance(node.operation, keras.layers.InputLayer)]


def _closed(nodes: list, known: set[int], allowed: Callable[[Any], bool]) -> set[int]:
    """The nodes that can be computed from known tensors by allowed nodes alone."""
    known, found = set(known), set()
    for node in nodes:
        if allowed(node) and all(id(tensor) in known for tensor in node.input_tensors):
            found.add(id(node))
            known.update(map(id, node.outputs))
    return found


def _needed_by(nodes: list, wanted: list) -> set[int]:
    """The wanted nodes and all that they are computed from."""
    needed = {id(node) for node in wanted}
    tensors = {id(tensor) for node in wanted for tensor in node.input_tensors}
    for node in reversed(nodes):
        if any(id(tensor) in tensors for tensor in node.outputs):
            needed.add(id(node))
            tensors.update(map(id, node.input_tensors))
    return needed


def _crossing(functional, nodes: list, before: set[int]) -> list:
    """Tensors that the nodes before the cut make, or the input, and that others read."""
    read = {id(tensor) for node in nodes if id(node) not in before for tensor in node.input_tensors}
    read |= {id(tensor) for tensor in functional.outputs}
    made = [*functional.inputs, *(tensor for node in nodes if id(node) in before for tensor in node.outputs)]
    return [tensor for tensor in made if id(tensor) in read]


def _bytes_of(tensors: list) -> float:
    return sum(math.prod(size or math.inf for size in tensor.shape[1:]) for tensor in tensors)


_PLAIN = (
    keras.layers.Activation, keras.layers.Add, keras.layers.Average, keras.layers.AveragePooling2D,
    keras.layers.Concatenate, keras.layers.ELU, keras.layers.Flatten, keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D, keras.layers.LeakyReLU, keras.layers.MaxPooling2D, keras.layers.Multiply,
    keras.layers.ReLU, keras.layers.Reshape, keras.layers.ZeroPadding2D,
)  # fmt: skip


def _is_plain(operation) -> bool:
    """Whether an operation has no weights and gives the same each time, in training too."""
    return isinstance(operation, _PLAIN) or not isinstance(operation, keras.layers.Layer)


def _spans(functional, operations: list) -> list[tuple[Any, tuple[int, int]]]:
    """Each tensor with the operation that made it (-1: an input) and the last that reads it."""
    position = {id(operation): index for index, operation in enumerate(operations)}
    made: dict[int, tuple[Any, int]] = {}
    last_use: dict[int, int] = {}
    for node in (node for nodes in functional._nodes_by_depth.values() for node in nodes):
        if node.operation.name.startswith(TAP):
            continue  # reads what it reads for the head
        index = position.get(id(node.operation), -1)
        for tensor in node.outputs:
            made[id(tensor)] = (tensor, index)
        for tensor in node.input_tensors:
            last_use[id(tensor)] = max(last_use.get(id(tensor), -1), index)
    for tensor in functional.outputs:
        last_use[id(tensor)] = len(operations)
    return [(tensor, (first, last_use.get(key, first))) for key, (tensor, first) in made.items()]


def _clean_after(functional, operations: list) -> list[bool]:
    """After each operation, whether one tensor alone is still wanted."""
    crossing = [0] * len(operations)
    for _, (first, last) in _spans(functional, operations):
        for index in range(max(first, 0), last):
            crossing[index] += 1
        for index in range(max(last, 0), first):  # a shared layer, called again after what reads its first output
            crossing[index] += 2
    clean = [count == 1 for count in crossing]
    if clean:
        clean[-1] = True
    return clean


def _parted(runs: list[list]) -> Iterator[list]:
    """Runs with several units in them, parted by unit in the order of their first layers."""
    for run in runs:
        units: dict[str | None, list] = {}
        current = None
        for layer in run:
            current = _unit(layer) or current
            units.setdefault(current, []).append(layer)
        if len([unit for unit in units if unit is not None]) > 1:
            yield from units.values()
        else:
            yield run


def _unit_of(run: list) -> str | None:
    return next((unit for unit in map(_unit, run) if unit), None)


def _unit(layer: keras.layers.Layer) -> str | None:
    name = layer.name
    if re.sub(r"_\d+$", "", name) == re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(layer).__name__).lower():
        return None  # Keras named it after its class: custom_scale_layer_7 is no unit
    found = _CELL.match(name)
    if found:
        return f"cell_{found[1]}"
    found = _UNIT.match(name)
    return found[1] if found else None


def _plain_name(run: list) -> str:
    """A lone layer's own name; of a run that ends in a merge, the name of the merge."""
    weighted = [layer for layer in run if has_own_weights(layer)]
    return run[-1].name if len(weighted) > 1 else (weighted or run)[0].name


def _unique(groups):
    taken: dict[str, int] = {}
    found = []
    for name, layers in groups:
        taken[name] = taken.get(name, 0) + 1
        found.append((name if taken[name] == 1 else f"{name}_{taken[name]}", layers))
    return found
