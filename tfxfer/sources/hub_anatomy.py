"""What a SavedModel takes and holds, read from its proto; nothing of it is run.

Which variables a program really uses is read from the list of what its endpoints capture. The attributes
`variables` and `trainable_variables` of a loaded `model.export` artifact do not tell: the latter are copies that the
program never reads, so training them moves nothing.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from tfxfer.errors import InputError

ENDPOINTS = ("__call__", "serve", "call_inference")
TRAINING_ENDPOINTS = ("call_training", "serve_training", "train")
SIGNATURES = ("serving_default", "default", "serve")
STATISTICS = re.compile(r"(?:moving|running)_(?:mean|var|variance)(?:_\d+)?")
TENSORS = ("tensor_spec_value", "bounded_tensor_spec_value", "type_spec_value")
NAMELESS = re.compile(r"(?:variable(?:_\d+)?|\d+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A variable of a program.

    Attributes:
        name: As TensorFlow names it, or the way to it where that says more; unique, "/" between its parts.
        path: The attributes that lead from the loaded object to it.
        shape: Its sides.
        dtype: Such as "float32".
        trainable: Whether it may train.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    trainable: bool


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What a SavedModel says about itself, read from its graph; nothing of it is run.

    Attributes:
        endpoint: Of inference: "__call__", "serve", ..., or the key of a signature.
        is_signature: Whether that is a signature: then the program can be used, not trained.
        input_name: Of the image; signatures take it by name.
        input_shape: (N, H, W, C), None where any size is taken.
        input_dtype: Such as "float32".
        training: What the endpoint's argument `training` takes: some of "true", "false", "none"; empty without one.
        training_endpoint: A second endpoint that runs in training mode; "" where there is none.
        slots: The variables in the order in which the program reads them.
    """

    endpoint: str
    is_signature: bool
    input_name: str
    input_shape: tuple[int | None, ...]
    input_dtype: str
    training: tuple[str, ...]
    training_endpoint: str
    slots: tuple[Slot, ...]

    @property
    def has_training_mode(self) -> bool:
        """Whether it can move its own statistics."""
        return bool(self.training_endpoint) or "true" in self.training

    def to_dict(self) -> dict[str, Any]:
        """For the config of a layer: JSON, read back by `from_dict`."""
        return {**dataclasses.asdict(self), "slots": [list(dataclasses.astuple(slot)) for slot in self.slots]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Anatomy":
        """What `to_dict` made, lists for tuples."""
        slots = tuple(Slot(name, tuple(path), tuple(shape), *rest) for name, path, shape, *rest in values["slots"])
        sequences = {key: tuple(values[key]) for key in ("input_shape", "training")}
        return cls(**{**values, **sequences, "slots": slots})


def anatomy_of(folder: Path) -> Anatomy:
    """Read what a SavedModel takes and holds from its `saved_model.pb`.

    Args:
        folder: Checked by the gate before.

    Raises:
        InputError: Where it is none, is of TensorFlow 1, or does not take images.
    """
    return _Reader(folder, meta_graph_of(folder)).anatomy()


def meta_graph_of(folder: Path) -> Any:
    """The MetaGraphDef in a SavedModel's `saved_model.pb`.

    Raises:
        InputError: Where there is none.
    """
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString((Path(folder) / "saved_model.pb").read_bytes())
        return proto.meta_graphs[0]
    except (OSError, DecodeError, IndexError):
        raise InputError(f"{folder} is not a SavedModel: its saved_model.pb is missing or damaged.") from None


def functions_of(objects: Any, name: str, *, is_signature: bool = False) -> list[str]:
    """Names of the concrete functions behind an endpoint; empty where there is no such function.

    Args:
        objects: The object graph of a MetaGraphDef.
        name: Of an attribute of the root; or the key of a signature.
        is_signature: Which of the two.
    """
    node = objects.nodes[0]
    for part in ("signatures", name) if is_signature else (name,):
        ids = [child.node_id for child in node.children if child.local_name == part]
        if not ids:
            return []
        node = objects.nodes[ids[0]]
    if is_signature and node.WhichOneof("kind") == "bare_concrete_function":
        return [node.bare_concrete_function.concrete_function_name]
    return list(node.function.concrete_functions) if node.WhichOneof("kind") == "function" else []


def leaves_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a StructuredValue in the order of TensorFlow, each with its key where the whole is a dict."""
    kind = value.WhichOneof("kind")
    if kind == "dict_value":
        for key, inner in sorted(value.dict_value.fields.items()):
            yield from leaves_of(inner, name or key)
    elif kind in ("list_value", "tuple_value"):
        for inner in getattr(value, kind).values:
            yield from leaves_of(inner, name)
    elif kind == "named_tuple_value":
        for pair in value.named_tuple_value.values:
            yield from leaves_of(pair.value, name)
    else:
        yield name, value


class _Reader:
    """Looks for endpoints and variables in a MetaGraphDef."""

    def __init__(self, folder: Path, graph: Any):
        self.folder, self.signatures = folder, graph.signature_def
        self.objects = graph.object_graph_def
        self.nodes, self.functions = self.objects.nodes, self.objects.concrete_functions
        if not self.nodes:
            raise InputError(
                f"{folder} was written by TensorFlow 1 and holds no objects to adopt; load it with tf.saved_model.load "
                "and save it again under TensorFlow 2."
            )
        self.root = {child.local_name: child.node_id for child in self.nodes[0].children}

    def anatomy(self) -> Anatomy:
        candidates = [(name, self._traces(name)) for name in ENDPOINTS]
        endpoint, traces = next((found for found in candidates if found[1]), ("", []))
        if endpoint:
            name, shape, dtype = self._input(traces)
            training = self._training(endpoint, traces)
            if training == ("true",):
                raise InputError(f"{self.folder} can only be called with training=True, so it can predict nothing.")
            alike = (
                other
                for other in TRAINING_ENDPOINTS
                if self._takes_only(other, rank=len(shape), dtype=dtype) and self._is_same_network(other, traces)
            )
            chosen = next(alike, "")
            traces = [*traces, *self._traces(chosen)]
        else:
            endpoint, (name, shape, dtype) = self._signature()
            training, chosen, traces = (), "", self._traces(endpoint, is_signature=True)
        if len(shape) != 4 or shape[0] is not None or shape[3] not in (3, None) or shape[1] != shape[2]:
            raise InputError(
                f"{self.folder} takes {dtype} of shape {shape}, not batches of square images (N, S, S, 3); "
                "it cannot be a source for images."
            )
        signature_only = not any(self._traces(other) for other in ENDPOINTS)
        slots = self._slots(traces, trainable=not signature_only)
        return Anatomy(endpoint, signature_only, name, shape, dtype, training, chosen, slots)

    def _traces(self, name: str, *, is_signature: bool = False) -> list[Any]:
        return [self.functions[found] for found in functions_of(self.objects, name, is_signature=is_signature)]

    def _takes_only(self, endpoint: str, *, rank: int, dtype: str) -> bool:
        """Whether a function takes one such tensor and no other: a training step of the user's own takes labels too."""
        signatures = [trace.canonicalized_input_signature for trace in self._traces(endpoint)]
        for signature in signatures:
            given = [leaf for _, leaf in leaves_of(signature) if leaf.WhichOneof("kind") in TENSORS]
            first = [value for part in signature.tuple_value.values[:1] for value in part.tuple_value.values[:1]]
            if len(given) != 1 or [value.WhichOneof("kind") for value in first] != ["tensor_spec_value"]:
                return False
            spec = given[0].tensor_spec_value
            if len(_sides(spec.shape)) != rank or tf.dtypes.as_dtype(spec.dtype).name != dtype:
                return False
        return bool(signatures)

    def _is_same_network(self, endpoint: str, inference: Sequence[Any]) -> bool:
        """Whether a function gives what inference gives, by weights that inference knows.

        A step of unsupervised training takes images alone too; it gives a loss, or keeps momentum of its own.
        """
        weights = self._weights(inference)
        results = {_results(trace) for trace in inference}
        return all(_results(trace) in results and self._weights([trace]) <= weights for trace in self._traces(endpoint))

    def _weights(self, traces: Sequence[Any]) -> set[int]:
        """The trainable variables that functions read."""
        bound = {index for trace in traces for index in trace.bound_inputs}
        kinds = {index: self.nodes[index] for index in bound}
        return {i for i, node in kinds.items() if node.WhichOneof("kind") == "variable" and node.variable.trainable}

    def _input(self, traces: Sequence[Any]) -> tuple[str, tuple[int | None, ...], str]:
        """The first argument of all traces; a side that one of them leaves open is open."""
        specs = []
        for trace in traces:
            values = trace.canonicalized_input_signature.tuple_value.values
            first = [*(values[0].tuple_value.values[:1] if values else ()), *_fields(values[1:])]
            kinds = [value for value in first if value.WhichOneof("kind") == "tensor_spec_value"]
            if kinds:
                spec = kinds[0].tensor_spec_value
                specs.append((spec.name, _sides(spec.shape), tf.dtypes.as_dtype(spec.dtype).name))
        if not specs:
            raise InputError(f"{self.folder} takes other things than one tensor; it cannot be a source for images.")
        shapes = [shape for _, shape, _ in specs if len(shape) == len(specs[0][1])]
        merged = tuple(None if None in sides else sides[0] for sides in zip(*shapes, strict=True))
        fixed = specs[0][1]
        return specs[0][0], merged if len(set(shapes)) > 1 else fixed, specs[0][2]

    def _signature(self) -> tuple[str, tuple[str, tuple[int | None, ...], str]]:
        usable = {key: value for key, value in self.signatures.items() if len(value.inputs) == 1}
        key = next((key for key in (*SIGNATURES, *sorted(usable)) if key in usable), "")
        if not key:
            raise InputError(f"{self.folder} has neither __call__ nor a signature that takes one tensor.")
        name, spec = next(iter(usable[key].inputs.items()))
        return key, (name, _sides(spec.tensor_shape), tf.dtypes.as_dtype(spec.dtype).name)

    def _training(self, endpoint: str, traces: Sequence[Any]) -> tuple[str, ...]:
        fields = self.nodes[self.root[endpoint]].function.function_spec.fullargspec.named_tuple_value.values
        names = {
            pair.key: [value.string_value for value in pair.value.list_value.values]
            for pair in fields
            if pair.key in ("args", "kwonlyargs")
        }
        arguments = [name for name in names.get("args", []) if name != "self"]
        if "training" not in [*arguments, *names.get("kwonlyargs", [])]:
            return ()
        found = set()
        for trace in traces:
            values = trace.canonicalized_input_signature.tuple_value.values
            positional = values[0].tuple_value.values
            index = arguments.index("training") if "training" in arguments else len(positional)
            given = positional[index] if index < len(positional) else values[1].dict_value.fields.get("training")
            kind = given.WhichOneof("kind") if given is not None else "none_value"
            if kind == "bool_value":
                found.add("true" if given.bool_value else "false")
            else:
                found |= {"none"} if kind == "none_value" else {"true", "false"}
        return tuple(sorted(found))

    def _slots(self, traces: Sequence[Any], *, trainable: bool) -> tuple[Slot, ...]:
        """The variables that the traces capture, in the order of capture: the order of the computation."""
        ways = self._ways()
        bound = dict.fromkeys(index for trace in traces for index in trace.bound_inputs)
        indices = [index for index in bound if self.nodes[index].WhichOneof("kind") == "variable"]
        lost = [self.nodes[index].variable.name for index in indices if index not in ways]
        if lost:
            raise InputError(f"{self.folder} has variables that no attribute leads to, such as {lost[0]!r}.")
        variables = [self.nodes[index].variable for index in indices]
        names = _labels([variable.name for variable in variables], [ways[index] for index in indices])
        return tuple(
            Slot(
                name, ways[index], tuple(side.size for side in variable.shape.dim),
                tf.dtypes.as_dtype(variable.dtype).name,
                trainable and variable.trainable and not STATISTICS.fullmatch(name.rpartition("/")[2]),
            )
            for name, index, variable in zip(names, indices, variables, strict=True)
        )  # fmt: skip

    def _ways(self) -> dict[int, tuple[str, ...]]:
        """The shortest way of attributes from the root to each object; not through functions."""
        ways: dict[int, tuple[str, ...]] = {0: ()}
        queue = collections.deque([0])
        while queue:
            index = queue.popleft()
            for child in self.nodes[index].children:
                kind = self.nodes[child.node_id].WhichOneof("kind")
                if child.node_id not in ways and kind not in ("function", "bare_concrete_function"):
                    ways[child.node_id] = (*ways[index], child.local_name)
                    queue.append(child.node_id)
        return ways


def _results(trace: Any) -> tuple[tuple[str, tuple[int | None, ...], str], ...]:
    """Name, sides but for the batch, and type of each tensor that a function gives."""
    return tuple(
        (name, _sides(leaf.tensor_spec_value.shape)[1:], tf.dtypes.as_dtype(leaf.tensor_spec_value.dtype).name)
        for name, leaf in leaves_of(trace.output_signature)
        if leaf.WhichOneof("kind") == "tensor_spec_value"
    )


def _fields(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from value.dict_value.fields.values()


def _sides(shape: Any) -> tuple[int | None, ...]:
    if shape.unknown_rank:
        return (None, None, None, None)
    return tuple(side.size if side.size >= 0 else None for side in shape.dim)


def _labels(names: Sequence[str], ways: Sequence[tuple[str, ...]]) -> list[str]:
    """TensorFlow's names where they are all different, else the ways where these say more than numbers.

    Example:
        >>> _labels(["kernel:0", "kernel:0"], [("conv", "w"), ("top", "w")])
        ['conv/w', 'top/w']
    """
    plain = [name.partition(":")[0] for name in names]
    if len(set(plain)) == len(plain) and not all(NAMELESS.fullmatch(name) for name in plain):
        return plain
    if not all(NAMELESS.fullmatch(way[-1]) for way in ways):
        return ["/".join(way) for way in ways]
    if len(set(plain)) == 1:
        return [f"variable_{index}" for index in range(len(plain))]
    count: collections.Counter = collections.Counter()
    found = []
    for name in plain:
        found.append(f"{name}_{count[name]}" if count[name] else name)
        count[name] += 1
    return found if len(set(found)) == len(found) else [f"{name}_{index}" for index, name in enumerate(plain)]
