"""A Keras layer around a SavedModel: Keras sees, freezes, trains, saves and reloads the variables inside.

Which variables a program really uses is read from the list of what its endpoints capture. The attributes
`variables` and `trainable_variables` of a loaded `model.export` artifact do not tell: the latter are copies that the
program never reads, so training them moves nothing.
"""

import collections
import dataclasses
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_folder
from tfxfer.sources.safety import check_saved_model

ENDPOINTS = ("__call__", "serve", "call_inference")
TRAINING_ENDPOINTS = ("call_training", "serve_training", "train")
SIGNATURES = ("serving_default", "default", "serve")
OUTPUTS = ("default", "features", "pooled_output")
TOP_OUTPUTS = ("logits", *OUTPUTS)
STATISTICS = re.compile(r"(?:moving|running)_(?:mean|var|variance)(?:_\d+)?")
ONES = ("gamma", "scale", "moving_variance", "moving_var", "running_variance", "running_var")
ZEROS = ("beta", "offset", "bias", "biases", "moving_mean", "running_mean")
# What names a unit of an architecture in names of variables, the "/" of which are "_" here: block_3_expand,
# conv2_block1_1_conv, block1a_bn, expanded_conv_3_depthwise, block1_unit_2_bottleneck_v2, Mixed_5b_Branch_0, layers_0.
_UNIT = re.compile(
    r"(expanded_conv(?=_[a-z])|block(?:35|17|8)_\d+|.*?(?:blocks?|layers?|stages?|expanded_conv|cell|conv_dw|conv_pw|"
    r"mixed)_?\d+[a-z]?(?:_(?:block|unit)s?_?\d+)?)(?:_|$)",
    re.IGNORECASE,
)
_NAMELESS = re.compile(r"(?:variable(?:_\d+)?|\d+)", re.IGNORECASE)


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
    """Read what a SavedModel takes, gives and holds from its `saved_model.pb`.

    Args:
        folder: Checked by the gate before.

    Raises:
        InputError: Where it is none, is of TensorFlow 1, or does not take images.
    """
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString((Path(folder) / "saved_model.pb").read_bytes())
        graph = proto.meta_graphs[0]
    except (OSError, DecodeError, IndexError):
        raise InputError(f"{folder} is not a SavedModel: its saved_model.pb is missing or damaged.") from None
    return _Reader(folder, graph).anatomy()


class _Reader:
    """Looks for endpoints and variables in a MetaGraphDef."""

    def __init__(self, folder: Path, graph: Any):
        self.folder, self.signatures = folder, graph.signature_def
        self.nodes, self.functions = graph.object_graph_def.nodes, graph.object_graph_def.concrete_functions
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
            chosen = next((other for other in TRAINING_ENDPOINTS if self._traces(other)), "")
            traces = [*traces, *self._traces(chosen)]
        else:
            endpoint, (name, shape, dtype) = self._signature()
            training, chosen, traces = (), "", self._traces_of_signature(endpoint)
        if len(shape) != 4 or shape[0] is not None or shape[3] not in (3, None) or shape[1] != shape[2]:
            raise InputError(
                f"{self.folder} takes {dtype} of shape {shape}, not batches of square images (N, S, S, 3); "
                "it cannot be a source for images."
            )
        signature_only = not any(self._traces(other) for other in ENDPOINTS)
        slots = self._slots(traces, trainable=not signature_only)
        return Anatomy(endpoint, signature_only, name, shape, dtype, training, chosen, slots)

    def _traces(self, endpoint: str) -> list[Any]:
        """The concrete functions behind an attribute of the root that is a function."""
        node = self.nodes[self.root[endpoint]] if endpoint in self.root else None
        if node is None or node.WhichOneof("kind") != "function":
            return []
        return [self.functions[name] for name in node.function.concrete_functions]

    def _traces_of_signature(self, key: str) -> list[Any]:
        node = self.nodes[self.root["signatures"]] if "signatures" in self.root else None
        for child in node.children if node is not None else ():
            found = self.nodes[child.node_id]
            if child.local_name == key and found.WhichOneof("kind") == "bare_concrete_function":
                return [self.functions[found.bare_concrete_function.concrete_function_name]]
            if child.local_name == key and found.WhichOneof("kind") == "function":
                return [self.functions[name] for name in found.function.concrete_functions]
        return []

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
    if len(set(plain)) == len(plain) and not all(_NAMELESS.fullmatch(name) for name in plain):
        return plain
    if not all(_NAMELESS.fullmatch(way[-1]) for way in ways):
        return ["/".join(way) for way in ways]
    if len(set(plain)) == 1:
        return [f"variable_{index}" for index in range(len(plain))]
    count: collections.Counter = collections.Counter()
    found = []
    for name in plain:
        found.append(f"{name}_{count[name]}" if count[name] else name)
        count[name] += 1
    return found if len(set(found)) == len(found) else [f"{name}_{index}" for index, name in enumerate(plain)]


def group_slots(slots: Sequence[Slot]) -> dict[str, list[int]]:
    """Group variables into blocks, by the unit of the architecture in their names and the order they are read in.

    Variables of one unit ("block_3", "conv2_block1") are one block; of those without a unit, a scope ("stem_conv") with
    a kernel begins a block; what has no kernel (a normalisation of its own) belongs to what stands before it.

    Returns:
        Names of blocks, without "/", to indices of `slots`; each once.

    Example:
        >>> names = ["net/stem/kernel", "net/stem_bn/gamma", "net/block_1_conv/kernel", "net/block_1_bn/gamma"]
        >>> group_slots([Slot(name, (), (3, 3) if "kernel" in name else (3,), "float32", True) for name in names])
        {'stem': [0, 1], 'block_1': [2, 3]}
    """
    units = _units(slots)
    with_kernel = {unit for unit, slot in zip(units, slots, strict=True) if unit and len(slot.shape) >= 2}
    groups: dict[str, list[int]] = {}
    before: list[int] = []
    current = ""
    for index, (unit, slot) in enumerate(zip(units, slots, strict=True)):
        if unit in with_kernel:
            current = unit
        elif len(slot.shape) >= 2:
            current = next(name for n in range(1, len(slots) + 1) if (name := f"part_{n}") not in {*groups, *units})
        (groups.setdefault(current, []) if current else before).append(index)
    if before:  # the first kernel
        first = next(iter(groups), "all")
        groups[first] = [*before, *groups.get(first, [])]
    return groups


def _units(slots: Sequence[Slot]) -> list[str]:
    """The unit in each name, or its whole scope; "" where the name says nothing."""
    scopes = [slot.name.split("/")[:-1] for slot in slots]
    shared = 0  # parts that all scopes begin with, such as the name of the model
    while scopes and min(map(len, scopes)) > shared + 1 and len({scope[shared] for scope in scopes}) == 1:
        shared += 1
    found = []
    for slot, scope in zip(slots, scopes, strict=True):
        text = "_".join(scope[shared:])
        unit = _UNIT.match(text)
        nameless = _NAMELESS.fullmatch(slot.name.rpartition("/")[2])
        found.append("" if nameless else unit[1] if unit else text)
    return found


class Program:
    """A SavedModel that passed the gate and is loaded: from a copy of its own, so that nothing can change under it.

    Args:
        folder: The SavedModel.
        sha256: What `sha256_of_folder` must give; "" leaves that open.

    Raises:
        InputError: Where the digest differs, the gate refuses it, or TensorFlow cannot load it.
    """

    def __init__(self, folder: Path, sha256: str = ""):
        kept = tempfile.mkdtemp(prefix="tfxfer-program-")
        weakref.finalize(self, shutil.rmtree, kept, ignore_errors=True)
        self.folder = Path(kept) / "saved_model"
        shutil.copytree(folder, self.folder, symlinks=True)
        self.sha256 = sha256_of_folder(self.folder)
        if sha256 and sha256 != self.sha256:
            raise InputError(
                f"{folder} has SHA-256 {self.sha256} where {sha256} is expected: it was changed or damaged; get it "
                "again."
            )
        check_saved_model(self.folder)
        self.anatomy = anatomy_of(self.folder)
        try:
            self.loaded = tf.saved_model.load(str(self.folder))
            self.variables = [_follow(self.loaded, slot.path) for slot in self.anatomy.slots]
            self._bind_constants()
        except Exception as error:  # TensorFlow raises almost anything
            raise InputError(f"TensorFlow cannot load {folder}: {reason(error)}") from error

    def __call__(self, images: Any, *, training: bool) -> Any:
        """Run it.

        Args:
            images: (N, S, S, 3), of the type it takes.
            training: Its training mode, which moves its statistics.
        """
        anatomy = self.anatomy
        images = tf.cast(images, anatomy.input_dtype)
        if anatomy.is_signature:
            return self.loaded.signatures[anatomy.endpoint](**{anatomy.input_name: images})
        if training and anatomy.training_endpoint:
            return getattr(self.loaded, anatomy.training_endpoint)(images)
        function = getattr(self.loaded, anatomy.endpoint)
        if not anatomy.training:
            return function(images)
        inference = False if "false" in anatomy.training else None
        return function(images, training=True if training else inference)

    def _bind_constants(self) -> None:
        """Let tensors that the functions captured (a mean to subtract) be constants of the graph that calls them.

        As captures they would be inputs of every graph around, which converters to ONNX keep: a model that cannot run.
        """
        anatomy = self.anatomy
        names = [name for name in (anatomy.endpoint, anatomy.training_endpoint) if name]
        functions = (
            [self.loaded.signatures[anatomy.endpoint]]
            if anatomy.is_signature
            else [found for name in names for found in getattr(self.loaded, name).concrete_functions]
        )
        for function in functions:
            function.set_external_captures([_constant(captured) for captured in function.captured_inputs])

    @property
    def resources(self) -> list[Any]:
        """What must be tracked beside the variables where a function that runs it is saved: tables and their files."""
        kind = tf.saved_model.experimental.TrackableResource
        return [part for part in tf.train.TrackableView(self.loaded).descendants() if isinstance(part, kind)]


def _follow(loaded: Any, path: Sequence[str]) -> tf.Variable:
    for name in path:
        loaded = tf.train.TrackableView.children(loaded)[name]
    return loaded


def _constant(captured: Any) -> Any:
    """A captured tensor as what makes a constant of it; anything else as it is."""
    if not isinstance(captured, tf.Tensor) or captured.dtype in (tf.resource, tf.variant):
        return captured
    value = captured.numpy()
    return lambda: tf.constant(value)


def reason(error: Exception) -> str:
    """What went wrong in one line: of TensorFlow's reports the line about the op that failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    at_op = next((index for index, line in enumerate(lines) if line.startswith("[[{{node")), 0)
    return lines[max(at_op - 1, 0)][:300]


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
        return tf.ensure_shape(_pick(outputs, self.output_name), (None, *self.tail))

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


def _pick(outputs: Any, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs[name]
    return outputs[0] if isinstance(outputs, list | tuple) else outputs
