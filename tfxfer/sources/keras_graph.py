"""The network in the config of a Keras file as one flat list of operations; plain JSON, Keras is not imported.

Keras 2 and Keras 3 write graphs in different ways, and models nest. Here nested models are opened, so that what stands
at the network's start (rescaling, augmentation) and at its end (the old classifier) can be told from its body.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tfxfer.errors import InputError

MODELS = ("Functional", "Model", "Sequential")


@dataclasses.dataclass(frozen=True)
class Ref:
    """A tensor: the call that made it, and which of its outputs it is; the graph's own input is the call ""."""

    call: str
    output: int = 0


INPUT = Ref("")


@dataclasses.dataclass(frozen=True)
class Node:
    """One call of a layer.

    Attributes:
        call: Unique.
        layer: Path of the layer through the models that hold it, "mobilenet/conv1"; shared by all its calls.
        class_name: Of the layer or operation.
        spec: What the config says about the layer.
        args, kwargs: Of the call, with `Ref` for tensors.
    """

    call: str
    layer: str
    class_name: str
    spec: Mapping[str, Any]
    args: tuple
    kwargs: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.spec.get("config") or {}

    def inputs(self) -> list[Ref]:
        return list(_refs((self.args, dict(self.kwargs))))


@dataclasses.dataclass(frozen=True)
class Graph:
    """A network with one input and one output.

    Attributes:
        name: Of the model.
        shape: Of the input without the batch, (H, W, C); None where it is left open.
        nodes: In an order in which they can be computed.
        output: The tensor that the model gives.
    """

    name: str
    shape: tuple[int | None, ...]
    nodes: tuple[Node, ...]
    output: Ref

    def node(self, ref: Ref) -> Node | None:
        """What makes a tensor; None for the input."""
        return next((node for node in self.nodes if node.call == ref.call), None)

    def users(self, ref: Ref) -> list[Node]:
        """The calls that take a tensor."""
        return [node for node in self.nodes if ref in node.inputs()]

    def between(self, start: Ref, end: Ref) -> tuple[Node, ...]:
        """The nodes that `end` needs, from `start` on."""
        wanted, open_refs = set(), [end]
        by_call = {node.call: node for node in self.nodes}
        while open_refs:
            ref = open_refs.pop()
            if ref != start and ref.call and ref.call not in wanted:
                wanted.add(ref.call)
                open_refs += by_call[ref.call].inputs()
        return tuple(node for node in self.nodes if node.call in wanted)


def read_graph(config: Mapping[str, Any], what: str) -> Graph:
    """The flat graph of a model's config.

    Args:
        config: As `model_config` of an .h5 or config.json of a .keras has it.
        what: The file, for messages.

    Raises:
        InputError: Where it is no functional or sequential model with one image input and one output.

    Example:
        >>> layers = [{"class_name": "InputLayer", "config": {"batch_shape": [None, 8, 8, 3], "name": "i"}}]
        >>> layers += [{"class_name": "Flatten", "config": {"name": "f"}}]
        >>> graph = read_graph({"class_name": "Sequential", "config": {"name": "s", "layers": layers}}, "x.keras")
        >>> graph.shape, [node.layer for node in graph.nodes]
        ((8, 8, 3), ['f'])
    """
    if not is_model(config):
        raise InputError(
            f"{what} holds a {config.get('class_name')!r}, not a functional or sequential model, so there is no "
            "graph to take its backbone from; give the function that builds it as py:MODULE:FUNCTION, with --weights."
        )
    try:
        shape, nodes, output = _expanded(config, "", INPUT)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{what}: {error}") from None
        raise InputError(f"{what} has a config that cannot be read as a graph ({error!r}).") from None
    if shape is None or len(shape) != 4:
        raise InputError(f"{what} does not take images (N, H, W, C): its input is {shape}.")
    inner = config["config"]
    name = inner.get("name", "model") if isinstance(inner, Mapping) else "model"
    return Graph(name, tuple(shape[1:]), tuple(nodes), output)


def is_model(spec: Mapping[str, Any]) -> bool:
    """Whether a config is that of a model with layers inside."""
    inner = spec.get("config")
    layers = inner.get("layers") if isinstance(inner, Mapping) else inner
    return spec.get("class_name") in MODELS and isinstance(layers, list)


def _expanded(spec: Mapping[str, Any], prefix: str, feed: Ref) -> tuple[Any, list[Node], Ref]:
    """Input shape, nodes and output of a model that is fed with a tensor."""
    if spec["class_name"] == "Sequential":
        return _sequential(spec["config"], prefix, feed)
    return _functional(spec["config"], prefix, feed)


def _sequential(config: Any, prefix: str, feed: Ref) -> tuple[Any, list[Node], Ref]:
    layers = config if isinstance(config, list) else config["layers"]
    shape = None if isinstance(config, list) else config.get("build_input_shape")
    nodes: list[Node] = []
    ref = feed
    for spec in layers:
        inner = spec["config"]
        if ref == feed and isinstance(inner, Mapping):
            shape = inner.get("batch_shape") or inner.get("batch_input_shape") or shape
        if spec["class_name"] == "InputLayer":
            continue
        path = prefix + _name_of(spec)
        if is_model(spec):
            own, more, ref = _expanded(spec, path + "/", ref)
            shape = shape or own
            nodes += more
        else:
            nodes.append(Node(path, path, spec["class_name"], spec, (ref,), {}))
            ref = Ref(path)
    return shape, nodes, ref


def _functional(config: Mapping[str, Any], prefix: str, feed: Ref) -> tuple[Any, list[Node], Ref]:
    specs = {_name_of(spec): spec for spec in config["layers"]}
    (source,), (target,) = _ends(config["input_layers"], "input"), _ends(config["output_layers"], "output")
    inner = specs[source[0]]["config"]
    shape = inner.get("batch_shape") or inner.get("batch_input_shape")
    ranks = _ranks(specs, target)
    made: dict[tuple[str, int], Ref] = {(source[0], 0): feed}
    nodes: list[Node] = []
    pending = [
        (name, number, *_call(node, specs, ranks))
        for name, spec in specs.items()
        for number, node in enumerate(spec.get("inbound_nodes") or ())
        if spec["class_name"] != "InputLayer"
    ]
    while pending:
        later = []
        for name, number, args, kwargs in pending:
            if not all((ref.call, 0) in made or _key(ref) in made for ref in _refs((args, kwargs))):
                later.append((name, number, args, kwargs))
                continue
            path = prefix + name
            args, kwargs = _replaced((args, kwargs), made)
            spec, once = specs[name], len(specs[name]["inbound_nodes"]) == 1
            if is_model(spec) and once and len(args) == 1 and isinstance(args[0], Ref) and _is_simple(spec):
                _, more, made[name, number] = _expanded(spec, path + "/", args[0])
                nodes += more
            else:
                call = path if number == 0 else f"{path}#{number}"
                nodes.append(Node(call, path, spec["class_name"], spec, tuple(args), kwargs))
                made[name, number] = Ref(call)
        if len(later) == len(pending):
            raise InputError(
                f"the layers {', '.join(sorted({row[0] for row in later})[:4])} have no input in the graph."
            )
        pending = later
    name, number, output = target[0], ranks.get((target[0], target[1]), 0), target[2]
    ref = made[name, number]
    return shape, nodes, Ref(ref.call, output or ref.output)


def _name_of(spec: Mapping[str, Any]) -> str:
    inner = spec.get("config")
    return spec.get("name") or (inner.get("name") if isinstance(inner, Mapping) else None) or spec["class_name"]


def _is_simple(spec: Mapping[str, Any]) -> bool:
    """Whether a nested model has one input and one output."""
    config = spec["config"]
    if spec["class_name"] == "Sequential":
        return True
    return all(len(_listed(config[key])) == 1 for key in ("input_layers", "output_layers"))


def _ends(entries: Any, what: str) -> list:
    found = _listed(entries)
    if len(found) != 1:
        raise InputError(f"the model has {len(found)} {what}s; a backbone has one.")
    return found


def _listed(entries: Any) -> list:
    """[["name", 0, 0], ...], which Keras 3 writes flat where it is one."""
    if isinstance(entries, Mapping):
        return list(entries.values())
    return [entries] if entries and isinstance(entries[0], str) else list(entries)


def _ranks(specs: Mapping[str, Any], target: Sequence[Any]) -> dict[tuple[str, int], int]:
    """Which call of a layer a reference means: Keras 2 counts the making of a nested model as its first."""
    seen: dict[str, set[int]] = {target[0]: {target[1]}}
    for spec in specs.values():
        for name, index in _mentions(spec.get("inbound_nodes") or (), specs):
            seen.setdefault(name, set()).add(index)
    return {
        (name, index): rank if is_model(specs[name]) else index
        for name, indices in seen.items()
        for rank, index in enumerate(sorted(indices))
    }


def _mentions(value: Any, specs: Mapping[str, Any]):
    if isinstance(value, Mapping):
        if value.get("class_name") == "__keras_tensor__":
            name, index, _ = value["config"]["keras_history"]
            yield name, index
        else:
            for item in value.values():
                yield from _mentions(item, specs)
    elif isinstance(value, list | tuple):
        if _is_reference(value, specs):
            yield value[0], value[1]
        for item in value:
            yield from _mentions(item, specs)


def _is_reference(value: Any, specs: Mapping[str, Any]) -> bool:
    """["conv", 0, 0] or ["conv", 0, 0, {}] as Keras 2 writes it."""
    if not isinstance(value, list) or len(value) not in (3, 4) or not isinstance(value[0], str):
        return False
    return value[0] in specs and all(isinstance(number, int) for number in value[1:3])


def _call(node: Any, specs: Mapping[str, Any], ranks: Mapping[tuple[str, int], int]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a call; a Ref's call is "name#number" here, until the tensors are known."""

    kwargs: Any

    def parsed(value: Any) -> Any:
        if isinstance(value, Mapping):
            if value.get("class_name") == "__keras_tensor__":
                name, index, output = value["config"]["keras_history"]
                return Ref(f"{name}#{ranks[name, index]}", output)
            return {key: parsed(item) for key, item in value.items()}
        if _is_reference(value, specs):
            return Ref(f"{value[0]}#{ranks[value[0], value[1]]}", value[2])
        return [parsed(item) for item in value] if isinstance(value, list) else value

    if isinstance(node, Mapping):
        return tuple(parsed(list(node["args"]))), parsed(node.get("kwargs") or {})
    entries = [node] if node and isinstance(node[0], str) else node
    kwargs = next((entry[3] for entry in entries if len(entry) > 3 and entry[3]), {})
    values = [entry[2] if entry[0] == "_CONSTANT_VALUE" else parsed(list(entry[:3])) for entry in entries]
    return (values[0] if len(values) == 1 else values,), parsed(kwargs)


def _key(ref: Ref) -> tuple[str, int]:
    name, _, number = ref.call.rpartition("#")
    return name, int(number)


def _replaced(value: Any, made: Mapping[tuple[str, int], Ref]) -> Any:
    if isinstance(value, Ref):
        found = made[_key(value)]
        return Ref(found.call, value.output or found.output)
    if isinstance(value, Mapping):
        return {key: _replaced(item, made) for key, item in value.items()}
    return type(value)(_replaced(item, made) for item in value) if isinstance(value, list | tuple) else value


def _refs(value: Any):
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _refs(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _refs(item)


@dataclasses.dataclass(frozen=True)
class Head:
    """The end of a network.

    Attributes:
        features: The tensor before the old classifier; the output where there is none.
        logits: What the old classifier gives; None where there is none.
        num_classes: Its width; 0 where there is none.
    """

    features: Ref
    logits: Ref | None = None
    num_classes: int = 0


_OUTPUTS = ("linear", "softmax", "sigmoid", None)


def find_head(graph: Graph) -> Head:
    """The old classifier: the last Dense, or 1 x 1 convolution, with what follows it; an activation of its own that is
    no output's (relu) makes a Dense a layer of features, which stays."""
    node, output = graph.node(graph.output), graph.output
    squashed = False
    while node is not None:
        activation = _activation(node)
        last = node.class_name == "Dropout" or node.class_name == "Softmax"
        last = last or (node.class_name == "Activation" and activation in _OUTPUTS)
        if not last and not (squashed and re.match("Reshape|Flatten|GlobalAverage", node.class_name)):
            break
        squashed = squashed or node.class_name == "Softmax" or activation in ("softmax", "sigmoid")
        output = node.inputs()[0]
        node = graph.node(output)
    if node is None or not _is_classifier(node, squashed) or _activation(node) not in _OUTPUTS:
        return Head(graph.output)
    width = int(node.config.get("units") or node.config.get("filters") or 0)
    features = node.inputs()[0]
    while (before := graph.node(features)) is not None and before.class_name == "Dropout":
        features = before.inputs()[0]
    return Head(features, output, width)


def _is_classifier(node: Node, squashed: bool) -> bool:
    kernel = node.config.get("kernel_size")
    return node.class_name == "Dense" or (squashed and node.class_name == "Conv2D" and list(kernel or ()) == [1, 1])


def _activation(node: Node) -> Any:
    """The name of a layer's activation; an object where it is none of Keras' own by name."""
    found = node.config.get("activation")
    if isinstance(found, Mapping) and isinstance(found.get("config"), str):
        return found["config"]
    return found


def has_fixed_size(graph: Graph, body: Sequence[Node]) -> bool:
    """Whether the numbers of weights depend on the side of the images: something is flattened that was not pooled."""
    pooled = False
    for node in body:
        pooled = pooled or node.class_name.startswith("Global")
        if not pooled and node.class_name in ("Flatten", "Reshape", "Permute"):
            return True
    return False
