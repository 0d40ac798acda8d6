"""Whole models in files, of Keras 2 and 3, and runs of ours: what comes out is the old network without its output."""

import dataclasses
import json
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
import tf_keras
from keras import layers
from keras_networks import backbone, flat, nested, normalised, photos, with_values

import tfxfer
from tfxfer.errors import InputError
from tfxfer.model.build import build_original
from tfxfer.sources.catalog import get_source, load_backbone, load_with_report
from tfxfer.sources.ranges import RANGES


def features(card, images, **options):
    return load_backbone(card, **options).predict(normalised(card, images), verbose=0)


@pytest.fixture(scope="module")
def nested_file(tmp_path_factory):
    model = with_values(nested())
    path = tmp_path_factory.mktemp("nested") / "nested.keras"
    model.save(path)
    return model, path


# A .keras file of Keras 2 names modules of tf_keras, which the gate does not let through.
@pytest.mark.parametrize(
    ("library", "suffix"), [(keras, ".h5"), (keras, ".keras"), (tf_keras, ".h5")], ids=["h5", "keras", "keras_2_h5"]
)
def test_a_nested_backbone_gives_the_features_and_probabilities_of_the_old_model(tmp_path, library, suffix):
    model = with_values(nested(library))
    path = tmp_path / f"old{suffix}"
    model.save(path)
    card = get_source(str(path))
    assert (card.image_size_px, card.num_classes, card.fixed_size, card.channel_order) == (32, 4, False, "rgb")
    assert card.scale == (1 / 127.5,) * 3 and card.offset == (-1.0,) * 3 and len(card.weights["sha256"]) == 64
    images = photos()
    pooled = library.Model(model.input, model.get_layer("pooling").output).predict(images, verbose=0)
    np.testing.assert_allclose(features(card, images), pooled, atol=1e-5)
    expected = model.predict(images, verbose=0)
    np.testing.assert_allclose(build_original(card).predict(images, verbose=0), expected, atol=1e-6)
    if library is keras and suffix == ".keras":
        loaded = keras.models.load_model(path).predict(images, verbose=0)
        np.testing.assert_allclose(build_original(card).predict(images, verbose=0), loaded, atol=1e-6)


def test_the_backbone_is_flat_has_blocks_and_freezes_by_them(nested_file):
    _, path = nested_file
    model, report = load_with_report(str(path))
    assert report.complete and report.names("unused") == ("out",) and report.loaded_share == 1.0
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)
    assert not any("augment" in layer.name or "rescale" in layer.name for layer in model.layers)
    names = [block.name for block in tfxfer.list_blocks(model)]
    assert names == ["stem_conv", "block_1", "block_2"]
    tfxfer.freeze(model, "block_1")
    assert {v.path.split("/")[0] for v in model.trainable_variables} == {"block_2_conv", "block_2_bn"}


def test_the_card_is_read_without_tensorflow(nested_file, tmp_path):
    model, path = nested_file
    model.save(tmp_path / "same.h5")
    code = "import sys; from tfxfer.sources.catalog import get_source\n"
    code += f"for path in ({str(path)!r}, {str(tmp_path / 'same.h5')!r}): print(get_source(path).num_classes)\n"
    code += "print(sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["4", "4", "[]"]


def test_another_image_size(nested_file):
    model, path = nested_file
    card = get_source(str(path))
    larger = nested(size_px=64)
    larger.set_weights(model.get_weights())
    images = photos(size_px=64)
    pooled = keras.Model(larger.input, larger.get_layer("pooling").output).predict(images, verbose=0)
    np.testing.assert_allclose(features(card, images, image_size=64), pooled, atol=1e-5)
    with pytest.raises(InputError, match=r"Images of 31 px are smaller than"):
        load_backbone(card, image_size=31)


def test_a_flattened_network_has_one_size(tmp_path):
    stack = [
        keras.Input((32, 32, 3)),
        layers.Rescaling(1 / 255),
        layers.Conv2D(2, 3),
        layers.Flatten(),
        layers.Dense(5),
    ]
    model = with_values(keras.Sequential(stack))
    model.save(tmp_path / "fixed.keras")
    card = get_source(str(tmp_path / "fixed.keras"))
    assert card.fixed_size and card.min_image_size_px == 32
    with pytest.raises(InputError, match=r"takes images of 32 px only"):
        load_backbone(card, image_size=64)
    images = photos()
    expected = keras.Model(model.inputs, model.layers[-2].output).predict(images, verbose=0)
    np.testing.assert_allclose(features(card, images), expected, rtol=1e-5, atol=1e-4)


def test_the_range_of_pixels_must_be_known(tmp_path):
    model = with_values(flat())
    model.save(tmp_path / "bare.h5")
    path = str(tmp_path / "bare.h5")
    with pytest.raises(InputError, match=r"give --input-range as it was trained, one of 0\.\.255, 0\.\.1") as caught:
        get_source(path)
    assert all(name in str(caught.value) for name in RANGES)
    with pytest.raises(InputError, match=r"Unknown input range '0-1'"):
        get_source(path, input_range="0-1")
    images = photos(size_px=16)
    bare = keras.models.load_model(path, compile=False)
    for name, told in {"0..1": images / 255, "-1..1": images / 127.5 - 1, "0..255": images}.items():
        card = get_source(path, input_range=name)
        expected = keras.activations.softmax(bare(told)).numpy()
        np.testing.assert_allclose(build_original(card).predict(images, verbose=0), expected, atol=1e-4)
    caffe = keras.applications.resnet50.preprocess_input(images.copy())
    np.testing.assert_allclose(
        build_original(get_source(path, input_range="caffe")).predict(images, verbose=0),
        keras.activations.softmax(bare(caffe)).numpy(), atol=1e-4,
    )  # fmt: skip


def test_a_range_that_contradicts_the_file_is_refused(nested_file):
    _, path = nested_file
    with pytest.raises(InputError, match=r"rescales pixels inside.*scaled twice: drop --input-range"):
        get_source(str(path), input_range="0..1")
    assert get_source(str(path), input_range="0..255") == get_source(str(path))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_leading_normalization_becomes_scale_and_offset(tmp_path, suffix):
    """Of EfficientNet's make: Rescaling, then Normalization with learned statistics, then Rescaling again."""
    inputs = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Normalization(name="statistics")(x)
    x = layers.Rescaling([1.0, 2.0, 0.5])(x)
    x = layers.GlobalAveragePooling2D()(backbone()(x))
    model = with_values(keras.Model(inputs, layers.Dense(3)(x)))
    model.get_layer("statistics").set_weights([np.array([0.4, 0.5, 0.6]), np.array([0.04, 0.09, 0.16]), np.array(7)])
    model.save(tmp_path / f"effnet{suffix}")
    model = keras.models.load_model(tmp_path / f"effnet{suffix}", compile=False)  # finalises the statistics
    card = get_source(str(tmp_path / f"effnet{suffix}"))
    np.testing.assert_allclose(card.scale, np.array([1, 2, 0.5]) / 255 / [0.2, 0.3, 0.4], rtol=1e-5)
    ours = build_original(card)
    assert not any(isinstance(layer, layers.Normalization) for layer in ours._flatten_layers())
    expected = keras.activations.softmax(model.predict(photos(), verbose=0)).numpy()
    np.testing.assert_allclose(ours.predict(photos(), verbose=0), expected, atol=1e-5)


def test_statistics_of_a_0_to_1_range_are_not_taken_for_pixels(tmp_path):
    stack = [keras.Input((16, 16, 3)), layers.Normalization(mean=[0.5] * 3, variance=[0.06] * 3)]
    model = keras.Sequential([*stack, layers.Conv2D(2, 3, name="c"), layers.GlobalAveragePooling2D()])
    model.save(tmp_path / "m.keras")
    with pytest.raises(InputError, match=r"give --input-range"):
        get_source(str(tmp_path / "m.keras"))
    card = get_source(str(tmp_path / "m.keras"), input_range="0..1")
    images = photos(size_px=16)
    np.testing.assert_allclose(features(card, images), model.predict(images / 255, verbose=0), atol=1e-4)


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras_3", "keras_2"])
def test_preprocess_input_in_the_graph_is_understood(tmp_path, library):
    """Operations on tensors, which Keras 3 cannot load from an .h5 at all."""
    inputs = library.Input((32, 32, 3))
    x = library.applications.mobilenet_v2.preprocess_input(inputs)
    x = library.layers.GlobalAveragePooling2D()(backbone(library)(x))
    model = with_values(library.Model(inputs, library.layers.Dense(3, activation="softmax")(x)))
    model.save(tmp_path / "ops.h5")
    ours = build_original(str(tmp_path / "ops.h5"))
    np.testing.assert_allclose(ours.predict(photos(), verbose=0), model.predict(photos(), verbose=0), atol=1e-6)


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras_3", "keras_2"])
def test_skips_written_as_sums_and_a_layer_used_twice(tmp_path, library):
    inputs = library.Input((16, 16, 3))
    shared = library.layers.Conv2D(3, 3, padding="same", name="shared")
    x = shared(library.layers.Rescaling(1 / 255)(inputs))
    x = shared(x) + x
    x = library.layers.Conv2D(4, 1, activation="relu", name="last")(x)
    model = with_values(library.Model(inputs, library.layers.Dense(2)(library.layers.Flatten()(x))))
    model.save(tmp_path / "sums.h5")
    ours = build_original(str(tmp_path / "sums.h5"))
    expected = np.array(keras.activations.softmax(model.predict(photos(size_px=16), verbose=0)))
    np.testing.assert_allclose(ours.predict(photos(size_px=16), verbose=0), expected, atol=1e-5)


def test_a_sequential_with_a_sequential_inside_and_twice_the_same_name(tmp_path):
    first = keras.Sequential([keras.Input((32, 32, 3)), layers.Conv2D(4, 3, name="conv")], name="first")
    second = keras.Sequential([keras.Input((30, 30, 4)), layers.Conv2D(4, 3, name="conv")], name="second")
    stack = [keras.Input((32, 32, 3)), layers.Rescaling(1 / 255), first, second, layers.GlobalAveragePooling2D()]
    model = with_values(keras.Sequential([*stack, layers.Dense(6), layers.Softmax()]))
    for name in ("twice.keras", "twice.h5"):
        model.save(tmp_path / name)
        network, report = load_with_report(str(tmp_path / name))
        assert report.names("matched") == ("first/conv", "second/conv")
        assert [layer.name for layer in network.layers[1:3]] == ["conv", "second_conv"]
        ours = build_original(str(tmp_path / name)).predict(photos(), verbose=0)
        np.testing.assert_allclose(ours, model.predict(photos(), verbose=0), atol=1e-6)


def test_a_hidden_dense_stays_and_a_model_without_classifier_is_all_backbone(tmp_path):
    stack = [keras.Input((16, 16, 3)), layers.Rescaling(1 / 255), layers.Conv2D(4, 3), layers.GlobalMaxPooling2D()]
    model = with_values(keras.Sequential([*stack, layers.Dense(7, activation="relu")]))
    model.save(tmp_path / "hidden.keras")
    card = get_source(str(tmp_path / "hidden.keras"))
    assert card.num_classes == 0
    images = photos(size_px=16)
    np.testing.assert_allclose(features(card, images), model.predict(images, verbose=0), atol=1e-4)
    with pytest.raises(InputError, match=r"has no classifier at its end"):
        load_backbone(card, include_top=True)


def test_a_convolution_as_classifier_is_stripped_too(tmp_path):
    """MobileNet of Keras: pooled to 1 x 1, a 1 x 1 convolution, a reshape, softmax."""
    x = inputs = keras.Input((32, 32, 3))
    x = layers.GlobalAveragePooling2D(keepdims=True)(backbone()(layers.Rescaling(1 / 255)(x)))
    x = layers.Conv2D(5, 1, name="predictions")(layers.Dropout(0.1)(x))
    model = with_values(keras.Model(inputs, layers.Activation("softmax")(layers.Reshape((5,))(x))))
    model.save(tmp_path / "mobilenet.h5")
    card = get_source(str(tmp_path / "mobilenet.h5"))
    assert card.num_classes == 5 and load_backbone(card).output_shape == (None, 12)
    ours = build_original(card).predict(photos(), verbose=0)
    np.testing.assert_allclose(ours, model.predict(photos(), verbose=0), atol=1e-6)


def test_one_changed_byte_is_refused(nested_file, tmp_path):
    _, path = nested_file
    copy = tmp_path / "copy.keras"
    copy.write_bytes(path.read_bytes())
    card = get_source(str(copy))
    content = bytearray(copy.read_bytes())
    content[-30] ^= 1
    copy.write_bytes(content)
    with pytest.raises(InputError, match=rf"copy.keras has SHA-256 \w+, but {card.weights['sha256']} was recorded"):
        load_backbone(card)
    copy.unlink()
    with pytest.raises(InputError, match=r"There is no file .* any more"):
        load_backbone(card)
    with pytest.raises(InputError, match=r"There is no file .*copy.keras"):
        get_source(str(copy))


def test_weights_alone_are_refused_with_the_way_to_use_them(tmp_path):
    model = with_values(flat(library=tf_keras))
    model.save_weights(tmp_path / "old.h5")
    with_values(flat()).save_weights(tmp_path / "new.weights.h5")
    for name in ("old.h5", "new.weights.h5"):
        with pytest.raises(InputError, match=r"holds weights only.*--source py:MODULE:FUNCTION --weights .*" + name):
            get_source(str(tmp_path / name))


def test_other_weights_for_the_network_of_a_file(nested_file, tmp_path):
    _, path = nested_file
    other = with_values(nested(num_classes=9), seed=5)
    other.save_weights(tmp_path / "other.weights.h5")
    card = get_source(str(path), weights=tmp_path / "other.weights.h5")
    assert card.weights["file"].endswith("other.weights.h5") and card.weights["network_file"] == str(path)
    pooled = keras.Model(other.input, other.get_layer("pooling").output).predict(photos(), verbose=0)
    np.testing.assert_allclose(features(card, photos()), pooled, atol=1e-5)
    with pytest.raises(InputError, match=r"out.*give --partial|give --partial(?s:.)*out"):
        load_backbone(card, include_top=True)  # nine classes there, four here


def test_a_grey_network_is_inflated_only_in_part(tmp_path):
    model = with_values(keras.Sequential([keras.Input((16, 16, 1)), *flat(channels=1).layers]))
    model.build((None, 16, 16, 1))
    model.save(tmp_path / "grey.h5")
    path = str(tmp_path / "grey.h5")
    with pytest.raises(InputError, match=r"(?s)give --partial.*a_conv"):
        load_backbone(get_source(path, input_range="0..1"))
    card = get_source(path, input_range="0..1", partial=True)
    network, report = load_with_report(card, include_top=True)
    assert report.layers[0].detail == "1 input channels made 3"
    grey = photos(size_px=16, channels=1)
    expected = model.predict(grey / 255, verbose=0)
    np.testing.assert_allclose(
        network.predict(normalised(card, np.repeat(grey, 3, -1)), verbose=0), expected, rtol=1e-4, atol=1e-3
    )


MODULE = """
import keras

@keras.saving.register_keras_serializable(package="{name}")
class Doubled(keras.layers.Layer):
    def call(self, x):
        return 2 * x
"""


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_the_users_own_classes_need_trust(tmp_path, monkeypatch, suffix):
    name = f"own_layers_{suffix[1:]}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__(name)
    stack = [keras.Input((16, 16, 3)), layers.Rescaling(1 / 255), layers.Conv2D(3, 3), module.Doubled()]
    model = with_values(keras.Sequential([*stack, layers.GlobalAveragePooling2D()]))
    model.save(tmp_path / f"custom{suffix}")
    path = str(tmp_path / f"custom{suffix}")
    with pytest.raises(InputError, match=r"Doubled.*--trust-custom-objects"):
        get_source(path)
    with pytest.raises(InputError, match=r"The module 'no_such' of --trust-custom-objects cannot be imported"):
        get_source(path, trusted=["no_such"])
    card = get_source(path, trusted=[name])
    images = photos(size_px=16)
    np.testing.assert_allclose(features(card, images), model.predict(images, verbose=0), atol=1e-5)


def test_lambda_is_refused_whatever_is_trusted(tmp_path):
    model = keras.Sequential([keras.Input((16, 16, 3)), layers.Lambda(lambda x: x * 2), layers.Flatten()])
    model.save(tmp_path / "lambda.keras")
    with pytest.raises(InputError, match=r"Lambda"):
        get_source(str(tmp_path / "lambda.keras"), trusted=["test_keras_file"])


def test_models_that_are_no_backbone_are_refused(tmp_path):
    one, two = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    keras.Model([one, two], layers.Add()([one, two])).save(tmp_path / "two.keras")
    with pytest.raises(InputError, match=r"two.keras: the model has 2 inputs; a backbone has one"):
        get_source(str(tmp_path / "two.keras"))
    keras.Sequential([keras.Input((8,)), layers.Dense(2)]).save(tmp_path / "table.keras")
    with pytest.raises(InputError, match=r"does not take images \(N, H, W, C\)"):
        get_source(str(tmp_path / "table.keras"))


def test_images_too_small_for_the_network_name_the_layer(tmp_path):
    stack = [layers.Conv2D(2, 3, strides=2, name=f"conv_{number}") for number in range(5)]
    keras.Sequential([keras.Input((128, 128, 3)), layers.Rescaling(1 / 255), *stack]).save(tmp_path / "deep.keras")
    assert load_backbone(str(tmp_path / "deep.keras"), image_size=96).output_shape == (None, 2)
    with pytest.raises(InputError, match=r"The layer 'conv_4' \(Conv2D\) .* does not work on images of 32 px"):
        load_backbone(str(tmp_path / "deep.keras"), image_size=32)


def test_random_weights_depend_on_the_seed_alone(nested_file):
    _, path = nested_file
    one, same, other = (load_backbone(str(path), weights=False, seed=seed).get_weights() for seed in (1, 1, 2))
    assert all(np.array_equal(*pair) for pair in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0])


def test_a_network_called_like_ours_with_other_layers_has_blocks_of_its_own(tmp_path):
    model = keras.Sequential([keras.Input((32, 32, 3)), layers.Rescaling(1 / 255), backbone(name="mobilenet_v2")])
    model.save(tmp_path / "m.keras")
    assert tfxfer.list_blocks(load_backbone(str(tmp_path / "m.keras")))[0].name == "stem_conv"


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = with_values(flat())
    model.get_layer("b").set_weights([np.full((3, 3, 4, 6), np.inf), np.zeros(6)])
    model.save(tmp_path / "inf.h5")
    with pytest.raises(InputError, match=r"hold NaN or infinity in 'b/kernel'"):
        load_backbone(get_source(str(tmp_path / "inf.h5"), input_range="0..1"))


def test_a_config_with_a_broken_graph_is_refused(nested_file, tmp_path):
    model, _ = nested_file
    path = tmp_path / "broken.h5"
    model.save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        text = json.dumps(config).replace('"rescale", 0, 0', '"nothing", 0, 0')
        file.attrs["model_config"] = text
    with pytest.raises(InputError, match=r"broken.h5"):
        get_source(str(path))


def test_a_card_is_what_its_files_were(nested_file):
    _, path = nested_file
    card = get_source(str(path))
    assert type(card).from_dict(card.to_dict()) == card
    wrong = dataclasses.replace(card, weights={**card.weights, "sha256": "0" * 64})
    with pytest.raises(InputError, match=r"but 0{64} was recorded"):
        load_backbone(wrong)
