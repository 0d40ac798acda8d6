"""Build the body of a network anew from its graph: without leading operations and old classifier, at any size.

Built anew, not loaded: `load_model` of Keras 3 fails on nested Keras 2 backbones, keeps the file's image size, and
leaves a backbone that is nested twice, which cannot be cut or frozen by blocks.
"""

import importlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfxfer.errors import InputError
from tfxfer.sources.keras_graph import INPUT, Graph, Head, Node, Ref
from tfxfer.sources.leading import Leading

# What Keras 2 wrote into configs that Keras 3 does not take.
DROPPED = {
    "Conv2DTranspose": ("groups",),
    "DepthwiseConv2D": ("groups",),
    "SeparableConv2D": ("groups",),
}
DROPPED_EVERYWHERE = ("batch_input_shape", "batch_shape", "input_shape", "rng_type")
OPERATIONS = {
    "__operators__.add": "add",
    "math.add": "add",
    "math.divide": "divide",
    "math.multiply": "multiply",
    "math.subtract": "subtract",
    "math.truediv": "true_divide",
}


def build_body(
    graph: Graph,
    leading: Leading,
    head: Head,
    size_px: int,
    *,
    include_top: bool = False,
    seed: int | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    reserved_names: Sequence[str] = (),
) -> tuple[keras.Model, dict[str, str]]:
    """Make the layers between leading operations and head, or logits, and call them as the graph says.

    Args:
        graph: Of the whole model.
        leading: What is cut off at its start.
        head: What is cut off at its end.
        size_px: Side of the images.
        include_top: Keep the classifier, without softmax.
        seed: Of random weights; None: what the config says.
        custom_objects: The user's own classes by name.
        reserved_names: That the model may not have, unless all of it is one model of that name in the file.

    Returns:
        The model with random weights, (N, S, S, 3) to features (N, F) or logits; and the path in the file of each layer
        that is called otherwise in the model.

    Raises:
        InputError: Where a layer cannot be made or called, such as on images that are too small.
    """
    target = head.logits if include_top and head.logits is not None else head.features
    nodes = graph.between(leading.behind, target)
    if not nodes:
        raise InputError(f"Nothing is left of {graph.name!r} without its leading operations and its classifier.")
    if leading.behind != INPUT and any(ref == INPUT for node in nodes for ref in node.inputs()):
        raise InputError(f"The network {graph.name!r} uses its input twice, before and after rescaling it.")
    inputs = keras.Input((size_px, size_px, 3), name="pixels", dtype="float32")
    values: dict[Ref, Any] = {leading.behind: inputs}
    makers = _Makers(seed, custom_objects or {})
    for node in nodes:
        linear = include_top and target == Ref(node.call)
        try:
            outputs = _called(makers, node, values, linear=linear)
        except InputError:
            raise
        except Exception as error:  # Keras raises nearly anything
            told = next((line for line in str(error).splitlines() if line), type(error).__name__)
            raise InputError(
                f"The layer {node.layer!r} ({node.class_name}) of {graph.name!r} does not work on images of {size_px} "
                f"px: {told[:300]}"
            ) from error
        for number, output in enumerate(outputs if isinstance(outputs, list | tuple) else [outputs]):
            values[Ref(node.call, number)] = output
    return keras.Model(inputs, _pooled(values[target]), name=_name(graph, nodes, reserved_names)), makers.renamed


def _pooled(x: Any) -> Any:
    if len(x.shape) == 4:
        return keras.layers.GlobalAveragePooling2D(name="pool")(x)
    if len(x.shape) == 3:
        return keras.layers.GlobalAveragePooling1D(name="pool")(x)
    if len(x.shape) != 2:
        raise InputError(f"The network gives an output of shape {tuple(x.shape)}, not features of images.")
    return x


def _name(graph: Graph, nodes: Sequence[Node], reserved_names: Sequence[str]) -> str:
    """That of the nested model where the body is all in one; never one that a card's blocks belong to."""
    prefixes = {node.layer.rpartition("/")[0] for node in nodes}
    (prefix,) = prefixes if len(prefixes) == 1 else ("",)
    name = prefix.rpartition("/")[2] or graph.name
    return f"{name}_network" if name in reserved_names else name


def _called(makers: "_Makers", node: Node, values: Mapping[Ref, Any], *, linear: bool) -> Any:
    args, kwargs = _filled((node.args, dict(node.kwargs)), values)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("training", "mask", "name")}
    if node.class_name == "TFOpLambda":
        function = OPERATIONS.get(node.config.get("function", ""))
        if function is None:
            raise InputError(f"The network calls TensorFlow's {node.config.get('function')!r}, which Keras 3 has not.")
        return getattr(keras.ops, function)(*args, *kwargs.values())
    return makers.layer(node, linear=linear)(*args, **kwargs)


def _filled(value: Any, values: Mapping[Ref, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value]
    if isinstance(value, Mapping):
        if "class_name" in value:
            return keras.saving.deserialize_keras_object(dict(value), safe_mode=True)
        return {key: _filled(item, values) for key, item in value.items()}
    return type(value)(_filled(item, values) for item in value) if isinstance(value, list | tuple) else value


class _Makers:
    """Makes each layer once, with a name that is free."""

    def __init__(self, seed: int | None, custom_objects: Mapping[str, Any]):
        self.custom_objects = dict(custom_objects)
        self.seeds = itertools.count(seed * 10_007) if seed is not None else None
        self.made: dict[str, Any] = {}
        self.names = {"pixels", "pool"}
        self.renamed: dict[str, str] = {}

    def layer(self, node: Node, *, linear: bool) -> Any:
        if node.layer not in self.made:
            self.made[node.layer] = self._make(node, linear=linear)
        return self.made[node.layer]

    def _make(self, node: Node, *, linear: bool) -> Any:
        spec = _mended(node.spec, self.seeds)
        name = self._free_name(node.layer)
        if name != node.layer:
            self.renamed[name] = node.layer
        spec["config"]["name"] = name
        if linear:
            spec["config"]["activation"] = "linear"
        if "trainable" in spec["config"]:
            spec["config"]["trainable"] = True
        if not spec.get("module"):  # as .h5 has it
            own = keras.saving.get_registered_object(spec["class_name"], self.custom_objects)
            if own is not None:
                return own.from_config(spec["config"])
            spec |= {"module": _module_of(node), "registered_name": None}
        return keras.saving.deserialize_keras_object(spec, custom_objects=self.custom_objects, safe_mode=True)

    def _free_name(self, path: str) -> str:
        name = path.rpartition("/")[2]
        if name in self.names:
            name = path.replace("/", "_")
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name


def _mended(spec: Any, seeds: Any) -> dict[str, Any]:
    """A copy of a layer's config that Keras 3 takes, without the shapes it was built with."""
    made = {key: value for key, value in spec.items() if key not in ("build_config", "inbound_nodes", "name")}
    config = made["config"]
    dropped = (*DROPPED_EVERYWHERE, *DROPPED.get(spec["class_name"], ()))
    config = {key: _seeded(value, seeds) for key, value in config.items() if key not in dropped}
    if spec["class_name"] == "BatchNormalization" and isinstance(config.get("axis"), list):
        (config["axis"],) = config["axis"]
    if (made.get("module") or "tf_keras").startswith(("tf_keras", "keras.src.engine")):  # Keras 2
        made = {"class_name": made["class_name"]}
    return {**made, "config": config}


def _seeded(value: Any, seeds: Any) -> Any:
    """Random initialisers without a seed get one, so that random weights can be had again."""
    if isinstance(value, Mapping):
        found = {key: _seeded(item, seeds) for key, item in value.items()}
        if seeds is not None and "seed" in found and found["seed"] is None:
            found["seed"] = next(seeds)
        return found
    return [_seeded(item, seeds) for item in value] if isinstance(value, list) else value


def _module_of(node: Node) -> str | None:
    """Where Keras has a layer or an operation; Add and the like are both, and only the operation takes two tensors."""
    operation = next(
        (
            module
            for module in ("keras.src.ops.numpy", "keras.src.ops.nn", "keras.src.ops.core", "keras.src.ops.image")
            if isinstance(getattr(importlib.import_module(module), node.class_name, None), type)
        ),
        None,
    )
    if hasattr(keras.layers, node.class_name) and not (operation and len(node.args) > 1):
        return "keras.layers"
    return operation
