"""SavedModel folders: every op on the list, the saver's ops only for the saver, files only out of assets/."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from tfxfer.sources.safety import saved_model_proto
from tfxfer.sources.safety.keras_archive import contained_files
from tfxfer.sources.safety.refusal import expands_too_much, refusal, shown
from tfxfer.sources.safety.saved_model_graph import (
    NameTrace,
    Program,
    Scope,
    data_inputs,
    every_input,
    first_input,
    joined,
    node_of,
    output_of,
    read_variable,
    text_attribute,
)
from tfxfer.sources.safety.tensorflow_ops import ALLOWED_OPS, ASSET_READERS, RESTORE_OPS, SAVE_OPS
from tfxfer.sources.safety.zip_members import contained

GRAPH_FILE = "saved_model.pb"
# A protocol buffer cannot be larger.
MAX_GRAPH_BYTES = 2**31 - 1
INIT_KEY = "__saved_model_init_op"
INIT_COLLECTIONS = frozenset({"saved_model_main_op", "legacy_init_op", "saved_model_train_op"})
ASSET_COLLECTION = "saved_model_assets"
# Where tf.print may write; anything else names a file.
PRINT_STREAMS = frozenset({b"", b"stderr", b"stdout", b"log(info)", b"log(warning)", b"log(error)"})
# Where the inputs of an op are file names: input numbers.
PATH_INPUTS = {
    "InitializeTableFromTextFile": (1,),
    "InitializeTableFromTextFileV2": (1,),
    "RestoreV2": (0,),
    "SaveV2": (0,),
    "ShardedFilename": (0,),
    "MergeV2Checkpoints": (0, 1),
}
_RESOURCE, _VARIANT = 20, 21
_HOSTILE = "do not use this model, or export it again without that op"
_DAMAGED = "get the model again from where it was published"


def check_saved_model(folder: str | Path) -> None:
    """Check a SavedModel: whatever loading or calling it can run computes on tensors and nothing else.

    The functions that `saver_def` names may save and restore under the name that the loader gives them, and tables
    may be filled from files of the folder assets/. All other ops must be on the list, in the graph and in every
    function of its library, called or not.

    Args:
        folder: Holds saved_model.pb.

    Raises:
        InputError: With the op, the node and the function that it stands in, or with what is damaged.
    """
    folder = Path(folder)
    files = {file.relative_to(folder).as_posix(): file for file in contained_files(folder)}
    for name in ("saved_model.pbtxt", "saved_model.cpb"):
        if name in files:
            raise refusal(folder, f"it holds {name!r}, a form that is not checked", "export it as saved_model.pb")
    if GRAPH_FILE not in files:
        raise refusal(folder, f"it has no {GRAPH_FILE!r}", "give the folder that tf.saved_model.save wrote")
    size_bytes = files[GRAPH_FILE].stat().st_size
    if size_bytes > MAX_GRAPH_BYTES:
        raise refusal(folder, f"its {GRAPH_FILE} has {size_bytes:,} bytes", _DAMAGED)
    try:
        model = saved_model_proto.parse("SavedModel", files[GRAPH_FILE].read_bytes())
        if not model.meta_graphs or not any(meta.graph.nodes for meta in model.meta_graphs):
            raise ValueError("it holds no graph")
        programs = [(meta, Program(meta)) for meta in model.meta_graphs]
    except (DecodeError, ValueError, RecursionError) as error:
        raise refusal(folder, f"its {GRAPH_FILE} is damaged ({str(error)[:160]})", _DAMAGED) from error
    stored_bytes = sum(file.stat().st_size for name, file in files.items() if name.startswith("variables/"))
    for meta, program in programs:
        _check_assets(meta, folder, files)
        _check_objects(meta, folder, stored_bytes)
        _GraphCheck(meta, program, folder, size_bytes).run()


class _GraphCheck:
    """One MetaGraph against the lists."""

    def __init__(self, meta: Any, program: Program, folder: Path, size_bytes: int):
        self.program, self.folder, self.size_bytes = program, folder, size_bytes
        saver = meta.saver
        self.save_nodes = program.main_nodes([saver.save])
        self.restore_nodes = program.main_nodes([saver.restore])
        called = [name for entry in meta.signatures if entry.key != INIT_KEY for name in _tensors(entry.value)]
        initial = [name for entry in meta.signatures if entry.key == INIT_KEY for name in _tensors(entry.value)]
        initial += [
            name for entry in meta.collections if entry.key in INIT_COLLECTIONS for name in entry.value.names.values
        ]
        self.called_nodes = program.main_nodes(called)
        self.run_nodes = self.called_nodes | program.main_nodes(initial)
        self.run_functions = program.functions_of(self.run_nodes, program.bound)
        self.save_functions = program.functions_of(self.save_nodes)
        self.restore_functions = program.functions_of(self.restore_nodes)
        filename = (node_of(saver.filename), output_of(saver.filename)) if saver.filename else None
        assets = {(node_of(asset.tensor.name), output_of(asset.tensor.name)) for asset in _assets(meta)}
        objects = meta.objects.nodes

        def is_asset(node: str, output: int) -> bool:
            op = program.main.nodes[node].op if node in program.main.nodes else ""
            # The loader feeds the path of an asset when it initialises, not when a signature is called: there a
            # literal would be read as it stands, and a placeholder cannot be read at all.
            literal = op in ("Const", "PlaceholderWithDefault") and node not in self.called_nodes
            return (node, output) in assets and (literal or op in ("Placeholder", "PlaceholderV2"))

        def is_asset_object(number: int) -> bool:
            return 0 <= number < len(objects) and _kinds(objects[number]) == ["asset"]

        self.asset_trace = NameTrace(
            program,
            through={"Identity": first_input, "ReadVariableOp": read_variable},
            accepts=is_asset,
            accepts_bound=is_asset_object,
        )
        self.saver_trace = NameTrace(
            program,
            through={
                "Identity": first_input,
                "ShardedFilename": first_input,
                "StringJoin": joined,
                "Pack": every_input,
            },
            accepts=lambda node, output: (node, output) == filename,
            accepts_bound=lambda number: False,
        )

    def run(self) -> None:
        """Check every node of the graph and of every function."""
        for scope in self.program.scopes():
            for node in scope.nodes.values():
                self._check_op(scope, node)
                self._check_tensors(scope, node)

    def _check_op(self, scope: Scope, node: Any) -> None:
        op = node.op
        if op == "PrintV2":
            stream = text_attribute(node, "output_stream")
            if stream not in PRINT_STREAMS:
                raise self._refuse(scope, node, f"prints to {shown(stream.decode('utf-8', 'replace'))}")
        elif op in ALLOWED_OPS or op in self.program.functions:
            return
        elif op in ASSET_READERS:
            self._check_paths(scope, node, self.asset_trace, "an asset of the model")
        elif op in SAVE_OPS or op in RESTORE_OPS:
            self._check_saver(scope, node)
        else:
            raise self._refuse(scope, node, "is not on the list of ops that only compute")

    def _check_saver(self, scope: Scope, node: Any) -> None:
        """The saver's ops: where only the saver comes, and on the name that the loader gives it."""
        nodes, functions = (
            (self.save_nodes, self.save_functions)
            if node.op in SAVE_OPS
            else (self.restore_nodes, self.restore_functions)
        )
        runs = scope.name in self.run_functions if scope.name else node.name in self.run_nodes
        saves = scope.name in functions if scope.name else node.name in nodes
        # Older models keep the nodes of several savers in the main graph; those that nothing runs do no harm.
        if runs or (scope.name and not saves):
            raise self._refuse(scope, node, "reads or writes files outside the model's own saver")
        if saves:
            self._check_paths(scope, node, self.saver_trace, "the saver's file name")

    def _check_paths(self, scope: Scope, node: Any, trace: NameTrace, wanted: str) -> None:
        inputs = data_inputs(node)
        for index in PATH_INPUTS[node.op]:
            problem = trace.problem(scope, inputs[index]) if index < len(inputs) else "is missing"
            if problem:
                raise self._refuse(scope, node, f"uses a file name that {problem} instead of {wanted}")

    def _check_tensors(self, scope: Scope, node: Any) -> None:
        """Literal tensors: plain, and not far larger than the file."""
        for entry in node.attributes:
            for tensor in ([entry.value.tensor] if entry.value.HasField("tensor") else []) + list(
                entry.value.items.tensors
            ):
                if tensor.dtype in (_RESOURCE, _VARIANT):
                    raise self._refuse(scope, node, "holds a literal that is no plain tensor")
                count = math.prod(side.size for side in tensor.shape.sides)
                if count < 0 or expands_too_much(count, self.size_bytes):
                    raise self._refuse(scope, node, f"holds a literal of {count:,} numbers")

    def _refuse(self, scope: Scope, node: Any, reason: str) -> Exception:
        place = f"the function {shown(scope.name)}" if scope.name else "the graph"
        return refusal(self.folder, f"in {place}, the op {shown(node.op)} (node {shown(node.name)}) {reason}", _HOSTILE)


def _check_assets(meta: Any, folder: Path, files: dict[str, Path]) -> None:
    """Asset files lie in assets/."""
    for asset in _assets(meta):
        if not contained(asset.filename) or f"assets/{asset.filename}" not in files:
            raise refusal(folder, f"its asset {shown(asset.filename)} is no file in assets/", _DAMAGED)


def _check_objects(meta: Any, folder: Path, stored_bytes: int) -> None:
    """Objects name classes of TensorFlow only, and variables not far larger than what is stored."""
    declared = 0
    for number, item in enumerate(meta.objects.nodes):
        if item.registered_name and not item.registered_name.startswith("tf."):
            name = shown(item.registered_name)
            raise refusal(folder, f"its object {number} is of the registered class {name}", _HOSTILE)
        if item.HasField("asset") and not 0 <= item.asset.index < len(meta.assets):
            raise refusal(folder, f"its object {number} is an asset that is not there", _DAMAGED)
        if item.HasField("variable"):
            # A side of -1 is not known before the values are.
            count = math.prod(max(0, side.size) for side in item.variable.shape.sides)
            declared += count
            if expands_too_much(declared, stored_bytes):
                raise refusal(
                    folder,
                    f"its variable {number} declares {count:,} numbers, and {stored_bytes:,} bytes are stored",
                    _HOSTILE,
                )


def _assets(meta: Any) -> Iterator[Any]:
    """Assets by either way of listing them."""
    yield from meta.assets
    for entry in meta.collections:
        if entry.key == ASSET_COLLECTION:
            for value in entry.value.anything.values:
                try:
                    yield saved_model_proto.parse("Asset", value.value)
                except DecodeError:
                    continue  # TensorFlow cannot read it either


def _tensors(signature: Any) -> Iterator[str]:
    """Every tensor that a signature names."""
    stack = [entry.value for entry in (*signature.inputs, *signature.outputs)]
    while stack:
        info = stack.pop()
        yield from (
            name for name in (info.name, info.sparse.values, info.sparse.indices, info.sparse.dense_shape) if name
        )
        stack += info.composite.parts


def _kinds(item: Any) -> list[str]:
    """What an object of the object graph is; one kind, unless someone wrote two."""
    kinds = ("user_object", "asset", "function", "variable", "bare_function", "constant", "resource", "captured_tensor")
    return [kind for kind in kinds if item.HasField(kind)]
