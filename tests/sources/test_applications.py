"""The networks of keras.applications: their scaling in the card, their weights, blocks, cuts, freezing and export.

What is compared with is Keras itself: `preprocess_input`, and the network as `keras.applications` builds it.
"""

import inspect
import math
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from tfxfer import export
from tfxfer.errors import InputError
from tfxfer.features.cut import cut_model
from tfxfer.model.blocks import backbone_of, list_blocks
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze, frozen_variables
from tfxfer.sources.application_families import FAMILIES, MEMBERS
from tfxfer.sources.applications import describe
from tfxfer.sources.catalog import get_source, load_backbone, load_with_report
from tfxfer.sources.ranges import range_facts
from tfxfer.sources.safety import check_model_file

# The smallest of each family; of those that take more than a few seconds all but the scaling is for the slow tests.
SMALLEST = [next(iter(family.members)) for family in FAMILIES.values()]
HEAVY = {"convnext_tiny", "densenet121", "efficientnet_v2_s", "inception_resnet_v2", "nasnet_mobile", "xception"}
SLOW_WHERE_HEAVY = [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in SMALLEST]
# Ways of scaling pixels: -1..1 without a layer for it; EfficientNet, from which layers are cut; BGR; halves.
MODES = ["mobilenet_v3_small", "efficientnet_b0", "vgg16", "efficientnet_v2_s"]
CACHED = "mobilenet_1_0_224_tf_no_top.h5"


def function_of(name):
    return getattr(keras.applications, MEMBERS[name].members[name][0])


def smallest_px(name):
    return MEMBERS[name].min_image_size_px


def pixels_for(name, count=2, seed=0):
    """Patches of colour, uint8, that leave nothing of a network dead."""
    side = smallest_px(name)
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, math.ceil(side / 5), axis=1), math.ceil(side / 5), axis=2)[:, :side, :side]


def stirred(model, images):
    """The model with statistics of these images in every BatchNorm, and gamma and beta of its own: fresh ones change
    nothing, and let the signal fade away."""
    random = np.random.default_rng(0)
    norms = [part for part in model._flatten_layers() if isinstance(part, keras.layers.BatchNormalization)]
    for layer in norms:
        for variable, low, high in ((layer.gamma, 0.8, 1.2), (layer.beta, -0.2, 0.2)):
            if variable is not None:
                variable.assign(random.uniform(low, high, variable.shape))
        layer.momentum = 0.0
    if norms:
        model(images, training=True)
    for layer in norms:
        layer.momentum = 0.99
        variance = layer.moving_variance.numpy()  # of few images, in some channels nearly nothing
        layer.moving_variance.assign(np.maximum(variance, variance.mean()))
    return model


def original(name, *, include_top=False, seed=0):
    """The network as keras.applications builds it, with random weights; EfficientNet's own Normalization is set to what
    ImageNet's weights have together with the layer that Keras adds for them."""
    keras.utils.set_random_seed(seed)
    options = {"classifier_activation": None} if include_top else {"pooling": "avg"}
    shape = (smallest_px(name),) * 2 + (3,)
    model = function_of(name)(weights=None, include_top=include_top, input_shape=shape, **options)
    if MEMBERS[name].inside == "layers":
        set_normalization(model, [0.485, 0.456, 0.406], [0.229**2, 0.224**2, 0.225**2])
    stirred(model, preprocess_input_of(name)(pixels_for(name, 8, seed=1).astype("float32")))
    return model


def set_normalization(model, mean, variance):
    layer = model.get_layer(next(part.name for part in model.layers if part.name.startswith("normalization")))
    layer.load_own_variables({"0": np.array(mean), "1": np.array(variance), "2": np.array(0)})


def preprocess_input_of(name):
    return inspect.getmodule(function_of(name)).preprocess_input


def scaling_inside(name):
    """What the network does to pixels before its first convolution, as a function."""
    layers = original(name).layers[1:]
    count = next(i for i, layer in enumerate(layers) if type(layer).__name__ not in ("Rescaling", "Normalization"))

    def scale(images):
        for layer in layers[:count]:
            images = layer(images)
        return np.asarray(images)

    return scale


@pytest.fixture(scope="module")
def networks():
    """A model of each network, made once: random weights, stirred."""
    made = {}

    def make(name):
        if name not in made:
            made.clear()  # one at a time: they are large
            card = get_source(f"keras:{name}")
            model = build_model(card, 3, image_size=smallest_px(name), weights=False, dropout=0.0)
            made[name] = stirred(model, pixels_for(name, 8, seed=1).astype("float32"))
        return made[name]

    return make


# --- The table is what the installed Keras has ---------------------------------------------------------------------


def test_every_network_of_keras_is_in_the_table():
    found = {name for name, value in vars(keras.applications).items() if inspect.isfunction(value)}
    assert {function for family in FAMILIES.values() for function, _ in family.members.values()} == found
    assert sum(len(family.members) for family in FAMILIES.values()) == len(found) == len(MEMBERS)


@pytest.mark.parametrize("name", SMALLEST)
def test_the_argument_that_leaves_scaling_out_is_named_where_keras_has_it(name):
    has = "include_preprocessing" in inspect.signature(function_of(name)).parameters
    assert has == (MEMBERS[name].inside == "argument")


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_size_is_the_smallest_that_keras_builds(name):
    side = smallest_px(name)
    with pytest.raises(ValueError, match=r"[Ii]nput size must be at least"):
        function_of(name)(weights=None, include_top=False, input_shape=(side - 1, side - 1, 3))
    with pytest.raises(InputError, match=rf"smaller than keras:{name} can take; .* at least {side} px"):
        load_backbone(f"keras:{name}", image_size=side - 1, weights=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_the_trained_size_is_the_default_of_keras(name):
    assert function_of(name)(weights=None).input_shape[1] in (None, get_source(f"keras:{name}").image_size_px)


# --- Pixels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALLEST)
def test_the_graph_scales_as_preprocess_input_and_the_network_do(name, networks):
    model, pixels = networks(name), pixels_for(name)
    inside = keras.Model(model.input, model.get_layer("normalise").output)
    expected = scaling_inside(name)(preprocess_input_of(name)(pixels.astype("float32")))
    assert expected.std() > 0.3
    np.testing.assert_allclose(inside(pixels.astype("float32")), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_imagenet_scaling_of_efficientnet_is_what_keras_documents():
    """Its layers for ImageNet's weights by hand: Rescaling, Normalization with the standard deviation as variance, and
    one more division by the root of it."""
    source = inspect.getsource(inspect.getmodule(keras.applications.EfficientNetB0))
    assert "[1.0 / math.sqrt(stddev) for stddev in IMAGENET_STDDEV_RGB]" in source
    assert "IMAGENET_STDDEV_RGB = [0.229, 0.224, 0.225]" in source
    pixels, std = np.random.default_rng(0).uniform(0, 255, (5, 3)), np.array([0.229, 0.224, 0.225])
    expected = (pixels / 255 - [0.485, 0.456, 0.406]) / np.sqrt(std) / np.sqrt(std)
    card = get_source("keras:efficientnet_b3")
    np.testing.assert_allclose(pixels * np.array(card.scale) + card.offset, expected, rtol=1e-6)


@pytest.mark.parametrize("name", SLOW_WHERE_HEAVY)
def test_features_are_those_of_keras_on_the_same_pixels(name):
    theirs, pixels = original(name), pixels_for(name)
    card = get_source(f"keras:{name}")
    ours = load_backbone(card, image_size=smallest_px(name), weights=False)
    skip = 3 if MEMBERS[name].inside == "layers" else 0  # mean, variance and count of the layer that was cut off
    ours.set_weights(theirs.get_weights()[skip:])
    expected = np.asarray(theirs(preprocess_input_of(name)(pixels.astype("float32")), training=False))
    images = pixels[..., ::-1] if card.channel_order == "bgr" else pixels
    found = np.asarray(ours(images * np.float32(card.scale) + np.float32(card.offset), training=False))
    assert found.shape == expected.shape and expected.std() > 0
    # Sums in another order, as other CPUs take them, moved one value in 4096 of inception_v3 by 2.4e-5 of the largest.
    np.testing.assert_allclose(found, expected, rtol=0, atol=6e-5 * np.abs(expected).max())


def test_the_old_output_gives_logits():
    theirs = original("mobilenet_v3_small", include_top=True)
    card, pixels = get_source("keras:MobileNetV3Small"), pixels_for("mobilenet_v3_small")
    ours = load_backbone(card, image_size=32, include_top=True, weights=False)
    ours.set_weights(theirs.get_weights())
    found = ours(pixels * np.float32(card.scale) + np.float32(card.offset), training=False)
    np.testing.assert_allclose(found, theirs(pixels.astype("float32"), training=False), atol=1e-4)
    assert found.shape == (2, card.num_classes)


# --- Blocks, cuts, freezing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLOW_WHERE_HEAVY)
def test_blocks_hold_every_layer_once_and_can_be_cut(name, networks):
    model = networks(name)
    backbone = backbone_of(model)
    blocks = list_blocks(model)
    held = [layer for block in blocks for layer in block.layers]
    expected = [layer.name for layer in backbone.layers if not isinstance(layer, keras.layers.InputLayer)]
    assert sorted(held) == sorted(expected) and len(blocks) >= 5
    assert sum(block.num_parameters for block in blocks) == backbone.count_params()
    assert all(block.num_parameters > 0 for block in blocks)
    images = pixels_for(name).astype("float32")
    whole = np.asarray(model(images, training=False))
    assert whole.std(axis=0).max() > 0
    for depth in (0, 1, len(blocks) // 2, len(blocks) - 1, len(blocks)):
        cut = cut_model(model, depth)
        if cut is None:  # its cells read the outputs of two earlier ones
            assert name == "nasnet_mobile" and 0 < depth < len(blocks)
            continue
        logits = np.asarray(cut.suffix(cut.prefix(images, training=False), training=False))
        np.testing.assert_allclose(keras.ops.softmax(logits), whole, atol=1e-5)


@pytest.mark.parametrize("name", SLOW_WHERE_HEAVY)
def test_half_frozen_means_that_the_other_half_trains(name, networks):
    model = networks(name)
    blocks = list_blocks(model)
    half = len(blocks) // 2
    freeze(model, half, batch_norm="affine")
    model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy", run_eagerly=True)
    held = frozen_variables(model)
    before = {variable.path: variable.numpy().copy() for variable in model.weights}
    model.train_on_batch(pixels_for(name, 4).astype("float32"), np.array([0, 1, 2, 0]))
    moved = {v.path for v in model.weights if v.numpy().tobytes() != before[v.path].tobytes()}
    assert not moved & held.keys()
    backbone = backbone_of(model)
    for number, block in enumerate(blocks):
        paths = {v.path for layer in block.layers for v in backbone.get_layer(layer).weights}
        assert bool(paths & moved) == (number >= half), block.name


def test_names_do_not_depend_on_what_was_built_before():
    """inception_v3 names hardly any layer; a freeze depth in a config must mean the same in every process."""
    keras.layers.Conv2D(1, 1)
    first, second = (load_backbone("keras:inception_v3", image_size=75, weights=False) for _ in range(2))
    names = [layer.name for layer in first.layers]
    assert names == [layer.name for layer in second.layers] and "conv2d_93" in names
    assert keras.layers.Dense(1).name != keras.layers.Dense(1).name


def test_random_weights_follow_the_seed_and_leave_the_generator_alone():
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    one, same, other = (
        load_backbone("keras:mobilenet_v2", image_size=32, weights=False, seed=seed).get_weights() for seed in (1, 1, 2)
    )
    assert random.random() == expected
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0])
    kernels = [value for value in one if value.shape == (1, 1, 960, 160)]
    assert len(kernels) >= 2 and not np.array_equal(*kernels[:2]), "equal shapes, equal values"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MEMBERS) - set(SMALLEST)))
def test_the_larger_ones_have_blocks_too(name):
    model = load_backbone(f"keras:{name}", image_size=smallest_px(name), weights=False)
    blocks = list_blocks(model)
    held = [layer for block in blocks for layer in block.layers]
    assert sorted(held) == sorted(layer.name for layer in model.layers[1:])
    assert all(block.num_parameters for block in blocks)


# --- Weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "include_top"), [(".weights.h5", False), (".h5", True), (".keras", False), (".weights.h5", True)]
)
def test_weights_of_a_file_in_every_format(suffix, include_top, tmp_path):
    theirs, path = original("mobilenet_v3_small", include_top=include_top), tmp_path / f"own{suffix}"
    (theirs.save_weights if suffix == ".weights.h5" else theirs.save)(path)
    card = get_source("keras:mobilenet_v3_small", weights=path)
    assert card.weights["sha256"] and card.licence == "unknown"
    model, report = load_with_report(card, image_size=32)
    assert report.complete and report.loaded_share == 1 and report.num_parameters("matched", "renamed") > 900_000
    pixels = pixels_for("mobilenet_v3_small")
    if not include_top:
        images = pixels * np.float32(card.scale) + np.float32(card.offset)
        expected = theirs(pixels.astype("float32"), training=False)
        np.testing.assert_allclose(model(images, training=False), expected, atol=1e-5)
    ours = {value.tobytes() for value in model.get_weights()}
    assert ours <= {value.tobytes() for value in theirs.get_weights()}


def test_a_file_of_another_network_is_refused(tmp_path):
    original("vgg16").save_weights(tmp_path / "vgg.weights.h5")
    card = get_source("keras:mobilenet_v3_small", weights=tmp_path / "vgg.weights.h5")
    with pytest.raises(InputError):
        load_backbone(card, image_size=32)


def test_a_file_that_changed_since_is_refused(tmp_path):
    path = tmp_path / "own.weights.h5"
    original("mobilenet_v3_small").save_weights(path)
    card = get_source("keras:mobilenet_v3_small", weights=path)
    original("mobilenet_v3_small", seed=1).save_weights(path)
    with pytest.raises(InputError, match=rf"own.weights.h5 has SHA-256 .* but {card.weights['sha256']} was recorded"):
        load_backbone(card, image_size=32)
    with pytest.raises(InputError, match=r"There is no file .*missing.h5"):
        get_source("keras:mobilenet_v3_small", weights=tmp_path / "missing.h5")


IMAGENET = range_facts("imagenet")


@pytest.mark.parametrize(
    ("suffix", "mean", "variance", "expected"),
    [
        (".keras", [0.0] * 3, [1.0] * 3, range_facts("0..1")),
        (".h5", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], IMAGENET),  # as Keras' own file has it
        (".weights.h5", [0.485, 0.456, 0.406], [0.229**2, 0.224**2, 0.225**2], IMAGENET),
    ],
)
def test_efficientnet_files_say_how_pixels_are_scaled(suffix, mean, variance, expected, tmp_path):
    theirs = original("efficientnet_b0")
    set_normalization(theirs, mean, variance)
    path = tmp_path / f"own{suffix}"
    (theirs.save_weights if suffix == ".weights.h5" else theirs.save)(path)
    card = get_source("keras:efficientnet_b0", weights=path)
    np.testing.assert_allclose(card.scale, expected["scale"], rtol=1e-6)
    np.testing.assert_allclose(card.offset, expected["offset"], rtol=1e-6)
    other = get_source("keras:efficientnet_b0", weights=path, input_range="-1..1")
    assert other.offset == (-1.0, -1.0, -1.0)


def test_efficientnet_computes_the_same_from_its_file(tmp_path):
    theirs, pixels = original("efficientnet_b0"), pixels_for("efficientnet_b0")
    theirs.save_weights(tmp_path / "own.weights.h5")
    card = get_source("keras:efficientnet_b0", weights=tmp_path / "own.weights.h5")
    model, report = load_with_report(card, image_size=32)
    assert report.complete
    found = model(pixels * np.float32(card.scale) + np.float32(card.offset), training=False)
    np.testing.assert_allclose(found, theirs(pixels.astype("float32"), training=False), atol=1e-4)


def without_network(monkeypatch, home):
    """Keras read KERAS_HOME when it was imported; nothing listens on the port."""
    monkeypatch.setattr(keras.src.backend.config, "_KERAS_DIR", str(home))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


def test_offline_is_one_sentence(monkeypatch, tmp_path):
    without_network(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=r"of 'keras:mobilenet' could not be had .*--weights FILE") as caught:
        load_backbone("keras:mobilenet", image_size=32)
    assert "\n" not in str(caught.value)


def test_weights_come_from_the_cache_of_keras(monkeypatch, tmp_path):
    """Keras checks no hash of MobileNet's file, so one made here can stand in the cache."""
    theirs = keras.applications.MobileNet(weights=None, include_top=False, input_shape=(224, 224, 3))
    (tmp_path / "models").mkdir()
    theirs.save(tmp_path / "whole.h5")
    shutil.move(tmp_path / "whole.h5", tmp_path / "models" / CACHED)
    without_network(monkeypatch, tmp_path)
    for side in (32, 224):
        model, report = load_with_report("keras:mobilenet", image_size=side)
        for one, other in zip(model.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    assert report.complete and report.num_parameters("matched") == model.count_params()


def test_the_old_output_of_vgg_takes_one_size():
    with pytest.raises(InputError, match=r"takes images of 224 px only, not of 64 px"):
        load_backbone("keras:vgg16", image_size=64, include_top=True)


def test_names_are_found_in_both_spellings_and_near_ones_told():
    spelled = "MobileNetV3Small", "mobilenet_v3_small", "mobilenetv3small", "mobilenet-v3-small"
    assert {describe(f"keras:{name}", name).architecture for name in spelled} == {"mobilenet_v3_small"}
    with pytest.raises(InputError, match=r"Keras Applications has no 'resnet5'. Did you mean 'resnet50'"):
        get_source("keras:resnet5")
    assert "pixels inside" in get_source("keras:convnext_tiny").notes
    assert "cut off" in get_source("keras:efficientnet_b0").notes
    assert "does not scale" in get_source("keras:resnet50").notes


def test_cards_are_made_without_keras():
    code = (
        "import sys; from tfxfer.sources.catalog import get_source; card = get_source('keras:resnet50'); "
        "assert card.channel_order == 'bgr'; assert not {'keras', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Saving and export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", *(pytest.param(n, marks=pytest.mark.slow) for n in SMALLEST if n in HEAVY)]
)
def test_saved_models_pass_the_gate_and_come_back(name, networks, tmp_path):
    model = networks(name)
    model.save(tmp_path / "model.keras")
    check_model_file(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", compile=False)
    images = pixels_for(name).astype("float32")
    np.testing.assert_allclose(again(images, training=False), model(images, training=False), atol=1e-6)


@pytest.mark.parametrize("name", [MODES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODES[1:])])
def test_exports_are_what_predict_says(name, networks, tmp_path):
    model, images = networks(name), pixels_for(name, 8)
    certificates = export(model, tmp_path / "exports", samples=images, class_names=["a", "b", "c"])
    assert [certificate.format for certificate in certificates] == ["saved_model", "onnx"]
    assert all(certificate.passed and certificate.max_abs_difference < 1e-4 for certificate in certificates)
