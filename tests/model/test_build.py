import keras
import numpy as np
import pytest
from PIL import Image
from small_networks import SIZE_PX, around, moved, norm_backbone, norm_model, pictures, values

from tfxfer.errors import InputError
from tfxfer.model.build import build_model, build_original, preprocess
from tfxfer.model.freeze import freeze, unfreeze
from tfxfer.sources.catalog import get_source, load_backbone


def noise(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), np.uint8)


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def test_a_model_is_preprocessing_backbone_and_softmax_head():
    model = build_model("digits_cnn", ["cat", "dog", "cow"])
    assert (model.name, model.output_shape, model.input_shape) == ("digits_cnn", (None, 3), (None, None, None, None))
    images = noise(5, 32, 32)
    features = load_backbone("digits_cnn").predict(images / np.float32(255), verbose=0)
    kernel, bias = model.get_layer("logits").get_weights()
    found = model.predict(images, verbose=0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, softmax(features @ kernel + bias), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_a_card_s_scale_and_offset_are_applied_by_channel():
    card = get_source("mobilenet_v2_imagenet")
    inputs = keras.Input((None, None, None))
    model = keras.Model(inputs, preprocess(inputs, card, 40))
    images = noise(2, 40, 40)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # as torchvision has them
    np.testing.assert_allclose(model.predict(images, verbose=0), (images / 255 - mean) / deviation, atol=1e-5)


def test_images_of_every_size_and_kind_go_in():
    model = build_model("digits_cnn", 4)
    grey = noise(1, 50, 41, 1)
    shrunk = np.asarray(Image.fromarray(grey[0, ..., 0]).resize((32, 32), Image.Resampling.BILINEAR))
    expected = model.predict(np.repeat(shrunk[None, ..., None], 3, axis=-1), verbose=0)
    for images in (grey, grey.astype(np.float32), np.repeat(grey, 3, axis=-1)):
        np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=5e-3)
    opaque = np.concatenate([np.repeat(grey, 3, axis=-1), np.full_like(grey, 255)], axis=-1)
    np.testing.assert_allclose(model.predict(opaque, verbose=0), model.predict(grey, verbose=0), atol=1e-5)


def test_a_mere_call_is_inference_with_the_statistics_left_alone():
    """Keras' own Resizing leaks training mode into a BatchNorm behind it."""
    model = norm_model(dropout=0.5)
    images = pictures(6, size_px=16)
    for state in ("affine", "train", "frozen"):
        freeze(model, 0, batch_norm=state)
        before = values(model)
        called = model(images).numpy()
        assert moved(before, model) == set()
        np.testing.assert_allclose(called, model.predict(images, verbose=0), atol=1e-6)
        for index in range(6):
            np.testing.assert_allclose(model(images[index : index + 1])[0], called[index], atol=1e-5)


def test_training_mode_drops_out_but_holds_the_statistics():
    model = unfreeze(norm_model(dropout=0.5))
    images = pictures(6)
    before = values(model)
    one, other = model(images, training=True).numpy(), model(images, training=True).numpy()
    assert np.abs(one - other).max() > 1e-3
    assert moved(before, model) == set()


@pytest.mark.parametrize("logits", [False, True])
def test_a_model_comes_back_from_a_keras_file(logits, tmp_path):
    model = around(norm_backbone(), ["cat", "dog"], logits=logits)
    images = noise(3, 19, 30, 4)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))
    np.testing.assert_array_equal(loaded(images), model(images))


def test_logits_are_what_the_softmax_takes():
    backbone = norm_backbone()
    plain = around(backbone, 3, logits=True)
    model = around(backbone, 3)
    model.get_layer("logits").set_weights(plain.get_layer("logits").get_weights())
    images = pictures(4)
    np.testing.assert_allclose(softmax(plain.predict(images, verbose=0)), model.predict(images, verbose=0), atol=1e-6)


def test_the_image_size_is_the_source_s_unless_given():
    assert build_model("digits_cnn", 2, weights=False).get_layer("adapt_image").size_px == 32
    small = build_model("mobilenet_v2_imagenet", 2, image_size=32, weights=False)
    assert small.get_layer("adapt_image").size_px == 32
    assert small.predict(noise(1, 90, 50), verbose=0).shape == (1, 2)


def test_without_weights_the_network_is_random_and_repeats():
    one, two = (build_model("digits_cnn", 3, weights=False) for _ in range(2))
    real = build_model("digits_cnn", 3)
    kernel = [model.get_layer("digits_cnn").get_layer("conv2").kernel.numpy() for model in (one, two, real)]
    np.testing.assert_array_equal(kernel[0], kernel[1])
    assert np.abs(kernel[0] - kernel[2]).max() > 0.1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source": "mobilnet_v2"}, r"Unknown source 'mobilnet_v2'\. Did you mean 'mobilenet_v2_imagenet'"),
        ({"source": "mobilenet_v2_imagenet", "image_size": 31}, r"31 px are smaller than .* at least 32 px"),
        ({"source": "digits_cnn", "image_size": 64}, r"digits_cnn takes images of 32 px only, not of 64 px"),
        ({"head": 1}, r"at least two classes"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_what_cannot_be_built_is_refused(change, sentence):
    arguments = {"source": "digits_cnn", "head": 3, "weights": False} | change
    with pytest.raises(InputError, match=sentence):
        build_model(arguments.pop("source"), arguments.pop("head"), **arguments)


def test_a_backbone_of_no_fixed_size_asks_for_one():
    with pytest.raises(InputError, match=r"'digits_cnn' has no fixed input size; give image_size"):
        preprocess(keras.Input((None, None, None)), get_source("digits_cnn"), None)


def test_the_original_output_names_real_digits(digits):
    images, labels = digits
    model = build_original("digits_cnn")
    assert model.output_shape == (None, 10)
    found = model.predict(images[:300], verbose=0)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    accuracy = (found.argmax(1) == labels[:300]).mean()
    assert accuracy > 0.6  # trained on MNIST, asked about other people's digits in 8 by 8 pixels
    backbone = load_backbone("digits_cnn", include_top=True)
    np.testing.assert_allclose(found, softmax(backbone.predict(images[:300] / np.float32(255), verbose=0)), atol=1e-5)


def test_the_head_of_a_dataset_has_its_classes(digits_folder):
    from tfxfer.data import load_data

    model = build_model("digits_cnn", load_data(digits_folder), weights=False)
    assert model.output_shape == (None, 10)
    assert model.get_layer("adapt_image").size_px == 32 != SIZE_PX
