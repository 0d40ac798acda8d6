"""Odd but sound SavedModels, torch checkpoints and .safetensors files."""

import json
import struct
import tarfile
from collections import OrderedDict

import keras
import numpy as np
import tensorflow as tf
import valid_keras
from hostile_saved_model import sound
from torch_writer import Tensor, write_new, write_old


def exported(build):
    def write(folder):
        build().export(folder / "model", verbose=False)
        return folder / "model"

    return write


def saved(function, *specs, **members):
    """A builder of a SavedModel with one signature; `members` become attributes of its module."""

    def write(folder):
        made = tf.Module()
        for name, make in members.items():
            setattr(made, name, make(folder))
        made.call = tf.function(lambda *inputs: function(made, *inputs), input_signature=specs)
        tf.saved_model.save(made, str(folder / "model"), signatures=made.call)
        return folder / "model"

    return write


def table(folder):
    (folder / "words.txt").write_text("a\nb\n")
    initializer = tf.lookup.TextFileInitializer(
        str(folder / "words.txt"),
        tf.string,
        tf.lookup.TextFileIndex.WHOLE_LINE,
        tf.int64,
        tf.lookup.TextFileIndex.LINE_NUMBER,
    )
    return tf.lookup.StaticVocabularyTable(initializer, num_oov_buckets=2)


def literal_table(folder):
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a", "b"], [1, 2]), -1)


def mutable_table(folder):
    made = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    made.insert(["a"], [5])
    return made


def flow(made, x):
    total = tf.while_loop(lambda i, y: i < 5, lambda i, y: (i + 1, y * 1.5 + made.weight), [0, x])[1]
    total = tf.cond(tf.reduce_sum(total) > 0.0, lambda: total, lambda: -total)
    rows = tf.map_fn(
        lambda row: tf.switch_case(tf.cast(row[0] > 1.0, tf.int32), [lambda: row, lambda: row * 2.0]), total
    )
    return tf.TensorArray(tf.float32, 2).unstack([rows, total]).stack()


def words(made, text):
    split = tf.strings.split(tf.strings.regex_replace(tf.strings.lower(text), "[^a-z ]", ""))
    return made.table.lookup(split.to_tensor("")), tf.strings.to_hash_bucket_fast(text, 7), tf.strings.join([text, "!"])


def decoded(made, content):
    def one(item):
        image = tf.io.decode_image(item, channels=3, expand_animations=False)
        return tf.image.resize(tf.image.convert_image_dtype(image, tf.float32), [8, 8], antialias=True)

    return tf.map_fn(one, content, fn_output_signature=tf.TensorSpec([8, 8, 3], tf.float32))


def examples(made, content):
    features = {"image": tf.io.FixedLenFeature([], tf.string), "tags": tf.io.VarLenFeature(tf.int64)}
    parsed = tf.io.parse_example(content, features)
    return tf.sparse.to_dense(parsed["tags"]), tf.io.decode_raw(parsed["image"], tf.uint8)


def printed(made, x):
    tf.print("mean", tf.reduce_mean(x))
    tf.debugging.assert_all_finite(x, "inputs")
    with tf.control_dependencies([tf.debugging.assert_less(x, 1e6)]):
        return x + tf.random.stateless_normal([3], [1, 2]) * 0.0 + tf.random.normal([3]) * 0.0


def spectral(made, x):
    power = tf.abs(tf.signal.rfft(x))
    singular = tf.linalg.svd(tf.matmul(x, x, transpose_a=True), compute_uv=False)
    return (
        tf.nn.top_k(power, 2).values,
        singular,
        tf.raw_ops.NonMaxSuppressionV3(
            boxes=[[0.0, 0.0, 1.0, 1.0]], scores=[1.0], max_output_size=1, iou_threshold=0.5, score_threshold=0.0
        ),
    )


def custom_gradient(made, x):
    @tf.custom_gradient
    def clipped(y):
        return tf.nn.relu6(y), lambda upstream: upstream * 0.5

    return clipped(x)


def trained(folder):
    """A module with a training step, its optimizer and a second signature."""
    made = tf.Module()
    made.weight = tf.Variable(tf.ones([3, 1]))
    made.optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    made.optimizer.build([made.weight])

    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.matmul(x, made.weight)))
        made.optimizer.apply([tape.gradient(loss, made.weight)], [made.weight])
        return {"loss": loss}

    made.step = step
    made.call = tf.function(lambda x: {"y": tf.matmul(x, made.weight)}, input_signature=[tf.TensorSpec([None, 3])])
    tf.saved_model.save(made, str(folder / "model"), signatures={"serving_default": made.call, "train": made.step})
    return folder / "model"


def of_tensorflow_1(folder):
    """A graph of TensorFlow 1 with control flow, a table of an asset, and two savers."""
    v1 = tf.compat.v1
    (folder / "words.txt").write_text("a\nb\n")
    with v1.Graph().as_default(), v1.Session() as session:
        text = v1.placeholder(tf.string, [None])
        weight = v1.get_variable("weight", [2], initializer=v1.ones_initializer(), use_resource=False)
        words = tf.lookup.StaticVocabularyTable(
            tf.lookup.TextFileInitializer(str(folder / "words.txt"), tf.string, 0 - 2, tf.int64, 0 - 1),
            1,
        )
        output = tf.cast(words.lookup(text), tf.float32) * tf.reduce_sum(weight)
        output = v1.while_loop(lambda y: tf.reduce_max(y) < 10.0, lambda y: y * 2.0 + 1.0, [output])
        v1.train.Saver(name="older")
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])
        v1.saved_model.simple_save(
            session, str(folder / "model"), {"text": text}, {"y": output}, legacy_init_op=v1.tables_initializer()
        )
    return folder / "model"


def packed(folder):
    """As TF Hub hands it out."""
    with tarfile.open(folder / "odd.tar.gz", "w:gz") as tar:
        tar.add(sound(folder, table=True), "./")
    return folder / "odd.tar.gz"


def packed_in_folder(folder):
    with tarfile.open(folder / "odd.tgz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.add(sound(folder), "mobilenet-" + "é" * 60)
    return folder / "odd.tgz"


KERNEL = np.arange(12, dtype="float32").reshape(3, 4)
STATE = OrderedDict(
    [
        ("fc.weight", Tensor(KERNEL, 0)),
        ("fc.transposed", Tensor(KERNEL, 0, shape=(4, 3), strides=(1, 4))),
        ("fc.bias", Tensor(KERNEL, 0, shape=(4,), strides=(1,), offset=8)),
        ("bn.num_batches_tracked", Tensor(np.array(7), 1)),
    ]
)
EMPTY = Tensor(np.zeros((0, 3), "float32"), 2)
CHECKPOINT = {
    "epoch": 3,
    "best": 0.75,
    "name": "löve",
    "state_dict": OrderedDict(a=Tensor(KERNEL.astype("float16"), 0), b=Tensor(np.ones(3, "uint8"), 1)),
    "shape": [(1, 2), None, True, -(2**40)],
}


def torch_file(write, state, name="odd.pth", **options):
    return lambda folder: write(folder / name, state, **options)


def safetensors(table, numbers):
    def write(folder):
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        (folder / "odd.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(numbers))
        return folder / "odd.safetensors"

    return write


X = tf.TensorSpec([None, 3], tf.float32)
S = tf.TensorSpec([None], tf.string)
SAVED_MODELS = {
    "sm_of_keras": exported(valid_keras.nested),
    "sm_of_keras_recurrent": exported(valid_keras.recurrent),
    "sm_of_keras_images": exported(valid_keras.images),
    "sm_of_keras_vocabulary": exported(valid_keras.vocabulary),
    "sm_of_keras_quantized": exported(valid_keras.quantized),
    "sm_of_keras_attention": exported(valid_keras.attention),
    "sm_words": saved(words, S, table=table),
    "sm_literal_words": saved(words, S, table=literal_table),
    "sm_mutable_table": saved(words, S, table=mutable_table),
    "sm_flow": saved(flow, X, weight=lambda folder: tf.Variable(2.0)),
    "sm_decoded": saved(decoded, S),
    "sm_examples": saved(examples, S),
    "sm_printed": saved(printed, X),
    "sm_spectral": saved(spectral, X),
    "sm_custom_gradient": saved(custom_gradient, X),
    "sm_trained": trained,
    "sm_of_tensorflow_1": of_tensorflow_1,
}
ARCHIVES = {"tar_hub": packed, "tar_in_folder": packed_in_folder}
TORCH = {
    "torch_old": torch_file(write_old, STATE),
    "torch_old_protocol_4": torch_file(write_old, STATE, protocol=4),
    "torch_old_checkpoint": torch_file(write_old, CHECKPOINT, "odd.bin"),
    "torch_new": torch_file(write_new, OrderedDict(STATE, empty=EMPTY), "odd.pt"),
    "torch_new_protocol_5": torch_file(write_new, STATE, protocol=5),
    "torch_new_checkpoint": torch_file(
        write_new, CHECKPOINT, "odd.bin", extra=[("archive/.data/serialization_id", "1")]
    ),
}
SAFETENSORS = {
    "safetensors": safetensors(
        {
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [48, 56]},
            "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
            "none": {"dtype": "I64", "shape": [0, 7], "data_offsets": [56, 56]},
            "scalar": {"dtype": "U8", "shape": [], "data_offsets": [56, 57]},
        },
        57,
    ),
    "safetensors_empty": safetensors({}, 0),
}
