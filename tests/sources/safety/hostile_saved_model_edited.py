"""Hostile and damaged SavedModels that no TensorFlow would write: sound ones, edited; see hostile_keras.py."""

import shutil

import numpy as np
import tensorflow as tf
from hostile_saved_model import sound
from tensorflow.core.protobuf import saved_model_pb2


def edited(change, table=False):
    """A builder that changes a sound SavedModel by `change(meta_graph, canary)`."""

    def write(folder, canary):
        path = sound(folder, table)
        model = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        change(model.meta_graphs[0], canary)
        (path / "saved_model.pb").write_bytes(model.SerializeToString())
        return path

    return write


def function_named(meta, part):
    return next(f for f in meta.graph_def.library.function if part in f.signature.name)


def node_of(function, op):
    return next(node for node in function.node_def if node.op == op)


def constant(nodes, name, value):
    node = nodes.add(name=name, op="Const")
    node.attr["dtype"].type = tf.string.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    return node


def unknown_op(meta, canary):
    function_named(meta, "signature_wrapper").node_def.add(name="evil", op="ShellExecute")


def missing_function(meta, canary):
    node = function_named(meta, "signature_wrapper").node_def.add(name="evil", op="PartitionedCall")
    node.attr["f"].func.name = "elsewhere"


def write_in_saver(meta, canary):
    function_named(meta, "traced_restore").node_def.add(name="evil", op="WriteFile")


def restore_literal(meta, canary):
    function = function_named(meta, "traced_restore")
    constant(function.node_def, "evil", "/etc/secret")
    node_of(function, "RestoreV2").input[0] = "evil:output:0"


def save_literal(meta, canary):
    function = function_named(meta, "traced_save")
    constant(function.node_def, "evil", str(canary))
    node_of(function, "SaveV2").input[0] = "evil:output:0"


def save_climbs(meta, canary):
    function = function_named(meta, "traced_save")
    constant(function.node_def, "evil", "/../../canary")
    node_of(function, "StringJoin").input[1] = "evil:output:0"


def save_in_restore(meta, canary):
    """What loads would write."""
    meta.saver_def.restore_op_name = meta.saver_def.save_tensor_name.partition(":")[0]


def signature_saves(meta, canary):
    """A signature whose output is the saver's."""
    meta.signature_def["serving_default"].outputs["output_0"].name = meta.saver_def.save_tensor_name


def signature_saves_sparsely(meta, canary):
    meta.signature_def["serving_default"].outputs[
        "output_0"
    ].coo_sparse.values_tensor_name = meta.saver_def.save_tensor_name


def object_saves(meta, canary):
    """A restored object that can call the saver."""
    name = function_named(meta, "traced_save").signature.name
    meta.object_graph_def.concrete_functions[name].bound_inputs.extend([])
    meta.object_graph_def.nodes.add().function.concrete_functions.append(name)


def asset_climbs(meta, canary):
    meta.asset_file_def[0].filename = "../../../../etc/passwd"


def asset_absolute(meta, canary):
    meta.asset_file_def[0].filename = "/etc/passwd"


def asset_literal(meta, canary):
    """The variable that holds the asset's path is filled from a literal."""
    constant(meta.graph_def.node, "evil", "/etc/passwd")
    next(node for node in meta.graph_def.node if node.op == "AssignVariableOp").input[1] = "evil"


def asset_unbound(meta, canary):
    """The initializer takes another object than the asset for its file."""
    name = function_named(meta, "initializer").signature.name
    bound = meta.object_graph_def.concrete_functions[name].bound_inputs
    bound[0] = bound[1]


def initializer_literal(meta, canary):
    function = function_named(meta, "initializer")
    constant(function.node_def, "evil", "/etc/passwd")
    node_of(function, "InitializeTableFromTextFileV2").input[1] = "evil:output:0"


def variable_bomb(meta, canary):
    variable = next(node.variable for node in meta.object_graph_def.nodes if node.HasField("variable"))
    variable.shape.dim[0].size = 2**40


def literal_bomb(meta, canary):
    node = function_named(meta, "signature_wrapper").node_def.add(name="evil", op="Const")
    node.attr["dtype"].type = tf.float32.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(1.0, shape=[1]))
    node.attr["value"].tensor.tensor_shape.dim[0].size = 2**40


def literal_resource(meta, canary):
    node = function_named(meta, "signature_wrapper").node_def.add(name="evil", op="Const")
    node.attr["value"].tensor.dtype = tf.resource.as_datatype_enum


def registered_class(meta, canary):
    meta.object_graph_def.nodes[0].registered_name = "Custom.Evil"


def two_functions(meta, canary):
    meta.graph_def.library.function.add().CopyFrom(meta.graph_def.library.function[0])


def second_graph(folder, canary):
    """The first graph is sound, the second is not."""
    path = sound(folder)
    model = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    model.meta_graphs.add().CopyFrom(model.meta_graphs[0])
    model.meta_graphs[1].graph_def.node.add(name="evil", op="WriteFile")
    (path / "saved_model.pb").write_bytes(model.SerializeToString())
    return path


def damaged(change):
    def write(folder, canary):
        path = sound(folder)
        file = path / "saved_model.pb"
        file.write_bytes(change(file.read_bytes()))
        return path

    return write


def flip(content, seed=0):
    """A bit of the length of the first message, so that the structure breaks."""
    changed = bytearray(content)
    changed[np.random.default_rng(seed).integers(2, 4)] ^= 0x41
    return bytes(changed)


def as_text(folder, canary):
    path = sound(folder)
    (path / "saved_model.pb").rename(path / "saved_model.pbtxt")
    return path


def link_out(folder, canary):
    path = sound(folder)
    (path / "assets").mkdir(exist_ok=True)
    (path / "assets" / "words.txt").symlink_to("/etc/passwd")
    return path


def without_graph(folder, canary):
    path = sound(folder)
    (path / "saved_model.pb").unlink()
    (path / "saved_model.txt").write_text("")
    return path


def lost_asset(folder, canary):
    path = sound(folder, table=True)
    shutil.rmtree(path / "assets")
    return path


CASES = {
    "sm_write_in_second_graph": (second_graph, "'WriteFile'"),
    "sm_unknown_op": (edited(unknown_op), "'ShellExecute'"),
    "sm_missing_function": (edited(missing_function), "'elsewhere'"),
    "sm_write_in_saver": (edited(write_in_saver), "'WriteFile'"),
    "sm_restore_literal": (edited(restore_literal), "'RestoreV2'.*file name"),
    "sm_save_literal": (edited(save_literal), "'SaveV2'.*file name"),
    "sm_save_climbs": (edited(save_climbs), "'(ShardedFilename|SaveV2)'.*file name"),
    "sm_restore_that_saves": (edited(save_in_restore), "'RestoreV2'.*outside"),
    "sm_signature_saves": (edited(signature_saves), "outside the model's own saver"),
    "sm_signature_saves_sparsely": (edited(signature_saves_sparsely), "outside the model's own saver"),
    "sm_object_saves": (edited(object_saves), "outside the model's own saver"),
    "sm_asset_climbs": (edited(asset_climbs, table=True), "assets/"),
    "sm_asset_absolute": (edited(asset_absolute, table=True), "assets/"),
    "sm_asset_literal": (edited(asset_literal, table=True), "'InitializeTableFromTextFileV2'.*'?Const"),
    "sm_asset_unbound": (edited(asset_unbound, table=True), "'InitializeTableFromTextFileV2'.*caller"),
    "sm_initializer_literal": (edited(initializer_literal, table=True), "'InitializeTableFromTextFileV2'.*Const"),
    "sm_asset_lost": (lost_asset, "no file in assets/"),
    "sm_variable_bomb": (edited(variable_bomb), "variable"),
    "sm_literal_bomb": (edited(literal_bomb), "1,099,511,627,776"),
    "sm_literal_resource": (edited(literal_resource), "no plain tensor"),
    "sm_registered_class": (edited(registered_class), "Custom.Evil"),
    "sm_two_functions": (edited(two_functions), "two functions"),
    "sm_truncated": (damaged(lambda content: content[: len(content) // 2]), "damaged"),
    "sm_flipped": (damaged(flip), "damaged"),
    "sm_empty": (damaged(lambda content: b""), "no graph"),
    "sm_noise": (damaged(lambda content: np.random.default_rng(1).bytes(4_000)), "damaged"),
    "sm_text_form": (as_text, "pbtxt"),
    "sm_link_out": (link_out, "link out"),
    "sm_without_graph": (without_graph, "saved_model.pb"),
}
