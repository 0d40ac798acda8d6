"""The user's own networks: what a function of theirs returns, and models given in Python."""

import keras
import numpy as np
import pytest
from keras import layers
from keras_networks import backbone, flat, nested, normalised, photos, with_values

import tfxfer
from tfxfer.errors import InputError
from tfxfer.model.build import build_model, build_original
from tfxfer.sources.catalog import get_source, load_backbone, load_with_report
from tfxfer.sources.own import source_from_model
from tfxfer.specs import Plan

MODULE = """
import keras
import numpy as np

CALLS = []

def network(image_size=48):
    CALLS.append(image_size)
    keras.utils.set_random_seed(7)
    inputs = keras.Input((image_size, image_size, 3))
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = keras.layers.Conv2D(4, 3, name="one")(x)
    x = keras.layers.Conv2D(6, 3, name="two")(x)
    return keras.Model(inputs, keras.layers.Dense(5, name="out")(keras.layers.GlobalAveragePooling2D()(x)))

def bare():
    return keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Conv2D(2, 3), keras.layers.Flatten()])

def number():
    return 7

def failing():
    raise KeyError("gone")

NOT_A_FUNCTION = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the current folder, called as no other test's is."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # undone behind the test, unlike what the source adds itself
    return name


# -- py:MODULE:FUNCTION ----------------------------------------------------------------------------------------------


def test_a_function_gives_its_network_with_its_weights(module):
    card = get_source(f"py:{module}:network")
    assert (card.image_size_px, card.num_classes, card.kind) == (48, 5, "own") and card.offset == (-1.0,) * 3
    own = __import__(module)
    model, images = own.network(64), photos(size_px=64)
    expected = keras.Model(model.input, model.layers[-2].output).predict(images, verbose=0)
    found, report = load_with_report(card, image_size=64)
    assert report is None and own.CALLS[-1] == 64, "called with the size where it takes one"
    np.testing.assert_allclose(found.predict(normalised(card, images), verbose=0), expected, atol=1e-5)
    assert [block.name for block in tfxfer.list_blocks(found)] == ["one", "two"]


def test_with_weights_from_a_file(module, tmp_path):
    model = with_values(__import__(module).network(48))
    model.save_weights(tmp_path / "trained.weights.h5")
    card = get_source(f"py:{module}:network", weights=tmp_path / "trained.weights.h5")
    ours = build_original(card).predict(photos(size_px=48), verbose=0)
    expected = keras.activations.softmax(model.predict(photos(size_px=48), verbose=0)).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    report = load_with_report(card)[1]
    assert report.names("matched") == ("one", "two") and report.names("unused") == ("out",)
    content = bytearray((tmp_path / "trained.weights.h5").read_bytes())
    content[-9] ^= 1
    (tmp_path / "trained.weights.h5").write_bytes(content)
    with pytest.raises(InputError, match=r"trained.weights.h5 has SHA-256"):
        load_backbone(card)


def test_weights_in_part(module, tmp_path):
    first = keras.Sequential([keras.Input((16, 16, 3)), layers.Conv2D(4, 3, name="one")], name="first")
    with_values(first).save(tmp_path / "first.h5")
    with pytest.raises(InputError, match=r"(?s)give --partial.*missing: two"):
        load_backbone(get_source(f"py:{module}:network", weights=tmp_path / "first.h5"))
    card = get_source(f"py:{module}:network", weights=tmp_path / "first.h5", partial=True)
    found, report = load_with_report(card)
    assert report.names("matched") == ("one",) and report.names("missing") == ("two",)
    assert np.array_equal(found.get_layer("one").get_weights()[0], first.get_weights()[0])
    # What no file fills is what the function made.
    assert np.array_equal(
        found.get_layer("two").get_weights()[0], __import__(module).network().get_layer("two").get_weights()[0]
    )


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{}:netwrk", r"has no function 'netwrk'. Did you mean 'network'"),
        ("{}:NOT_A_FUNCTION", r"has no function 'NOT_A_FUNCTION'"),
        ("{}:number", r"must return a keras.Model, not int"),
        ("{}:failing", r"failed: KeyError: 'gone'"),
        ("{}:bare", r"give --input-range as it was trained"),
        ("{}", r"must be py:MODULE:FUNCTION"),
        ("no_such_module_at_all:f", r"there is no module 'no_such_module_at_all'"),
        ("given:nothing", r"No model was given as 'nothing' in this process"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(module, reference, message):
    with pytest.raises(InputError, match=message):
        get_source("py:" + reference.format(module))


def test_a_plan_keeps_the_spelling(module):
    from tfxfer.workflow.planning import make_plan, source_of

    plan = make_plan(source=f"py:{module}:bare", input_range="0..1", method="probe")
    assert plan.image_size == 16 and source_of(Plan.from_dict(plan.to_dict())).scale == (1 / 255,) * 3


# -- models given in Python ------------------------------------------------------------------------------------------


def test_a_model_is_copied_with_its_weights_and_not_changed():
    source = with_values(nested())
    before, names = source.get_weights(), [layer.name for layer in source.layers]
    images = photos()
    pooled = keras.Model(source.input, source.get_layer("pooling").output).predict(images, verbose=0)
    target = build_model(source, ["a", "b"])
    inside = keras.Model(target.input, target.get_layer("dropout").input)
    np.testing.assert_allclose(inside.predict(images, verbose=0), pooled, atol=1e-5)

    source.trainable = False  # the classic mistake: it freezes nothing of the target
    assert all(weight.trainable for weight in target.layers[3].get_layer("stem_conv").weights)
    target.compile("sgd", "sparse_categorical_crossentropy")
    target.fit(images, np.array([0, 1, 0]), verbose=0)
    assert all(np.array_equal(*pair) for pair in zip(before, source.get_weights(), strict=True))
    assert names == [layer.name for layer in source.layers]


def test_a_given_model_has_a_name_for_plans():
    model = with_values(flat())
    card = source_from_model(model, name="flat_1", input_range="0..1", image_size=40)
    assert card.name == "py:given:flat_1" and card.image_size_px == 40
    assert get_source(card.name) == card
    model.set_weights([0 * value for value in model.get_weights()])  # later changes do not reach the source
    assert np.abs(load_backbone(card.name).get_weights()[0]).max() > 0
    source_from_model(model, name="flat_1", input_range="0..1")
    with pytest.raises(InputError, match=r"Another model was given as py:given:flat_1 since"):
        load_backbone(card)


def test_the_range_of_a_given_model_must_be_known():
    with pytest.raises(InputError, match=r"The model 'flat' does not say.*--input-range"):
        build_model(flat(), 2)
    assert build_model(flat(), 2, input_range="-1..1").get_layer("normalise").offset == [-1.0] * 3


def test_normalization_of_a_given_model_is_folded():
    statistics = layers.Normalization(name="statistics")
    statistics.adapt(photos(20, size_px=16))
    stack = [keras.Input((16, 16, 3)), statistics, layers.Conv2D(3, 3), layers.GlobalAveragePooling2D()]
    model = keras.Sequential([*stack, layers.Dense(2)])
    ours = build_original(source_from_model(model, name="normalised"))
    assert not any(isinstance(layer, layers.Normalization) for layer in ours._flatten_layers())
    expected = keras.activations.softmax(model.predict(photos(size_px=16), verbose=0)).numpy()
    np.testing.assert_allclose(ours.predict(photos(size_px=16), verbose=0), expected, atol=1e-5)


class Halved(layers.Layer):
    """Not registered: a class that only this process knows."""

    def call(self, x):
        return x / 2


def test_a_given_model_may_have_classes_of_the_users_own():
    stack = [keras.Input((16, 16, 3)), layers.Rescaling(1 / 255), layers.Conv2D(3, 3), Halved()]
    model = with_values(keras.Sequential([*stack, layers.GlobalAveragePooling2D()]))
    card = source_from_model(model, name="halved")
    found = load_backbone(card).predict(normalised(card, photos(size_px=16)), verbose=0)
    np.testing.assert_allclose(found, model.predict(photos(size_px=16), verbose=0), atol=1e-5)


def test_models_without_a_graph_or_a_shape_are_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(InputError, match=r"is a subclassed keras.Model without a graph"):
        build_model(Own(), 2)
    with pytest.raises(InputError, match=r"is not built: its input shape is not known"):
        build_model(keras.Sequential([layers.Conv2D(2, 3)]), 2)
    grey = keras.Sequential(
        [keras.Input((16, 16, 1)), layers.Rescaling(1 / 255), layers.Conv2D(2, 3), layers.Flatten()]
    )
    with pytest.raises(InputError, match=r"has weights of the shapes .*for RGB images"):
        build_model(grey, 2)


def test_one_short_training_from_a_given_model(tmp_path, digits):
    images, labels = digits
    chosen = np.flatnonzero(labels < 2)[:60]
    model = keras.Sequential([keras.Input((32, 32, 3)), layers.Rescaling(1 / 255), backbone()])
    card = source_from_model(model, name="for_training")
    run = tfxfer.fit(
        card.name, (images[chosen], labels[chosen]), method="probe", baseline="none", formats=(), augment="none",
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.info["source"]["name"] == "py:given:for_training" and len(run.info["source"]["sha256"]) == 64
    assert run.metrics["test"]["accuracy"]["value"] > 0.8 and run.model.name == "py_given_for_training"
