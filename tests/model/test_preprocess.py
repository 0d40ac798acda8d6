import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tfxfer.model.preprocess import AdaptImage

SIZES = [
    (533, 400, 224),
    (2050, 3000, 96),
    (24, 24, 24),
    (96, 80, 32),
    (31, 50, 24),
    (17, 23, 40),
    (8, 64, 24),
    (200, 9, 33),
    (1, 1, 5),
    (300, 7, 64),
]


def noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def pillow(image: np.ndarray, size_px: int) -> np.ndarray:
    """Grey to RGB, alpha over white, bilinear: all by Pillow."""
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[image.shape[2]]
    opened = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image, mode)
    if "A" in mode:
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, (255, 255, 255, 255)), opened)
    wide = opened.convert("RGB").resize((size_px, image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(wide.resize((size_px, size_px), Image.Resampling.BILINEAR), np.float32)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("height", "width", "size_px"), SIZES)
def test_it_computes_what_pillow_computes(height, width, size_px, channels):
    image = noise(height, width, channels)
    ours = AdaptImage(size_px)(image[None]).numpy()
    assert ours.shape == (1, size_px, size_px, 3) and ours.dtype == np.float32
    off = np.abs(ours[0] - pillow(image, size_px))
    # Pillow lays alpha over white in fixed point, off by one now and then.
    assert off.max() <= (channels in (2, 4)) and (off > 0).mean() <= 0.02


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int32"])
def test_one_graph_takes_every_size_number_of_channels_and_value_type(dtype):
    layer = AdaptImage(20)

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, None), dtype)])
    def graph(images):
        return layer(images)

    for channels in (1, 2, 3, 4):
        for height, width in ((20, 20), (31, 12)):
            images = np.stack([noise(height, width, channels, seed) for seed in range(3)])
            np.testing.assert_allclose(graph(images.astype(dtype)), layer(images), atol=1e-3)
    assert graph.experimental_get_tracing_count() == 1


def test_pixels_of_the_right_size_pass_untouched():
    images = noise(16, 16, 3)[None]
    np.testing.assert_array_equal(AdaptImage(16)(images), images.astype(np.float32))


def test_grey_is_repeated_and_alpha_is_laid_over_white():
    grey = np.full((1, 2, 2, 1), 70, np.uint8)
    np.testing.assert_array_equal(AdaptImage(2)(grey), np.full((1, 2, 2, 3), 70.0))
    clear = np.array([10, 20, 30, 0], np.uint8).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(AdaptImage(1)(clear), np.full((1, 1, 1, 3), 255.0))
    half = np.array([10, 20, 30, 51], np.uint8).reshape(1, 1, 1, 4)  # a fifth
    np.testing.assert_allclose(AdaptImage(1)(half).numpy().ravel(), [206, 208, 210], rtol=1e-6)
    half_grey = np.array([100, 51], np.uint8).reshape(1, 1, 1, 2)
    np.testing.assert_allclose(AdaptImage(1)(half_grey).numpy().ravel(), [224] * 3, rtol=1e-6)


def test_images_of_one_batch_do_not_mix():
    images = np.stack([noise(30, 40, 3, seed) for seed in range(4)])
    together = AdaptImage(16)(images).numpy()
    for index in range(4):
        np.testing.assert_allclose(AdaptImage(16)(images[index : index + 1])[0], together[index], atol=1e-3)


def test_it_comes_back_from_a_keras_file(tmp_path):
    inputs = keras.Input((None, None, None), name="images", dtype="float32")
    model = keras.Model(inputs, AdaptImage(18, name="adapt_image")(inputs))
    assert model.output_shape == (None, 18, 18, 3)
    model.save(tmp_path / "adapt.keras")
    loaded = keras.models.load_model(tmp_path / "adapt.keras")
    assert loaded.get_layer("adapt_image").size_px == 18
    for channels in (1, 4):
        images = noise(25, 33, channels)[None].astype(np.float32)
        np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))


def test_it_has_no_training_mode_and_no_weights():
    layer = AdaptImage(9)
    images = noise(20, 11, 3)[None]
    np.testing.assert_array_equal(layer(images, training=True), layer(images, training=False))
    assert layer.weights == [] and layer.trainable is False


def test_a_float16_policy_does_not_coarsen_the_pixels():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layer = AdaptImage(16)
    finally:
        keras.config.set_dtype_policy("float32")
    image = noise(50, 61, 3)
    out = layer(image[None])
    assert out.dtype == tf.float32
    off = np.abs(out.numpy()[0] - pillow(image, 16))
    assert off.max() == 0
