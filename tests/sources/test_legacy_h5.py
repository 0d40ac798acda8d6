"""Weights from the .h5 that `model.save("x.h5")` writes: what fits is loaded, what does not is listed."""

import dataclasses

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from tfxfer.errors import InputError
from tfxfer.sources import legacy_h5
from tfxfer.sources.catalog import get_source, load_backbone
from tfxfer.sources.legacy_h5 import load_matching_weights, weights_path
from tfxfer.sources.report import LayerReport

DIGITS_H5 = weights_path("digits_cnn", "digits_cnn.h5")


def network(num_classes=4, names=("a", "b", "c"), width=8):
    """Convolutions, BatchNorm and a Dense layer: enough for every kind of variable."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name=f"{names[0]}_conv"),
            layers.DepthwiseConv2D(3, name=f"{names[0]}_depthwise"),
            layers.BatchNormalization(name=f"{names[0]}_bn"),
            layers.Flatten(),
            layers.Dense(width, name=names[1]),
            layers.Dense(num_classes, name=names[2]),
        ]
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network with a value of its own in every variable, and its .h5."""
    model = network()
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=weight.shape) for weight in model.weights])
    path = tmp_path_factory.mktemp("h5") / "whole.h5"
    model.save(path)
    return model, path


def same(model, other, names):
    return all(
        np.array_equal(left, right)
        for name in names
        for left, right in zip(
            model.get_layer(name[0]).get_weights(), other.get_layer(name[1]).get_weights(), strict=True
        )
    )


def test_by_order_loads_a_rebuilt_network_whatever_its_names(saved):
    model, path = saved
    other = network(names=("x", "y", "z"))
    report = load_matching_weights(other, path)
    assert report.names("renamed") == ("x_conv", "x_depthwise", "x_bn", "y", "z") and report.complete
    assert report.layers[0].detail == "from a_conv"
    assert all(
        np.array_equal(left, right) for left, right in zip(model.get_weights(), other.get_weights(), strict=True)
    )


def test_a_frozen_batch_norm_takes_each_variable_from_its_own(saved):
    model, path = saved
    other = network()
    other.trainable = False
    assert load_matching_weights(other, path).complete
    assert all(
        np.array_equal(left, right) for left, right in zip(model.get_weights(), other.get_weights(), strict=True)
    )


def test_another_output_is_listed_and_left_as_it_was(saved):
    model, path = saved
    other = network(num_classes=2)
    before = other.get_layer("c").get_weights()
    report = load_matching_weights(other, path)
    assert report.names("matched") == ("a_conv", "a_depthwise", "a_bn", "b") and not report.complete
    difference = "kernel (8, 4), bias (4,) in the file; kernel (8, 2), bias (2,) in the model"
    assert report.layers[4] == LayerReport("c", "differs", 18, difference) and len(report.layers) == 5
    assert str(report) == (
        f"{path}: 688 of 706 parameters (97.5 %) loaded: 4 layers matched, 1 differs\n  differs: c: {difference}"
    )
    assert same(model, other, [(name, name) for name in report.names("matched")])
    assert all(
        np.array_equal(left, right) for left, right in zip(before, other.get_layer("c").get_weights(), strict=True)
    )


def test_by_name_loads_what_has_the_name_and_lists_the_rest(saved):
    model, path = saved
    other = network(names=("a", "new", "c"))
    report = load_matching_weights(other, path, by="name")
    assert report.names("matched") == ("a_conv", "a_depthwise", "a_bn", "c")
    assert report.names("missing") == ("new",) and report.names("unused") == ("b",)
    assert "  missing: new\n  unused: b" in str(report)
    assert same(model, other, [(name, name) for name in report.names("matched")])


def test_variables_of_other_names_are_not_mixed_up(tmp_path):
    """Equal shapes, other meaning: gamma and beta of a BatchNorm, kernel and bias of a Dense(4) on 1 feature."""
    keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="n")]).save(tmp_path / "bn.h5")
    other = keras.Sequential([keras.Input((4,)), layers.LayerNormalization(name="n"), layers.Dense(1, name="d")])
    with pytest.raises(
        InputError, match=r"moving_mean \(4,\), moving_variance \(4,\) in the file; nothing in the model"
    ):
        load_matching_weights(other, tmp_path / "bn.h5", by="name")


def test_a_nested_model_loads_in_the_order_of_the_file_only(tmp_path):
    def nested(name):
        inner = keras.Sequential(
            [keras.Input((4,)), layers.Dense(4, name="one"), layers.Dense(4, name="two")], name=name
        )
        return keras.Sequential([keras.Input((4,)), inner, layers.Dense(2, name="out")])

    model = nested("inner")
    model.save(tmp_path / "nested.h5")
    other = nested("other")
    assert load_matching_weights(other, tmp_path / "nested.h5").names("matched", "renamed") == ("other", "out")
    assert all(
        np.array_equal(left, right) for left, right in zip(model.get_weights(), other.get_weights(), strict=True)
    )
    frozen = nested("frozen")
    frozen.get_layer("frozen").get_layer("one").trainable = False  # its arrays come last now: same shapes, other order
    report = load_matching_weights(frozen, tmp_path / "nested.h5")
    assert report.names("matched", "renamed") == ("out",)
    assert report.layers[0].state == "differs" and report.layers[0].detail.startswith(
        "one/kernel (4, 4), one/bias (4,)"
    )


def test_the_depthwise_kernels_of_keras_2_are_known(saved, tmp_path):
    model, path = saved
    old = tmp_path / "keras2.h5"
    old.write_bytes(path.read_bytes())
    with h5py.File(old, "r+") as file:
        group = file["model_weights/a_depthwise"]
        names = [name.decode() if isinstance(name, bytes) else name for name in group.attrs["weight_names"]]
        group.move(names[0], "a_depthwise/depthwise_kernel:0")
        group.attrs["weight_names"] = [b"a_depthwise/depthwise_kernel:0", names[1].encode()]
    other = network()
    assert load_matching_weights(other, old).complete
    assert same(model, other, [("a_depthwise", "a_depthwise")])


def test_another_number_of_layers_is_refused_by_order(saved):
    _, path = saved
    short = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="a_conv")])
    with pytest.raises(
        InputError, match=r"has 5 layers with weights \(a_conv, .*\) and the model 1 \(a_conv\).* by='name'"
    ):
        load_matching_weights(short, path)
    assert load_matching_weights(short, path, by="name").names("matched") == ("a_conv",)


def test_nothing_that_fits_is_an_error(saved):
    _, path = saved
    with pytest.raises(InputError, match=r"No layer of 'tiny' fits .*, nothing was loaded"):
        tiny = keras.Sequential([keras.Input((2,)), layers.Dense(2, name="q")], name="tiny")
        load_matching_weights(tiny, path, by="name")


def test_files_of_other_kinds_are_refused(saved, tmp_path):
    model, path = saved
    with pytest.raises(InputError, match=r"there is no such file"):
        load_matching_weights(model, tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(InputError, match=r"it is not HDF5"):
        load_matching_weights(model, tmp_path / "text.h5")
    (tmp_path / "cut.h5").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"it is not HDF5"):
        load_matching_weights(model, tmp_path / "cut.h5")
    model.save_weights(tmp_path / "new.weights.h5")
    with pytest.raises(InputError, match=r"are loaded by model.load_weights"):
        load_matching_weights(model, tmp_path / "new.weights.h5")
    with pytest.raises(InputError, match=r"`by` must be 'order' or 'name', not 'topology'"):
        load_matching_weights(model, path, by="topology")


def test_a_huge_declared_shape_and_foreign_files_are_not_read(saved, tmp_path):
    _, path = saved
    before = (model := network()).get_weights()
    for number, change in enumerate((_huge, _linked, _external)):
        hostile = tmp_path / f"hostile{number}.h5"
        hostile.write_bytes(path.read_bytes())
        with h5py.File(hostile, "r+") as file:
            group = file["model_weights/c"]
            name = group.attrs["weight_names"][1]
            del group[name]
            change(group, name, path)
        with pytest.raises(InputError, match=r"was not loaded"):
            load_matching_weights(model, hostile)
        assert all(np.array_equal(left, right) for left, right in zip(before, model.get_weights(), strict=True))


def _huge(group, name, _):
    group.create_dataset(name, shape=(2**40,), dtype="f4", chunks=(1024,))


def _linked(group, name, other):
    with h5py.File(other, "r") as file:
        target = file["model_weights/c"].attrs["weight_names"][1]
        target = target.decode() if isinstance(target, bytes) else target
    group[name] = h5py.ExternalLink(str(other), f"model_weights/c/{target}")


def _external(group, name, other):
    group.create_dataset(name, shape=(4,), dtype="f4", external=[(str(other), 0, 16)])


def test_the_shipped_file_is_what_the_card_says_and_keras_loads_it_alike():
    source = get_source("digits_cnn")
    with h5py.File(DIGITS_H5) as file:
        assert "model_config" in file.attrs and "optimizer_weights" not in file
    assert DIGITS_H5.stat().st_size < 1_000_000
    model = load_backbone(source, include_top=True)
    whole = keras.models.load_model(DIGITS_H5, compile=False)
    images = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(np.array(model(images)), np.array(whole(images)))
    features = np.array(load_backbone(source)(images))
    logits = features @ whole.get_layer("logits").get_weights()[0] + whole.get_layer("logits").get_weights()[1]
    np.testing.assert_allclose(logits, np.array(whole(images)), atol=1e-4)


def test_a_changed_or_missing_file_of_a_source_is_refused(tmp_path, monkeypatch):
    source = get_source("digits_cnn")
    wrong = dataclasses.replace(source, weights={**source.weights, "sha256": "0" * 64})
    with pytest.raises(
        InputError, match=rf"digits_cnn.h5 has SHA-256 {source.weights['sha256']}, but the card .* says 0{{64}}"
    ):
        load_backbone(wrong)
    absent = dataclasses.replace(source, weights={**source.weights, "file": "none.h5"})
    with pytest.raises(InputError, match=r"none.h5, the weights of 'digits_cnn', is missing; install tfxfer again"):
        load_backbone(absent)
    other = network()
    with pytest.raises(InputError, match=r"No layer of"):
        legacy_h5.load_weights(source, other)
