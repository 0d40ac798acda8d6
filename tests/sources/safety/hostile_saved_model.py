"""Hostile SavedModels as TensorFlow itself writes them; see hostile_keras.py."""

from pathlib import Path

import tensorflow as tf

X = tf.TensorSpec([None, 3], tf.float32, name="x")
S = tf.TensorSpec([], tf.string, name="path")


def module(function, spec=X) -> tf.Module:
    """A module with one variable whose call is `function`."""
    made = tf.Module()
    made.weight = tf.Variable(tf.ones([3, 2]), name="weight")
    made.call = tf.function(function, input_signature=[spec])
    return made


def saved(function, spec=X):
    """A builder of a SavedModel whose signature runs `function(x, canary)`."""

    def write(folder, canary):
        path = folder / "model"
        made = module(lambda x: function(x, str(canary)), spec)
        tf.saved_model.save(made, str(path), signatures=made.call)
        return path

    return write


def sound(folder: Path, table: bool = False) -> Path:
    path = folder / "model"
    made = module(lambda x: x * 2.0)
    if table:
        (folder / "words.txt").write_text("a\nb\n")
        initializer = tf.lookup.TextFileInitializer(
            str(folder / "words.txt"),
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        made.table = tf.lookup.StaticHashTable(initializer, -1)
        made.call = tf.function(
            lambda text: made.table.lookup(text), input_signature=[tf.TensorSpec([None], tf.string)]
        )
    tf.saved_model.save(made, str(path), signatures=made.call)
    return path


def write_file(x, canary):
    tf.io.write_file(canary, "ran")
    return x


def read_file(x, canary):
    return tf.strings.length(tf.io.read_file("/etc/passwd")) + tf.cast(x[0, 0], tf.int32)


def read_given_file(path, canary):
    return tf.io.read_file(path)


def touch(x, canary):
    Path(canary.numpy().decode() if hasattr(canary, "numpy") else canary).write_text("ran")
    return x


def py_function(x, canary):
    return tf.py_function(lambda value: touch(value, canary), [x], tf.float32)


def numpy_function(x, canary):
    return tf.numpy_function(lambda value: touch(value, canary), [x], tf.float32)


def nested(x, canary):
    inner = tf.function(lambda y: write_file(y, canary), autograph=False)
    outer = tf.function(lambda y: inner(y) + 1.0, autograph=False)
    return outer(x)


def in_branch(x, canary):
    return tf.cond(tf.reduce_sum(x) > 0.0, lambda: write_file(x, canary), lambda: x)


def in_loop(x, canary):
    return tf.while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, write_file(y, canary)), [0, x])[1]


def in_map(x, canary):
    return tf.map_fn(lambda row: write_file(row, canary), x)


def in_switch(x, canary):
    return tf.switch_case(tf.constant(1), [lambda: x, lambda: write_file(x, canary)])


def in_gradient(x, canary):
    @tf.custom_gradient
    def odd(y):
        return y, lambda upstream: write_file(upstream, canary)

    return odd(x)


def matching_files(x, canary):
    return tf.io.matching_files("/etc/*")


def print_to_file(x, canary):
    tf.print("ran", output_stream=f"file://{canary}")
    return x


def save_here(x, canary):
    tf.raw_ops.SaveV2(prefix=canary, tensor_names=["x"], shape_and_slices=[""], tensors=[x])
    return x


def restore_here(x, canary):
    return tf.raw_ops.RestoreV2(prefix="/etc/secret", tensor_names=["x"], shape_and_slices=[""], dtypes=[tf.float32])[0]


def merge_here(x, canary):
    """Deletes the directory that it merges from."""
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=["/tmp/other"], destination_prefix=canary)
    return x


def dataset(x, canary):
    lines = tf.data.TextLineDataset("/etc/passwd")
    return lines.reduce(tf.constant(0), lambda count, line: count + 1)


def immutable_const(x, canary):
    return tf.raw_ops.ImmutableConst(dtype=tf.float32, shape=[3], memory_region_name="/etc/secret") + x


def sampler(x, canary):
    return tf.raw_ops.FixedUnigramCandidateSampler(
        true_classes=tf.constant([[1]], tf.int64),
        num_true=1,
        num_sampled=1,
        unique=True,
        range_max=2,
        vocab_file="/etc/passwd",
    )[0]


def descriptor(x, canary):
    return tf.raw_ops.DecodeProtoV2(
        bytes=[b""], message_type="A", field_names=[], output_types=[], descriptor_source="/etc/secret"
    ).sizes


def table_from_text(path, canary):
    """The caller names the file: any file of the server."""
    table = tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64)
    tf.raw_ops.InitializeTableFromTextFileV2(table_handle=table, filename=path, key_index=-2, value_index=-1)
    return tf.raw_ops.LookupTableSizeV2(table_handle=table)


def table_from_literal(x, canary):
    return table_from_text(tf.constant("/etc/passwd"), canary)


def in_initializer(folder, canary):
    """Runs when the model is loaded, before anyone calls it."""

    class Resource(tf.saved_model.experimental.TrackableResource):
        def _create_resource(self):
            return tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64, shared_name="evil")

        def _initialize(self):
            tf.io.write_file(str(canary), "ran")

    made = module(lambda x: x * 2.0)
    made.resource = Resource()
    made.call = tf.function(
        lambda x: x + tf.cast(tf.raw_ops.LookupTableSizeV2(table_handle=made.resource.resource_handle), tf.float32),
        input_signature=[X],
    )
    tf.saved_model.save(made, str(folder / "model"), signatures=made.call)
    canary.unlink(missing_ok=True)
    return folder / "model"


def uncalled(folder, canary):
    """No signature calls it, but whoever loads the model can."""
    made = module(lambda x: x * 2.0)
    made.extra = tf.function(lambda x: write_file(x, str(canary)), input_signature=[X])
    tf.saved_model.save(made, str(folder / "model"), signatures=made.call)
    return folder / "model"


CASES = {
    "sm_write_file": (saved(write_file), "'WriteFile'"),
    "sm_read_file": (saved(read_file), "'ReadFile'"),
    "sm_read_given_file": (saved(read_given_file, S), "'ReadFile'"),
    "sm_py_function": (saved(py_function), "'EagerPyFunc'"),
    "sm_numpy_function": (saved(numpy_function), "'PyFunc'"),
    "sm_write_nested": (saved(nested), "'WriteFile'"),
    "sm_write_in_branch": (saved(in_branch), "'WriteFile'"),
    "sm_write_in_loop": (saved(in_loop), "'WriteFile'"),
    "sm_write_in_map": (saved(in_map), "'WriteFile'"),
    "sm_write_in_switch": (saved(in_switch), "'WriteFile'"),
    "sm_write_in_initializer": (in_initializer, "'WriteFile'"),
    "sm_write_uncalled": (uncalled, "'WriteFile'"),
    "sm_matching_files": (saved(matching_files), "'MatchingFiles'"),
    "sm_print_to_file": (saved(print_to_file), "'PrintV2'.*file://"),
    "sm_save_in_signature": (saved(save_here), "'SaveV2'.*outside"),
    "sm_restore_in_signature": (saved(restore_here), "'RestoreV2'.*outside"),
    "sm_merge_in_signature": (saved(merge_here), "'MergeV2Checkpoints'.*outside"),
    "sm_dataset": (saved(dataset), "Dataset'"),
    "sm_immutable_const": (saved(immutable_const), "'ImmutableConst'"),
    "sm_vocabulary_sampler": (saved(sampler), "'FixedUnigramCandidateSampler'"),
    "sm_descriptor_file": (saved(descriptor), "'DecodeProtoV2'"),
    "sm_table_of_caller": (saved(table_from_text, S), "'InitializeTableFromTextFileV2'.*asset"),
    "sm_table_of_literal": (saved(table_from_literal), "'InitializeTableFromTextFileV2'.*asset"),
}
