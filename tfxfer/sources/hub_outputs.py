"""What a SavedModel gives: which of its outputs is taken, and whether that is an old classifier's answer."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfxfer.errors import InputError
from tfxfer.sources.hub_anatomy import Anatomy, functions_of, leaves_of, meta_graph_of

OUTPUTS = ("default", "features", "pooled_output")
TOP_OUTPUTS = ("logits", *OUTPUTS)
ANSWERS = ("classes", "logits", "predictions", "probabilities")
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_HANDS_ON = ("Identity", "IdentityN", "Cast")


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of a SavedModel, as its graph tells.

    Attributes:
        name: Its key; "" where it has none.
        op: That computes it, such as "Softmax"; "" where that cannot be told.
        width: Its last side; 0 where that is open.
    """

    name: str
    op: str
    width: int = dataclasses.field(compare=False)


def outputs_of(folder: Path, anatomy: Anatomy) -> tuple[Output, ...]:
    """Read what the endpoint of inference gives; empty where the graph does not tell, or its traces differ.

    Args:
        folder: Checked by the gate before.
        anatomy: Of the same folder.
    """
    graph = meta_graph_of(folder)
    bodies = {body.signature.name: body for body in graph.graph_def.library.function}
    objects = graph.object_graph_def
    names = functions_of(objects, anatomy.endpoint, is_signature=anatomy.is_signature)
    try:
        found = {_outputs(bodies, name, objects.concrete_functions[name].output_signature) for name in names}
    except (KeyError, IndexError, ValueError):  # a graph that does not hold together; loading it says what is wrong
        return ()
    return found.pop() if len(found) == 1 else ()


def classifier_note(outputs: Sequence[Output]) -> str:
    """A sentence for the card where the output that is taken is proven to be a classifier's; else "".

    Example:
        >>> classifier_note([Output("predictions", "Softmax", 10)])[:67]
        "Its only output is 'predictions', 10 wide and a softmax: features a"
        >>> classifier_note([Output("features", "Mean", 10), Output("logits", "BiasAdd", 3)])
        ''
    """
    by_name = {output.name: output for output in outputs}
    name = next((name for name in OUTPUTS if name in by_name), outputs[0].name if len(outputs) == 1 else None)
    if name is None or not (by_name[name].op == "Softmax" or name.lower() in ANSWERS):
        return ""
    width, softmax = by_name[name].width, by_name[name].op == "Softmax"
    measures = " and ".join([*([f"{width} wide"] if width else []), *(["a softmax"] if softmax else [])])
    which = "Its only output" if len(outputs) == 1 else "The output that is taken"
    return (
        f"{which} is {', '.join(filter(None, (name and repr(name), measures)))}: features are the old classifier's "
        f"{'probabilities' if softmax else name.lower()}; a headless export transfers better."
    )


def pick_output(outputs: Any, wanted: Sequence[str], what: str) -> str:
    """The name of the output to take; "" where there is one without a name.

    Raises:
        InputError: Where there are several and none has such a name.

    Example:
        >>> pick_output({"a": 1, "features": 2}, OUTPUTS, "m")
        'features'
    """
    if isinstance(outputs, Mapping):
        name = next((name for name in wanted if name in outputs), None)
        if name is None and len(outputs) == 1:
            name = next(iter(outputs))
        if name is not None:
            return str(name)
        given = ", ".join(sorted(map(str, outputs)))
        raise InputError(f"{what} gives {given}, none of them called {' or '.join(wanted)}.")
    if isinstance(outputs, list | tuple) and len(outputs) != 1:
        raise InputError(f"{what} gives {len(outputs)} outputs without names; one is needed.")
    return ""


def take_output(outputs: Any, name: str) -> Any:
    """The output that `pick_output` chose."""
    if isinstance(outputs, Mapping):
        return outputs[name]
    return outputs[0] if isinstance(outputs, list | tuple) else outputs


def _outputs(bodies: Mapping[str, Any], function: str, structure: Any) -> tuple[Output, ...]:
    leaves = [(name, leaf) for name, leaf in leaves_of(structure) if leaf.WhichOneof("kind") != "none_value"]
    if len(leaves) != len(bodies[function].signature.output_arg):  # ragged or sparse: several tensors for one leaf
        return ()
    found = []
    for index, (name, leaf) in enumerate(leaves):
        sides = leaf.tensor_spec_value.shape.dim
        width = max(sides[-1].size, 0) if sides else 0
        found.append(Output(name, _last_op(bodies, function, index), width))
    return tuple(found)


def _last_op(bodies: Mapping[str, Any], function: str, index: int) -> str:
    """The op that computes an output of a function, behind those that only hand it on."""
    seen: set[tuple[str, str]] = set()
    tensor = _returned(bodies[function], index)
    while (function, tensor) not in seen:
        seen.add((function, tensor))
        producer, _, place = tensor.partition(":")
        node = next((node for node in bodies[function].node_def if node.name == producer), None)
        if node is None:  # an argument
            return ""
        position = int(place.rpartition(":")[2] or 0)
        if node.op in _HANDS_ON:
            tensor = node.input[position]
        elif node.op in _CALLS:
            function = node.attr["f"].func.name
            tensor = _returned(bodies[function], position)
        else:
            return node.op
    return ""


def _returned(body: Any, index: int) -> str:
    """The tensor that a function returns at this place, as NODE:OUTPUT:NUMBER."""
    return body.ret[body.signature.output_arg[index].name]
