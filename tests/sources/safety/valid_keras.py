"""Odd but sound Keras files: each builder writes one and returns its path; all of them load afterwards."""

import zipfile

import h5py
import keras
import numpy as np
from keras import layers, ops

from tfxfer.model.preprocess import AdaptImage


def sequential(*stack, shape=(4,), **options):
    return keras.Sequential([keras.Input(shape, **options), *stack])


def archived(build, name="odd.keras"):
    """A builder that lets Keras save the model of `build`."""

    def write(folder):
        build().save(folder / name)
        return folder / name

    return write


def operators():
    x = keras.Input((4, 4, 3))
    y = ops.relu(layers.Conv2D(3, 1)(x)) + x * 2.0 - ops.mean(x, axis=(1, 2), keepdims=True)
    z = ops.concatenate([y[:, ::2, 1:], -y[:, 1::2, :3]], axis=-1)
    return keras.Model(x, ops.reshape(ops.where(z > 0.0, z, ops.exp(z)), (-1, 2 * 3 * 6)))


def nested():
    inner = sequential(sequential(layers.Dense(3), layers.BatchNormalization()), shape=(4,))
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(2)(inner(x)))


def shared():
    first, second = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    dense = layers.Dense(3, name="twice")
    tower = sequential(layers.Dense(3), layers.LayerNormalization())
    return keras.Model(
        {"a": first, "b": second},
        {"out": layers.Dot(1)([tower(first), tower(second)]), "raw": dense(dense(layers.Dense(3)(first)))},
    )


def mixed_policy():
    return sequential(
        layers.Conv2D(2, 3, dtype="mixed_float16"),
        layers.BatchNormalization(dtype=keras.DTypePolicy("mixed_bfloat16")),
        layers.Flatten(dtype="float16"),
        layers.Dense(2, dtype="float32"),
        shape=(8, 8, 3),
    )


def half_policy():
    return sequential(layers.Dense(3, dtype="mixed_float16"), layers.Dense(2, dtype="float16"))


def bfloat16_weights():
    return sequential(layers.Dense(3, dtype="bfloat16"), layers.Dense(2))


def policy_map():
    policies = keras.dtype_policies.DTypePolicyMap(policy_map={"dense_in_it": keras.DTypePolicy("float32")})
    return sequential(layers.Dense(3, dtype=policies))


def recurrent():
    cells = layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(2)])
    return sequential(
        layers.TimeDistributed(layers.Dense(4, activation="tanh")),
        layers.Bidirectional(layers.LSTM(3, return_sequences=True), merge_mode="sum"),
        layers.Bidirectional(
            layers.GRU(2, return_sequences=True),
            backward_layer=layers.LSTM(2, return_sequences=True, go_backwards=True),
        ),
        layers.RNN(cells),
        shape=(5, 4),
    )


def convolutional():
    return sequential(
        layers.ZeroPadding2D(1),
        layers.Conv2D(4, 3, padding="same", groups=2),
        layers.DepthwiseConv2D(3, depth_multiplier=2),
        layers.SeparableConv2D(4, 3),
        layers.Conv2DTranspose(2, 2, strides=2),
        layers.PReLU(shared_axes=[1, 2]),
        layers.GroupNormalization(2),
        layers.UpSampling2D(interpolation="bilinear"),
        layers.Cropping2D(1),
        layers.SpatialDropout2D(0.2),
        layers.GlobalAveragePooling2D(keepdims=True),
        layers.Reshape((2,)),
        layers.Permute((1,)),
        shape=(12, 12, 4),
    )


def images():
    normal = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0])
    return sequential(
        layers.Resizing(8, 8),
        layers.Rescaling([1 / 255, 1 / 128, 1.0], offset=[0.0, -1.0, 0.5]),
        normal,
        layers.RandomFlip(seed=3),
        layers.RandomRotation(0.1),
        layers.RandomContrast(0.1),
        layers.Pipeline([layers.RandomZoom(0.1), layers.CenterCrop(6, 6)]),
        layers.Flatten(),
        shape=(None, None, 3),
    )


def vocabulary():
    text = keras.Input((1,), dtype="string")
    words = layers.TextVectorization(vocabulary=["red", "green", "päron"], output_sequence_length=4)
    return keras.Model(text, layers.GlobalMaxPooling1D()(layers.Embedding(6, 3, mask_zero=True)(words(text))))


def lookup():
    text = keras.Input((1,), dtype="string")
    index = layers.StringLookup(vocabulary=["a", "b"], num_oov_indices=2)(text)
    return keras.Model(text, layers.CategoryEncoding(5, output_mode="multi_hot")(index))


def adapted():
    words = layers.StringLookup()
    words.adapt(np.array(["a", "b", "b"]))
    return keras.Sequential([keras.Input((1,), dtype="string"), words])


def attention():
    x = keras.Input((5, 4))
    y = layers.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True)
    y = layers.LayerNormalization()(layers.Add()([x, y]))
    y = layers.EinsumDense("abc,cd->abd", output_shape=(None, 4), bias_axes="d")(y)
    return keras.Model(x, layers.Attention()([y, x]))


def compiled():
    model = shared()
    rate = keras.optimizers.schedules.CosineDecay(1e-3, 10, warmup_target=1e-2, warmup_steps=2)
    model.compile(
        keras.optimizers.AdamW(rate, clipnorm=1.0),
        loss={"out": keras.losses.Huber(0.5), "raw": "mse"},
        loss_weights={"out": 1.0, "raw": 0.1},
        metrics={"out": ["mae", keras.metrics.RootMeanSquaredError(name="root")], "raw": [keras.metrics.R2Score()]},
        weighted_metrics={"out": ["mape"], "raw": []},
    )
    return model


def outputs_named_like_keys():
    """Outputs called as the keys of a config are."""
    x = keras.Input((4,), name="loss")
    model = keras.Model(
        x, {"activation": layers.Dense(2, name="activation")(x), "metrics": layers.Dense(1, name="metrics")(x)}
    )
    model.compile("sgd", {"activation": "mse", "metrics": "mae"})
    return model


def fitted():
    model = sequential(layers.Dense(3, activation="softmax"))
    model.compile(
        "rmsprop",
        keras.losses.SparseCategoricalCrossentropy(),
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)],
    )
    model.fit(np.ones((4, 4), "float32"), np.zeros(4), verbose=0)
    return model


def regularized():
    return sequential(
        layers.Dense(
            3,
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.01, seed=1),
            bias_initializer=keras.initializers.Constant(0.1),
            kernel_regularizer=keras.regularizers.L1L2(1e-4, 1e-3),
            activity_regularizer="l2",
            kernel_constraint=keras.constraints.MaxNorm(2.0),
            bias_constraint="non_neg",
        ),
        layers.SpectralNormalization(layers.Dense(4, kernel_regularizer=keras.regularizers.OrthogonalRegularizer())),
        layers.ActivityRegularization(l1=0.1),
        layers.GaussianNoise(0.1),
    )


def activations():
    names = (
        "relu",
        "relu6",
        "gelu",
        "silu",
        "swish",
        "elu",
        "selu",
        "mish",
        "celu",
        "softplus",
        "tanh",
        "hard_sigmoid",
        "linear",
    )
    functions = [keras.activations.leaky_relu, keras.ops.softmax, keras.layers.ReLU(6.0), keras.layers.LeakyReLU()]
    return sequential(*(layers.Dense(4, activation=name) for name in [*names, *functions]))


def quantized():
    model = sequential(layers.Dense(4), layers.Dense(2))
    model.quantize("int8")
    return model


def adapt_image():
    return sequential(AdaptImage(8), layers.Flatten(), shape=(None, None, None))


def constant_arguments():
    x = keras.Input((4,))
    return keras.Model(x, ops.matmul(x, np.ones((4, 2), "float32")) + keras.ops.convert_to_tensor([1.0, 2.0]))


def empty():
    return sequential(layers.Flatten())


def recompressed(folder):
    """As a user who unzipped and zipped it again leaves it, with a note of his own."""
    fitted().save(folder / "plain.keras")
    with (
        zipfile.ZipFile(folder / "plain.keras") as old,
        zipfile.ZipFile(folder / "odd.keras", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("assets/", b"")
        new.writestr("README.md", "mine")
    return folder / "odd.keras"


def weights_file(folder):
    fitted().save_weights(folder / "odd.weights.h5")
    return folder / "odd.weights.h5"


def compressed_weights(folder):
    """Rewritten with gzip and checksums, as h5repack does; mostly zeros."""
    with h5py.File(folder / "odd.weights.h5", "w") as file:
        for number, dtype in enumerate(("float32", "float16", "float64", "int8", "bool")):
            file.create_dataset(
                f"layers/dense_{number}/vars/0",
                data=np.zeros((64, 64), dtype),
                compression="gzip",
                shuffle=True,
                fletcher32=True,
            )
        file["layers/again"] = file["layers/dense_0"]
        file["layers/dense_0/round"] = file["layers"]
        file["layers/scalar"] = np.float32(3)
        file.create_dataset("layers/none", (0, 4), "float32")
    return folder / "odd.weights.h5"


KERAS = {
    "keras_operators": archived(operators),
    "keras_nested": archived(nested),
    "keras_shared": archived(shared),
    "keras_mixed_policy": archived(mixed_policy),
    "keras_bfloat16": archived(bfloat16_weights),
    "keras_policy_map": archived(policy_map),
    "keras_recurrent": archived(recurrent),
    "keras_convolutional": archived(convolutional),
    "keras_images": archived(images),
    "keras_vocabulary": archived(vocabulary),
    "keras_lookup": archived(lookup),
    "keras_adapted": archived(adapted),
    "keras_attention": archived(attention),
    "keras_compiled": archived(compiled),
    "keras_outputs_named_like_keys": archived(outputs_named_like_keys),
    "keras_fitted": archived(fitted),
    "keras_regularized": archived(regularized),
    "keras_activations": archived(activations),
    "keras_quantized": archived(quantized),
    "keras_adapt_image": archived(adapt_image),
    "keras_constant_arguments": archived(constant_arguments),
    "keras_without_weights": archived(empty),
    "keras_recompressed": recompressed,
    "h5_of_keras_3": archived(fitted, "odd.h5"),
    "h5_of_keras_3_recurrent": archived(recurrent, "odd.h5"),
    "h5_of_keras_3_policy": archived(half_policy, "odd.h5"),
    "h5_of_keras_3_compiled": archived(regularized, "odd.hdf5"),
}
WEIGHTS = {"weights_fitted": weights_file, "weights_compressed": compressed_weights}
