"""What the Keras peers share: data, base, model, the cut. Of tfxfer only the converted ImageNet weights are taken."""

from pathlib import Path

import keras
import tensorflow as tf
from keras import layers

import tfxfer

SOURCE = "mobilenet_v2_imagenet"
BATCH_SIZE = 32
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_part(folder: Path, size_px: int, seed: int | None = None) -> tf.data.Dataset:
    """Batches of images and class numbers, shuffled where there is a seed; has `class_names` and `file_paths`."""
    return keras.utils.image_dataset_from_directory(
        folder, image_size=(size_px,) * 2, batch_size=BATCH_SIZE, shuffle=seed is not None, seed=seed, verbose=False
    )


def load_base(size_px: int) -> keras.Model:
    """MobileNetV2 up to its last feature map, for normalised pixels."""
    backbone = tfxfer.load_backbone(SOURCE, image_size=size_px)
    return keras.Model(backbone.input, backbone.get_layer("top_relu").output, name="base")


def normalisation() -> layers.Layer:
    """Of ImageNet, for pixels in 0..255."""
    scale = [1 / 255 / deviation for deviation in DEVIATION]
    return layers.Rescaling(scale, [-mean / deviation for mean, deviation in zip(MEAN, DEVIATION, strict=True)])


def build(base: keras.Model, augmentation: list[layers.Layer], num_classes: int, dropout: float = 0.2) -> keras.Model:
    """Augmentation, normalisation, base, pooling, dropout, softmax."""
    inputs = keras.Input(base.input_shape[1:])
    x = inputs
    for layer in augmentation:
        x = layer(x)
    x = base(normalisation()(x), training=False)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(dropout)(x)
    return keras.Model(inputs, layers.Dense(num_classes, activation="softmax")(x))


def unfreeze(base: keras.Model, share: float, *, batch_norm: bool = False) -> None:
    """Make the last `share` of the layers trainable; BatchNorm among them only where `batch_norm` says so."""
    base.trainable = True
    first = round(len(base.layers) * (1 - share))
    for index, layer in enumerate(base.layers):
        still = isinstance(layer, layers.BatchNormalization) and not batch_norm
        layer.trainable = index >= first and not still


class Cut(keras.callbacks.Callback):
    """Stops training when the clock is over."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_batch_end(self, batch, logs=None):
        if self.clock.over():
            self.model.stop_training = True


def predict_test(model_file: Path, folder: Path, size_px: int) -> tuple[list[str], list[str], object]:
    """Paths, class names and probabilities of a saved model."""
    test = read_part(folder, size_px)
    paths = [Path(path).relative_to(folder).as_posix() for path in test.file_paths]
    return paths, test.class_names, keras.models.load_model(model_file).predict(test, verbose=0)
