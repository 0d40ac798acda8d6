import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hub_modules import (
    SIZE_PX,
    Module,
    WithTable,
    WithTrain,
    images_spec,
    network,
    pack,
    pictures,
    save_export,
    save_module,
    save_plain,
    save_signature_only,
    save_two_endpoints,
)

import tfxfer
from tfxfer.errors import InputError
from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix
from tfxfer.model.blocks import program_of
from tfxfer.model.freeze import audit_frozen, digest_frozen, frozen_variables
from tfxfer.sources.catalog import get_source, load_backbone
from tfxfer.sources.hub_anatomy import Anatomy, Slot, anatomy_of
from tfxfer.sources.hub_blocks import group_slots

KINDS = {
    "module": save_module,
    "plain": save_plain,
    "export": save_export,
    "two_endpoints": save_two_endpoints,
    "signature_only": save_signature_only,
}
TRAINABLE = tuple(kind for kind in KINDS if kind != "signature_only")
HANDLE = "https://tfhub.dev/somebody/small/1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One SavedModel of each kind; tests must not change them."""
    place = tmp_path_factory.mktemp("modules")
    return {kind: save(place / kind) for kind, save in KINDS.items()}


@pytest.fixture
def module(folders):
    return folders["module"]


def build(folder, head=3, **given):
    return tfxfer.build_model(
        get_source(f"hub:{folder}", input_range="0..1"), head, image_size=SIZE_PX, **{"dropout": 0.0, **given}
    )


def features_of(folder, scaled: np.ndarray) -> np.ndarray:
    """What TensorFlow itself computes, without tfxfer: (N, F)."""
    loaded = tf.saved_model.load(str(folder))
    if hasattr(loaded, "__call__"):  # noqa: B004
        found = loaded(tf.constant(scaled))
    else:
        found = loaded.signatures["serving_default"](tf.constant(scaled))
    if isinstance(found, dict):
        found = found["features"] if "features" in found else next(iter(found.values()))
    found = np.asarray(found)
    return found.mean((1, 2)) if found.ndim == 4 else found


def values(model) -> dict[str, bytes]:
    return {variable.path: variable.numpy().tobytes() for variable in model.weights}


def leaf(path: str) -> str:
    return path.rpartition("/")[2]


def moved_by_training(model, **compiled) -> set[str]:
    """Names of the weights of the program that a few steps move."""
    model.compile(keras.optimizers.AdamW(0.01), "sparse_categorical_crossentropy", **compiled)
    before = values(model)
    model.fit(pictures(24), np.arange(24) % 3, batch_size=8, verbose=0)
    program = {weight.path for weight in program_of(model.get_layer("hub_backbone")).weights}
    return {leaf(path) for path, value in values(model).items() if path in program and value != before[path]}


# -- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_saved_model(folders, kind):
    scaled = pictures(5).astype("float32") / 255
    backbone = load_backbone(get_source(f"hub:{folders[kind]}", input_range="0..1"), image_size=SIZE_PX)
    found = backbone.predict(scaled, verbose=0)
    np.testing.assert_allclose(found, features_of(folders[kind], scaled), atol=1e-6)
    np.testing.assert_allclose(np.concatenate([backbone(scaled[:1]), backbone(scaled[1:])]), found, atol=1e-5)


def test_pixels_are_scaled_to_0_to_1_unless_told_otherwise(module):
    images = pictures(3)
    expected = load_backbone(f"hub:{module}", image_size=SIZE_PX).predict(images / np.float32(127.5) - 1, verbose=0)
    card = get_source(f"hub:{module}", input_range="-1..1")
    model = tfxfer.build_model(card, 3, image_size=SIZE_PX)
    features = keras.Model(model.input, model.get_layer("dropout").input)
    np.testing.assert_allclose(features.predict(images, verbose=0), expected, atol=1e-5)
    assert get_source(f"hub:{module}").scale == (1 / 255,) * 3


def test_the_spelling_alone_builds_a_model(module):
    assert tfxfer.build_model(f"hub:{module}", 3, image_size=SIZE_PX).output_shape == (None, 3)


def test_the_old_output_is_kept_where_asked(folders):
    logits = load_backbone(
        get_source(f"hub:{folders['export']}", input_range="0..1"), image_size=SIZE_PX, include_top=True
    )
    assert logits.output_shape == (None, 5)
    with pytest.raises(InputError, match=r"needed are floats \(N, K\)"):
        load_backbone(f"hub:{folders['plain']}", include_top=True)


# -- the card -----------------------------------------------------------------------------------------------------


def test_the_card_knows_size_digest_and_what_cannot_train(folders):
    free, fixed, used = (get_source(f"hub:{folders[kind]}") for kind in ("module", "plain", "signature_only"))
    assert (free.image_size_px, free.fixed_size, free.fine_tune_depth) == (224, False, -1)
    assert (fixed.image_size_px, fixed.fixed_size) == (SIZE_PX, True)
    assert used.fine_tune_depth == 3 and "not trained" in used.notes
    assert free.weights["file"] == str(folders["module"]) and len(free.weights["sha256"]) == 64
    with pytest.raises(InputError, match="16 px only"):
        load_backbone(fixed, image_size=32)


def softmax_under_another_function(features):
    """Softmax in half precision, inside a function that the program calls, handed on by Identity and Cast."""

    @tf.function(autograph=False)
    def inner(x):
        return tf.identity(x), tf.cast(tf.nn.softmax(tf.cast(x, tf.float16)), tf.float32)

    return tf.identity(inner(features)[1])


CLASSIFIERS = {
    "softmax": (tf.nn.softmax, "Its only output is 5 wide and a softmax: features are the old classifier's prob"),
    "called": (softmax_under_another_function, "Its only output is 5 wide and a softmax: features are the old"),
    "predictions": (
        lambda x: {"predictions": tf.nn.softmax(x)},
        "Its only output is 'predictions', 5 wide and a softmax: features are the old classifier's probabilities; a "
        "headless export transfers better.",
    ),
    "logits": (
        lambda x: {"logits": x},
        "Its only output is 'logits', 5 wide: features are the old classifier's logits; a headless export transfers "
        "better.",
    ),
    "one_of_two": (
        lambda x: {"default": tf.nn.softmax(x), "other": x},
        "The output that is taken is 'default', 5 wide and a softmax: features are the old classifier's probabilities",
    ),
}
FEATURES = {
    "plain": lambda x: x,
    "features_beside_logits": lambda x: {"features": x, "logits": 2 * x, "probabilities": tf.nn.softmax(x)},
    "sorted": lambda x: {"zeros": tf.nn.softmax(x), "default": x, "about": {"b": tf.nn.softmax(x), "a": x}},
    "attention": lambda x: x * tf.nn.softmax(x),
    "named_otherwise": lambda x: {"embedding": x},
    "called": lambda x: tf.identity(tf.function(lambda y: (tf.nn.softmax(y), 2 * y), autograph=False)(x)[1]),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_card_says_that_features_are_an_old_classifiers_answers(kind, tmp_path):
    outputs, sentence = CLASSIFIERS[kind]
    assert get_source(f"hub:{save_module(tmp_path / kind, Module(network(), outputs))}").notes.startswith(sentence)


@pytest.mark.parametrize("kind", FEATURES)
def test_the_card_says_nothing_where_no_classifier_is_proven(kind, tmp_path):
    assert get_source(f"hub:{save_module(tmp_path / kind, Module(network(), FEATURES[kind]))}").notes == ""


def test_the_card_of_a_classifier_that_keras_exported_or_that_has_signatures_only(folders, tmp_path):
    net = network(SIZE_PX)
    answers = keras.layers.Dense(7, activation="softmax", name="predictions")(net.output)
    keras.Model(net.input, answers).export(tmp_path / "whole", verbose=False)
    whole = get_source(f"hub:{tmp_path / 'whole'}", input_range="0..255").notes
    assert whole.startswith("Its only output is 7 wide and a softmax")
    assert get_source(f"hub:{folders['export']}", input_range="0..255").notes == ""
    serving = save_signature_only(tmp_path / "serving", lambda x: {"output_0": tf.nn.softmax(x)})
    used = get_source(f"hub:{serving}").notes
    assert used.startswith("Signatures only: it can be used as it is, not trained. Its only output is 'output_0', 5 ")
    assert get_source(f"hub:{folders['signature_only']}").notes.endswith("not trained.")


def test_whole_numbers_are_not_scaled(tmp_path):
    class Levels(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.uint8)])
        def __call__(self, images):
            return tf.reduce_mean(tf.cast(images, tf.float32), (1, 2))

    tf.saved_model.save(Levels(), str(tmp_path / "levels"))
    model = tfxfer.build_model(get_source(f"hub:{tmp_path / 'levels'}"), 2)
    features = keras.Model(model.input, model.get_layer("dropout").input)
    images = pictures(2, size_px=8)
    np.testing.assert_allclose(features.predict(images, verbose=0), images.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("given", [{"weights": "x.h5"}, {"partial": True}])
def test_other_weights_are_refused(module, given):
    with pytest.raises(InputError, match="brings its own weights"):
        get_source(f"hub:{module}", **given)


def test_random_weights_share_nothing_but_the_graph(module):
    images = pictures(4).astype("float32") / 255
    trained, first, again, other = (
        load_backbone(f"hub:{module}", image_size=SIZE_PX, weights=weights, seed=seed).predict(images, verbose=0)
        for weights, seed in ((True, 0), (False, 1), (False, 1), (False, 2))
    )
    assert np.array_equal(first, again) and np.isfinite(first).all() and first.std() > 0
    assert not np.allclose(first, other) and not np.allclose(first, trained)


# -- blocks and freezing ------------------------------------------------------------------------------------------


def blocks_of(names: str) -> dict[str, list[int]]:
    parts = names.split()
    return group_slots(
        [Slot(name, (), (3, 3) if name[-6:] in ("kernel", "eights") else (3,), "float32", True) for name in parts]
    )


def test_blocks_of_names_as_tf_hub_has_them():
    slim = blocks_of(
        "M/Conv/weights M/Conv/BatchNorm/gamma M/expanded_conv/depthwise/depthwise_weights "
        "M/expanded_conv/project/weights M/expanded_conv_1/expand/weights "
        "M/expanded_conv_1/expand/BatchNorm/beta M/expanded_conv_10/expand/weights"
    )
    assert slim == {"Conv": [0, 1], "expanded_conv": [2, 3], "expanded_conv_1": [4, 5], "expanded_conv_10": [6]}
    resnet = blocks_of(
        "resnet50/conv1_conv/kernel resnet50/conv1_bn/gamma resnet50/conv2_block1_1_conv/kernel "
        "resnet50/conv2_block1_0_conv/kernel resnet50/conv2_block1_1_bn/gamma resnet50/conv2_block2_1_conv/kernel"
    )
    assert resnet == {"conv1_conv": [0, 1], "conv2_block1": [2, 3, 4], "conv2_block2": [5]}
    units = blocks_of("r/block1/unit_1/b/conv1/weights r/block1/unit_2/b/conv1/weights r/block2/unit_1/b/conv1/weights")
    assert units == {"block1_unit_1": [0], "block1_unit_2": [1], "block2_unit_1": [2]}
    efficient = blocks_of(
        "stem_conv/kernel block1a_dwconv/depthwise_kernel block1a_bn/gamma block1b_bn/gamma top/kernel"
    )
    assert efficient == {"stem_conv": [0], "block1a": [1, 2, 3], "top": [4]}


def test_blocks_of_variables_without_names():
    shapes = [(3,), (3, 3), (3,), (3, 3), (3,)]
    slots = [Slot(f"variable_{index}", (), shape, "float32", True) for index, shape in enumerate(shapes)]
    assert group_slots(slots) == {"part_1": [0, 1, 2], "part_2": [3, 4]}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_every_variable_once_in_the_order_of_the_network(folders, kind):
    layer = program_of(load_backbone(get_source(f"hub:{folders[kind]}", input_range="0..1"), image_size=SIZE_PX))
    found = [id(variable) for variables in layer.variable_blocks.values() for variable in variables]
    assert sorted(found) == sorted(map(id, layer.weights)) and len(found) == (4 if kind == "plain" else 15)
    names = ["part_1", "part_2"] if kind == "plain" else ["stem_conv", "block_1", "block_2"]
    assert list(layer.variable_blocks) == names


@pytest.mark.parametrize("kind", TRAINABLE)
def test_trained_blocks_move_and_frozen_ones_stay_to_the_bit(folders, kind):
    model = tfxfer.freeze(build(folders[kind]), 1, batch_norm="affine")
    before = digest_frozen(model)
    moved = moved_by_training(model)
    assert audit_frozen(model, before)["bit_identical"]
    trains = "block_1_conv.kernel block_1_bn.gamma block_1_bn.beta block_2_conv.kernel block_2_bn.gamma block_2_bn.beta"
    assert moved == ({"variable_2", "variable_3"} if kind == "plain" else set(trains.split()))


def test_training_leaves_the_files_of_the_source_alone(module):
    digest = tfxfer_digest(module)
    moved_by_training(tfxfer.freeze(build(module), 0))
    assert tfxfer_digest(module) == digest


@pytest.mark.parametrize("batch_norm", ["frozen", "affine", "adapt", "train"])
def test_states_of_batch_norm(module, batch_norm):
    model = tfxfer.freeze(build(module), 0, batch_norm=batch_norm)
    moved = moved_by_training(model)
    assert {name.rpartition(".")[2] for name in moved} == {
        "frozen": {"kernel"},
        "adapt": {"kernel"},
        "affine": {"kernel", "gamma", "beta"},
        "train": {"kernel", "gamma", "beta", "moving_mean", "moving_variance"},
    }[batch_norm]
    statistics = {leaf(path) for path in frozen_variables(model) if "moving" in path}
    assert len(statistics) == (0 if batch_norm == "train" else 6)


def test_affine_parameters_of_a_program_move_alone(module):
    model = tfxfer.freeze(build(module), 0, batch_norm="affine", parameters="affine")
    before = digest_frozen(model)
    assert {name.rpartition(".")[2] for name in moved_by_training(model)} == {"gamma", "beta"}
    assert audit_frozen(model, before)["bit_identical"] and len(before) == 15 - 6


def test_statistics_stay_where_one_block_is_frozen(module):
    model = tfxfer.freeze(build(module), "re:stem", batch_norm="train")
    assert not program_of(model.get_layer("hub_backbone")).moves_statistics
    assert not any("moving" in name for name in moved_by_training(model))


def test_the_training_endpoint_moves_statistics(folders):
    model = tfxfer.freeze(build(folders["two_endpoints"]), 0, batch_norm="train")
    assert {name for name in moved_by_training(model) if "moving" in name} == {
        f"{name}_bn.moving_{what}" for name in ("stem", "block_1", "block_2") for what in ("mean", "variance")
    }


def counted(function):
    """Of (net, steps): the function, which counts what it is called."""

    def made(net, steps):
        def train(images, labels=None, *, weights=None, again=True):
            steps.assign_add(1.0)
            return function(net, images, labels, weights)

        return train

    return made


LABELS = tf.TensorSpec((None,), tf.float32, name="labels")
TRAINS = {
    "labels": ([images_spec(), LABELS], {}, False),
    "weights_by_name": ([images_spec()], {"weights": LABELS}, False),
    "whole_numbers": ([tf.TensorSpec((None, None, None, 3), tf.uint8)], {}, False),
    "rows": ([tf.TensorSpec((None, 5), tf.float32)], {}, False),
    "images_by_name": ([], {"images": images_spec()}, True),
    "images": ([images_spec()], {}, True),
}


@pytest.mark.parametrize("kind", TRAINS)
def test_a_training_endpoint_takes_images_and_nothing_else(kind, tmp_path):
    given, named, is_endpoint = TRAINS[kind]
    train = counted(lambda net, images, labels, weights: results_of(net, images))
    anatomy = anatomy_of(save_module(tmp_path / kind, WithTrain(network(), train, *given, **named)))
    assert anatomy.training_endpoint == ("train" if is_endpoint else "")
    assert any(slot.name == "steps" for slot in anatomy.slots) == is_endpoint


def results_of(net, images):
    """As inference gives them, whatever comes in."""
    if images.dtype == tf.float32 and len(images.shape) == 4:
        return net(images, training=True)
    return net(tf.zeros((2, SIZE_PX, SIZE_PX, 3)), training=True)


def momentum(net, steps):
    """An unsupervised step: it takes images alone, gives features, and keeps slots for every weight."""
    slots = [tf.Variable(tf.zeros(v.shape), name=f"momentum_{i}") for i, v in enumerate(net.trainable_variables)]

    def train(images):
        for slot in slots:
            slot.assign(slot * 0.9)
        return net(images, training=True)

    train.slots = slots
    return train


@pytest.mark.parametrize("kind", ["a loss", "momentum", "part of the features"])
def test_an_unsupervised_step_is_no_training_endpoint(kind, tmp_path):
    """It takes images and nothing else, as an endpoint would; taken for one, its slots would be blocks to freeze."""
    steps = {
        "a loss": counted(lambda net, images, *_: tf.reduce_mean(net(images, training=True))),
        "part of the features": counted(lambda net, images, *_: net(images, training=True)[:, :2]),
        "momentum": momentum,
    }
    stepping = WithTrain(network(), steps[kind], images_spec())
    stepping.kept = getattr(stepping.train.python_function, "slots", [])
    found = anatomy_of(save_module(tmp_path / "stepping", stepping))
    assert found.training_endpoint == ""
    plain = anatomy_of(save_module(tmp_path / "plain"))
    assert [slot.name for slot in found.slots] == [slot.name for slot in plain.slots]
    assert group_slots(found.slots) == group_slots(plain.slots)


def test_a_training_step_of_the_users_own_changes_nothing(module, tmp_path):
    step = counted(lambda net, images, labels, weights: tf.reduce_mean(net(images, training=True)) + labels)
    stepping = WithTrain(network(), step, images_spec(), LABELS)
    found = []
    for folder in (save_module(tmp_path / "stepping", stepping), module):
        keras.utils.set_random_seed(0)
        model = tfxfer.freeze(build(folder), 0, batch_norm="train")
        moved = moved_by_training(model)
        assert "block_2_bn.moving_mean" in moved and "steps" not in moved
        found.append([weight.numpy() for weight in model.weights])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_without_a_training_mode_statistics_cannot_move(folders):
    with pytest.raises(InputError, match="no training mode"):
        tfxfer.freeze(build(folders["export"]), 0, batch_norm="train")


def test_gaps_and_shares_can_be_frozen(module):
    model = build(module)
    moved = moved_by_training(tfxfer.freeze(model, "re:block_1"))
    assert {name.partition("_conv")[0] for name in moved if "conv" in name} == {"stem", "block_2"}
    last = {"block_2_conv.kernel", "block_2_bn.gamma", "block_2_bn.beta"}
    assert moved_by_training(tfxfer.freeze(model, 0.7)) == last
    assert moved_by_training(tfxfer.freeze(model, "all")) == set()
    with pytest.raises(InputError, match="no layers to ask"):
        tfxfer.freeze(model, lambda layer: True)


def test_a_model_that_only_has_signatures_is_used_not_trained(folders):
    model = build(folders["signature_only"])
    for depth in (0, 1, 0.5):
        with pytest.raises(InputError, match=r"signatures only.*--method probe"):
            tfxfer.freeze(model, depth)
    assert moved_by_training(tfxfer.freeze(model, "all")) == set()
    model.trainable = True
    assert moved_by_training(model) == set()


def test_the_frozen_part_becomes_constants_for_the_feature_cache(module):
    images = pictures(5)
    model = build(module)
    expected = keras.Model(model.input, model.get_layer("dropout").input).predict(images, verbose=0)
    for depth in (0, 3):
        features, *_ = FrozenPrefix(cut_model(tfxfer.freeze(model, depth), depth), batch_size=8)(images)
        np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.slow
def test_a_saved_model_of_keras_2(tmp_path):
    """Most of what is on TF Hub: `__call__(inputs, training, mask)`, names of layers in the names of variables."""
    import tf_keras

    x = inputs = tf_keras.Input((None, None, 3))
    for name in ("conv1", "conv2_block1_1", "conv2_block2_1"):
        x = tf_keras.layers.Conv2D(4, 3, padding="same", name=f"{name}_conv")(x)
        x = tf_keras.layers.Dropout(0.5)(tf_keras.layers.BatchNormalization(name=f"{name}_bn")(x))
    old = tf_keras.Model(inputs, tf_keras.layers.GlobalAveragePooling2D()(x))
    old.save(tmp_path / "old", save_format="tf")
    scaled = pictures(4).astype("float32") / 255
    found = load_backbone(f"hub:{tmp_path / 'old'}", image_size=SIZE_PX).predict(scaled, verbose=0)
    np.testing.assert_allclose(found, old.predict(scaled, verbose=0), atol=1e-6)
    model = tfxfer.freeze(build(tmp_path / "old"), "conv2_block1")
    assert [block.name for block in tfxfer.list_blocks(model)] == ["conv1_conv", "conv2_block1", "conv2_block2"]
    assert {name.partition("_1_")[0] for name in moved_by_training(model)} == {"conv2_block2"}
    moved = moved_by_training(tfxfer.freeze(model, 0, batch_norm="train"))
    assert len([name for name in moved if "moving" in name]) == 6


# -- saving, reloading, exporting ---------------------------------------------------------------------------------

RELOAD = """
import sys, keras, numpy as np
import tfxfer.sources.hub_layer, tfxfer.model.preprocess
folder = sys.argv[1]
model = keras.models.load_model(folder + "/model.keras", compile=False)
found = model.predict(np.load(folder + "/images.npy"), verbose=0)
np.savez(folder + "/found.npz", x=found, trains=len(model.trainable_weights))
model.save(folder + "/again.keras")
"""


@pytest.mark.parametrize("kind", ["module"])
def test_a_trained_model_reloads_in_another_process_without_its_folder(folders, kind, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / "source")
    model = tfxfer.freeze(build(folder), 1)
    moved_by_training(model)
    shutil.rmtree(folder)
    images = pictures(6)
    expected = model.predict(images, verbose=0)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=200)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_array_equal(found["x"], expected)
    assert found["trains"] == len(model.trainable_weights) == 8  # the freeze state comes back too
    again = keras.models.load_model(tmp_path / "again.keras", compile=False)
    np.testing.assert_array_equal(again.predict(images, verbose=0), expected)
    assert list(values(again).values()) == list(values(model).values())
    assert "block_2_conv.kernel" in moved_by_training(again)


@pytest.mark.parametrize("kind", ["module", "signature_only"])
def test_exports_equal_predict(folders, kind, tmp_path):
    model = build(folders[kind])
    assert bool(moved_by_training(tfxfer.freeze(model, "all" if kind == "signature_only" else 1))) == (kind == "module")
    images = pictures(8)
    certificates = tfxfer.export(model, tmp_path / "exports", samples=images)
    assert [(c.format, c.passed) for c in certificates] == [("saved_model", True), ("onnx", True)]
    served = tf.saved_model.load(str(tmp_path / "exports" / "saved_model" / "1")).signatures["serving_default"]
    expected = model.predict(images, verbose=0)
    np.testing.assert_allclose(served(images=tf.constant(images))["probabilities"], expected, atol=1e-5)
    np.testing.assert_allclose(served(images=tf.constant(images[:1]))["probabilities"], expected[:1], atol=1e-5)


def test_a_table_inside_goes_with_the_model(tmp_path):
    (tmp_path / "words.txt").write_text("a\nb\nc\n", encoding="utf-8")
    folder = save_module(tmp_path / "table", WithTable(network(), tmp_path / "words.txt"))
    (tmp_path / "words.txt").unlink()
    model = build(folder)
    images = pictures(4)
    expected = model.predict(images, verbose=0)
    np.testing.assert_allclose(
        load_backbone(f"hub:{folder}", image_size=SIZE_PX).predict(images / np.float32(255), verbose=0),
        2 * network().predict(images / np.float32(255), verbose=0), rtol=1e-4,
    )  # fmt: skip
    model.save(tmp_path / "model.keras")
    tfxfer.export(model, tmp_path / "exports", formats=("saved_model",), samples=images)
    shutil.rmtree(folder)
    reloaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_array_equal(reloaded.predict(images, verbose=0), expected)
    served = tf.saved_model.load(str(tmp_path / "exports" / "saved_model" / "1")).signatures["serving_default"]
    np.testing.assert_allclose(served(images=tf.constant(images))["probabilities"], expected, atol=1e-5)


def test_a_config_alone_has_no_program(module):
    backbone = load_backbone(f"hub:{module}", image_size=SIZE_PX)
    with pytest.raises(InputError, match="cannot be cloned"):
        keras.models.clone_model(backbone)(np.zeros((1, SIZE_PX, SIZE_PX, 3), "float32"))


def test_an_anatomy_survives_json(folders):
    for folder in folders.values():
        anatomy = anatomy_of(folder)
        assert Anatomy.from_dict(json.loads(json.dumps(anatomy.to_dict()))) == anatomy


MIRRORED = """
import sys, keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, sys.argv[2])
import contextlib, tfxfer
from hub_modules import pictures
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
images, labels = pictures(24), np.arange(24) % 3
def train(scope):
    keras.utils.set_random_seed(0)
    with scope:
        model = tfxfer.build_model(tfxfer.get_source("hub:" + sys.argv[1]), 3, image_size=16, dropout=0.0)
        tfxfer.freeze(model, 1)
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    before = [w.numpy() for w in model.weights]
    model.fit(images, labels, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model, before, [w.numpy() for w in model.weights]
one, _, expected = train(contextlib.nullcontext())
two, before, found = train(strategy.scope())
for a, b in zip(expected, found, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
names = [w.path.rpartition("/")[2] for w, a, b in zip(two.weights, before, found) if a.tobytes() != b.tobytes()]
assert len(names) == 8 and not any("stem" in n or "moving" in n for n in names), names
np.testing.assert_allclose(two.predict(images, verbose=0), one.predict(images, verbose=0), atol=1e-6)
try:
    tfxfer.freeze(two, 0, batch_norm="train")
except tfxfer.InputError as error:
    assert "drift apart" in str(error)
else:
    raise AssertionError("statistics of replicas would drift apart")
print("done")
"""


def test_two_devices_train_as_one(module):
    done = subprocess.run(
        [sys.executable, "-c", MIRRORED, str(module), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout.strip().endswith("done"), done.stderr[-3000:]


# -- where it comes from ------------------------------------------------------------------------------------------


def test_an_archive_is_the_folder_in_it(module, tmp_path):
    pack(module, tmp_path / "small.tar.gz")
    packed, plain = get_source(f"hub:{tmp_path / 'small.tar.gz'}"), get_source(f"hub:{module}")
    assert packed.weights["sha256"] == plain.weights["sha256"]
    images = pictures(3).astype("float32") / 255
    found = load_backbone(packed, image_size=SIZE_PX).predict(images, verbose=0)
    np.testing.assert_array_equal(found, load_backbone(plain, image_size=SIZE_PX).predict(images, verbose=0))


def test_a_handle_is_found_in_the_cache_of_tensorflow_hub(module, tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    shutil.copytree(module, tmp_path / hashlib.sha1(HANDLE.encode()).hexdigest())
    card = get_source(f"hub:{HANDLE}")
    assert card.url == card.weights["file"] == HANDLE
    assert card.weights["sha256"] == get_source(f"hub:{module}").weights["sha256"]
    assert load_backbone(card, image_size=SIZE_PX).output_shape == (None, 5)


def test_offline_is_one_sentence(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(InputError, match=r"cannot be fetched \(Temporary failure.*give hub:FOLDER") as caught:
        get_source(f"hub:{HANDLE}")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_saved_model_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x", encoding="utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "saved_model.pb").write_bytes(b"\xff\xffnothing")
    for reference, sentence in {
        tmp_path / "absent": "does not exist",
        tmp_path / "empty": "holds no saved_model.pb",
        tmp_path / "file.txt": "neither a folder nor a .tar.gz",
        tmp_path / "broken": "saved_model.pb",
        "gs://bucket/model": "neither a path nor an https:// handle",
    }.items():
        with pytest.raises(InputError, match=sentence) as caught:
            get_source(f"hub:{reference}")
        assert "\n" not in str(caught.value)


def test_what_takes_no_images_is_one_sentence(tmp_path):
    class Text(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
        def __call__(self, words):
            return tf.strings.length(words)

    tf.saved_model.save(Text(), str(tmp_path / "text"))
    with pytest.raises(InputError, match="not batches of square images"):
        get_source(f"hub:{tmp_path / 'text'}")


def test_what_tensorflow_1_wrote_is_one_sentence(tmp_path):
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        images = v1.placeholder(tf.float32, (None, 16, 16, 3))
        features = tf.matmul(tf.reduce_mean(images, (1, 2)), v1.get_variable("w", (3, 4)))
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(tmp_path / "old"), {"x": images}, {"default": features})
    with pytest.raises(InputError, match="written by TensorFlow 1"):
        get_source(f"hub:{tmp_path / 'old'}")


def test_several_outputs_need_a_known_name(tmp_path):
    outputs = {"features": lambda x: {"features": x, "z": 2 * x}, "unknown": lambda x: {"a": x, "z": 2 * x}}
    folders = {name: save_module(tmp_path / name, Module(network(), made)) for name, made in outputs.items()}
    assert load_backbone(f"hub:{folders['features']}", image_size=SIZE_PX).output_shape == (None, 5)
    with pytest.raises(InputError, match="gives a, z, none of them called default or features"):
        load_backbone(f"hub:{folders['unknown']}", image_size=SIZE_PX)


def test_a_size_that_the_network_cannot_take_is_one_sentence(tmp_path):
    class Deep(tf.Module):
        @tf.function(input_signature=[images_spec()])
        def __call__(self, images):
            return tf.nn.avg_pool2d(images, 20, 1, "VALID")[:, 0, 0]

    tf.saved_model.save(Deep(), str(tmp_path / "deep"))
    with pytest.raises(InputError, match="cannot compute images of 16 px") as caught:
        load_backbone(f"hub:{tmp_path / 'deep'}", image_size=16)
    assert "\n" not in str(caught.value)


def test_files_that_changed_after_they_were_described_are_refused(module, tmp_path):
    folder = shutil.copytree(module, tmp_path / "copy")
    card = get_source(f"hub:{folder}")
    data = next((folder / "variables").glob("*.data*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(InputError, match=r"SHA-256.*changed or damaged"):
        load_backbone(card, image_size=SIZE_PX)


def save_hostile(folder: Path, canary: Path) -> Path:
    """A module that writes a file when it is called."""

    class Hostile(Module):
        @tf.function
        def __call__(self, images, training=False):
            tf.io.write_file(str(canary), "written")
            return self._net(images, training=training)

    return save_module(folder, Hostile(network()))


def test_a_program_that_writes_files_never_runs(tmp_path):
    folder = save_hostile(tmp_path / "hostile", tmp_path / "canary")
    (tmp_path / "canary").unlink(missing_ok=True)
    with pytest.raises(InputError, match="WriteFile"):
        get_source(f"hub:{folder}")
    assert not (tmp_path / "canary").exists()


def test_the_gate_stands_at_reload_too(module, tmp_path):
    """Someone puts another program into a saved model, and its digest into the config."""
    build(module).save(tmp_path / "model.keras")
    hostile = save_hostile(tmp_path / "hostile", tmp_path / "canary")
    (tmp_path / "canary").unlink(missing_ok=True)
    for digest, sentence in ((None, "SHA-256"), (tfxfer_digest(hostile), "WriteFile")):
        with zipfile.ZipFile(tmp_path / "model.keras") as old, zipfile.ZipFile(tmp_path / "bad.keras", "w") as new:
            for name in old.namelist():
                content = old.read(name)
                inside = name.partition("/saved_model/")[2]
                if inside and (hostile / inside).is_file():
                    content = (hostile / inside).read_bytes()
                if name == "config.json" and digest:
                    content = content.replace(tfxfer_digest(module).encode(), digest.encode())
                new.writestr(name, content)
        with pytest.raises(ValueError, match=sentence):
            keras.models.load_model(tmp_path / "bad.keras", compile=False)
    assert not (tmp_path / "canary").exists()


def tfxfer_digest(folder: Path) -> str:
    from tfxfer.runtime.files import sha256_of_folder

    return sha256_of_folder(folder)


# -- a whole run --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_a_hub_module_reloads_elsewhere(digits_folder, module, tmp_path):
    folder = shutil.copytree(module, tmp_path / "source")
    run = tfxfer.fit(
        f"hub:{folder}", digits_folder, image_size=32, epochs=2, learning_rate=1e-3, freeze_depth=1, baseline="none",
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.info["freeze_audit"]["bit_identical"] and run.info["source"]["sha256"] == tfxfer_digest(module)
    assert all(certificate["passed"] for certificate in run.info["certificates"])
    shutil.rmtree(folder)
    moved = tfxfer.load_run(shutil.move(tmp_path / "run", tmp_path / "elsewhere"))
    images = pictures(4, size_px=32)
    np.testing.assert_allclose(moved.model.predict(images, verbose=0), moved.predict(images), atol=1e-4)


def test_the_source_may_be_named_otherwise(module):
    card = dataclasses.replace(get_source(f"hub:{module}"), name="small")
    assert tfxfer.build_model(card, 2, image_size=SIZE_PX).name == "small"


def test_what_keras_exported_asks_for_its_range(folders):
    with pytest.raises(InputError, match=r"does not say what pixels it wants; give --input-range: 0\.\.255, 0\.\.1"):
        get_source(f"hub:{folders['export']}")
    assert get_source(f"hub:{folders['export']}", input_range="0..255").scale == (1.0,) * 3


def test_a_program_that_goes_on_augmenting_is_refused(tmp_path):
    net = network(SIZE_PX)
    inputs = keras.Input((SIZE_PX, SIZE_PX, 3))
    flipped = keras.layers.RandomFlip("horizontal")(inputs, training=True)
    keras.Model(inputs, keras.layers.Flatten()(net.get_layer("stem_conv")(flipped))).export(tmp_path / "flip")
    card = get_source(f"hub:{tmp_path / 'flip'}", input_range="0..255")
    with pytest.raises(InputError, match="gives different numbers for the same image"):
        load_backbone(card, image_size=SIZE_PX)
