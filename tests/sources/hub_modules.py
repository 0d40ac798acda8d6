"""Tiny SavedModels of every kind that TF Hub and `model.export` make, with BatchNorm far from any batch."""

import tarfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

SIZE_PX = 16


def network(size_px: int | None = None, *, pool: bool = True, seed: int = 0) -> keras.Model:
    """Stem and two blocks with BatchNorm whose gamma, beta and statistics are all their own."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((size_px, size_px, 3))
    random = np.random.default_rng(seed)
    for name, width in (("stem", 4), ("block_1", 6), ("block_2", 5)):
        x = keras.layers.Conv2D(width, 3, strides=2, padding="same", use_bias=False, name=f"{name}_conv")(x)
        norm = keras.layers.BatchNormalization(name=f"{name}_bn")
        x = norm(x)
        norm.set_weights(
            [random.uniform(0.5, 1.5, width), random.normal(0, 0.5, width), random.normal(0, 0.7, width),
             random.uniform(0.3, 3, width)]
        )  # fmt: skip
        x = keras.layers.ReLU(name=f"{name}_relu")(x)
    if pool:
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, x, name="small")


class Module(tf.Module):
    """As TF Hub publishes them: __call__(images, training)."""

    def __init__(self, net: keras.Model, outputs=lambda features: features):
        super().__init__()
        self.held = [variable.value for variable in net.variables]
        self.scale = tf.constant([1.5, 1.0, 0.5])  # captured tensors, one small, one large
        self.shift = tf.constant(np.random.default_rng(1).normal(0, 0.1, (16, 16, 1)), tf.float32)
        self._net, self._outputs = net, outputs

    @tf.function
    def __call__(self, images, training=False):
        images = images * self.scale + tf.reduce_mean(self.shift)
        return self._outputs(self._net(images, training=training))


class Plain(tf.Module):
    """__call__(images), variables without names, a normalisation by hand."""

    def __init__(self):
        super().__init__()
        random = np.random.default_rng(3)
        self.weights = [
            tf.Variable(random.normal(0, 0.5, shape).astype("float32"))
            for shape in ((3, 3, 3, 4), (4,), (3, 3, 4, 6), (6,))
        ]

    @tf.function(input_signature=[tf.TensorSpec((None, SIZE_PX, SIZE_PX, 3), tf.float32, name="images")])
    def __call__(self, images):
        first, shift, second, offset = self.weights
        x = tf.nn.relu(tf.nn.conv2d(images, first, 2, "SAME") + shift)
        return {"features": tf.nn.relu(tf.nn.conv2d(x, second, 2, "SAME") + offset), "other": tf.shape(x)}


class WithTable(Module):
    """A table with its file in assets/ scales the features."""

    def __init__(self, net: keras.Model, file: Path):
        super().__init__(net)
        kinds = (tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER)
        self.table = tf.lookup.StaticHashTable(tf.lookup.TextFileInitializer(str(file), *kinds), -1)

    @tf.function
    def __call__(self, images, training=False):
        scale = tf.cast(self.table.lookup(tf.constant(["c"])), tf.float32)
        return self._net(images, training=training) * scale


class WithTrain(Module):
    """A function called `train` of the user's own, and a variable that it alone captures.

    Args:
        net: Of the module.
        train: (net, steps) to the function.
        given: Specs of what it takes.
        named: The same of what it takes by name.
    """

    def __init__(self, net: keras.Model, train, *given: tf.TensorSpec, **named: tf.TensorSpec):
        super().__init__(net)
        self.steps = tf.Variable(0.0, trainable=False, name="steps")
        self.train = tf.function(train(net, self.steps))
        self.train.get_concrete_function(*given, **named)


def images_spec(size_px: int | None = None) -> tf.TensorSpec:
    return tf.TensorSpec((None, size_px, size_px, 3), tf.float32, name="images")


def save_module(folder: Path, module: Module | None = None, *, size_px: int | None = None) -> Path:
    """A module with __call__ traced with training=True and False."""
    module = module or Module(network())
    for training in (True, False):
        module.__call__.get_concrete_function(images_spec(size_px), training=training)
    tf.saved_model.save(module, str(folder))
    return folder


def save_plain(folder: Path) -> Path:
    tf.saved_model.save(Plain(), str(folder))
    return folder


def save_signature_only(folder: Path, outputs=lambda features: {"pooled": features}) -> Path:
    net = network()
    module = tf.Module()
    module.held = [variable.value for variable in net.variables]
    module.scale = tf.constant([1.5, 1.0, 0.5])
    serve = tf.function(
        lambda images: outputs(net(images * module.scale, training=False)), input_signature=[images_spec(SIZE_PX)]
    )
    tf.saved_model.save(module, str(folder), signatures=serve)
    return folder


def save_export(folder: Path) -> Path:
    """What `model.export` writes."""
    network().export(folder, verbose=False)
    return folder


def save_two_endpoints(folder: Path) -> Path:
    """An ExportArchive with an endpoint of its own for training."""
    net = network()
    archive = keras.export.ExportArchive()
    archive.track(net)
    spec = [keras.InputSpec(shape=(None, SIZE_PX, SIZE_PX, 3), dtype="float32")]
    archive.add_endpoint("call_inference", lambda x: net(x, training=False), spec)
    archive.add_endpoint("call_training", lambda x: net(x, training=True), spec)
    archive.write_out(folder, verbose=False)
    return folder


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, arcname=".")
    return archive


def pictures(count: int, seed: int = 0, size_px: int = SIZE_PX) -> np.ndarray:
    """(count, size_px, size_px, 3) uint8, all different."""
    return np.random.default_rng(seed).integers(0, 256, (count, size_px, size_px, 3), np.uint8)
