"""A weights file goes into a network layer by layer, and the report says what became of each."""

import h5py
import keras
import numpy as np
import pytest
import tf_keras
from keras import layers
from keras_networks import backbone, flat, nested, photos, with_values

from tfxfer.errors import InputError
from tfxfer.sources.report import LayerReport, LoadReport, joined
from tfxfer.sources.weights_file import adapt_channels, load_weights_file

KINDS = ("whole.h5", "whole.keras", "numbers.weights.h5")


def save(model, path):
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    return path


def equal(left, right):
    return all(np.array_equal(*pair) for pair in zip(left, right, strict=True))


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    model = with_values(flat())
    return model, save(model, tmp_path_factory.mktemp("weights") / request.param)


def test_the_same_network_matches_whole(saved):
    model, path = saved
    other = flat()
    report = load_weights_file(other, path)
    assert report.complete and report.loaded_share == 1.0
    assert report.names("matched") == ("a_conv", "a_depthwise", "a_bn", "b", "c") and len(report.layers) == 5
    assert equal(model.get_weights(), other.get_weights())


def test_renamed_layers_are_found_by_order_and_shape_and_said_to_be(saved):
    model, path = saved
    other = flat(names=("x", "y", "z"))
    report = load_weights_file(other, path)
    assert report.names("renamed") == ("x_conv", "x_depthwise", "x_bn", "y", "z")
    assert report.layers[0].detail == "from a_conv" and "renamed: z: from c" in str(report)
    assert equal(model.get_weights(), other.get_weights())


def test_another_number_of_classes_fails_unless_partial(saved):
    model, path = saved
    other = flat(num_classes=2)
    before = other.get_weights()
    with pytest.raises(InputError, match=r"(?s)does not fit the network 'flat' whole; give --partial.*1 differs"):
        load_weights_file(other, path)
    assert equal(before, other.get_weights()), "nothing was loaded"
    report = load_weights_file(other, path, partial=True)
    assert report.names("differs") == ("c",) and len(report.names("matched")) == 4
    assert "(6, 4)" in report.layers[4].detail and "(6, 2)" in report.layers[4].detail
    assert report.loaded_share == pytest.approx(1 - other.get_layer("c").count_params() / other.count_params())
    assert equal(model.get_weights()[:-2], other.get_weights()[:-2]) and equal(before[-2:], other.get_weights()[-2:])


def test_the_first_part_of_a_network(saved):
    model, path = saved
    whole = flat()
    first = keras.Model(whole.inputs, whole.layers[2].output)
    report = load_weights_file(first, path)
    assert report.complete and report.names("unused") == ("b", "c")
    assert equal(model.get_weights()[:8], first.get_weights())


def test_a_longer_network_takes_what_there_is_and_lists_what_is_missing(saved):
    model, path = saved
    whole = flat()
    longer = keras.Model(whole.inputs, layers.Dense(2, name="more")(whole.outputs[0]))
    report = load_weights_file(longer, path, partial=True)
    assert report.names("missing") == ("more",) and not report.names("unused")
    assert equal(model.get_weights(), longer.get_weights()[:-2])


@pytest.mark.parametrize("channels", [1, 4])
def test_another_number_of_input_channels(saved, channels):
    model, path = saved
    other = flat(channels=channels)
    with pytest.raises(InputError, match=r"a_conv"):
        load_weights_file(other, path)
    report = load_weights_file(other, path, partial=True)
    assert report.complete and report.layers[0].detail == f"3 input channels made {channels}"
    assert f"matched: a_conv: 3 input channels made {channels}" in str(report)
    grey = photos(size_px=16, channels=1)
    expected = model.predict(np.repeat(grey, 3, -1), verbose=0)
    found = other.predict(np.repeat(grey, channels, -1), verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)  # where all channels agree nothing changes


def test_adapted_kernels_keep_the_scale_of_activations():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 5)).astype("float32")
    np.testing.assert_allclose(adapt_channels(kernel, 1), kernel.sum(2, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(adapt_channels(kernel, 7).sum(2), kernel.sum(2), rtol=1e-4, atol=1e-6)
    assert adapt_channels(kernel, 3) is kernel and adapt_channels(kernel, 7).dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_names_by_counting_do_not_decide(tmp_path, kind):
    """`by_name=True` of Keras gives the first convolution here the weights of the second one."""

    def network(first):
        names = [f"conv2d_{number}" if number else "conv2d" for number in range(first, first + 3)]
        convolutions = [layers.Conv2D(3, 3, name=name) for name in names]
        return keras.Sequential([keras.Input((16, 16, 3)), *convolutions], name="counted")

    model = with_values(network(0))
    path = save(model, tmp_path / kind)
    other = network(1)
    report = load_weights_file(other, path)
    assert report.complete and report.names("renamed") == ("conv2d_1", "conv2d_2", "conv2d_3")
    assert equal(model.get_weights(), other.get_weights())


def test_a_new_layer_of_a_shape_that_is_there_does_not_take_anothers_weights(tmp_path):
    def network(names):
        dense = [layers.Dense(4, name=name) for name in names]
        return keras.Sequential([keras.Input((4,)), *dense], name="doubtful")

    path = save(with_values(network("abc")), tmp_path / "m.h5")
    report = load_weights_file(network(["a", "new", "newer", "c"]), path, partial=True)
    assert report.names("matched") == ("a", "c") and report.names("missing") == ("new", "newer")
    assert report.names("unused") == ("b",)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_takes_its_part_of_a_nested_model(tmp_path, kind):
    model = with_values(nested())
    path = save(model, tmp_path / kind)
    alone = backbone()
    report = load_weights_file(alone, path)
    assert report.complete and report.names("unused") == ("out",)
    assert len(report.names("matched")) == 6
    assert equal(model.get_layer("mini").get_weights(), alone.get_weights())


@pytest.mark.parametrize("frozen", [False, True])
def test_keras_2_weights_with_a_nested_backbone(tmp_path, frozen):
    old = with_values(nested(tf_keras))
    if frozen:  # then their arrays come last in the file
        for layer in old.get_layer("mini").layers[:4]:
            layer.trainable = False
    old.save(tmp_path / "old.h5")
    old.save_weights(tmp_path / "weights.h5")
    images = photos()
    for name in ("old.h5", "weights.h5"):
        new = nested()
        assert load_weights_file(new, tmp_path / name).complete
        np.testing.assert_allclose(new.predict(images, verbose=0), old.predict(images, verbose=0), atol=1e-6)


def test_long_lists_of_names_are_parted_by_keras_2(tmp_path):
    """64 KiB an attribute: names go to weight_names0, weight_names1, ..."""
    inputs = x = tf_keras.Input((4,))
    for number in range(500):
        x = tf_keras.layers.Dense(1, name=f"layer_{number:04d}_{'x' * 150}", use_bias=number % 2 == 0)(x)
    tf_keras.Model(inputs, x).save_weights(tmp_path / "long.h5")
    with h5py.File(tmp_path / "long.h5") as file:
        assert "layer_names0" in file.attrs
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, name=f"layer_0000_{'x' * 150}")])
    report = load_weights_file(model, tmp_path / "long.h5")
    assert report.complete and len(report.names("unused")) == 499


def test_files_of_older_keras_3_have_classes_and_numbers_only(tmp_path):
    model = with_values(flat())
    path = save(model, tmp_path / "old.weights.h5")
    with h5py.File(path, "r+") as file:
        file.visititems(lambda _, item: item.attrs.pop("name", None) and None)
    other = flat()
    report = load_weights_file(other, path)
    assert report.complete and report.layers[3].detail == "from conv2d_1"
    assert equal(model.get_weights(), other.get_weights())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_inside_layers_go_with_them(tmp_path, kind):
    def network():
        inputs = keras.Input((5, 8))
        x = layers.MultiHeadAttention(2, 4, name="attend")(inputs, inputs)
        x = layers.Normalization(name="norm")(x)
        return keras.Model(inputs, layers.Dense(3, name="query")(x), name="attention")

    model = with_values(network())
    path = save(model, tmp_path / kind)
    other = network()
    assert load_weights_file(other, path).names("matched") == ("attend", "norm", "query")
    assert equal(model.get_weights(), other.get_weights())


def test_a_flipped_bit_a_missing_and_a_foreign_file_are_refused(tmp_path):
    model = flat()
    with pytest.raises(InputError, match=r"is not built: call it once"):
        load_weights_file(keras.Sequential([layers.Dense(2)]), tmp_path / "none.h5")
    with pytest.raises(InputError, match=r"There is no file .*none.h5"):
        load_weights_file(model, tmp_path / "none.h5")
    (tmp_path / "torch.pth").write_bytes(b"x")
    with pytest.raises(InputError, match=r"torch.pth is not a Keras file; its name must end in"):
        load_weights_file(model, tmp_path / "torch.pth")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(InputError, match=r"text.h5' was not loaded"):
        load_weights_file(model, tmp_path / "text.h5")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_numbers_are_refused_before_any_is_set(tmp_path, kind):
    model = with_values(flat())
    model.get_layer("c").set_weights([np.full((6, 4), np.nan), np.zeros(4)])
    path = save(model, tmp_path / kind)
    other = flat()
    before = other.get_weights()
    with pytest.raises(InputError, match=r"NaN or infinity in 'c/"):
        load_weights_file(other, path)
    assert equal(before, other.get_weights())


def test_a_huge_declared_shape_is_compared_before_it_is_read(tmp_path):
    path = save(with_values(flat()), tmp_path / "huge.h5")
    with h5py.File(path, "r+") as file:
        group = file["model_weights/c"]
        names = [text.decode() if isinstance(text, bytes) else text for text in group.attrs["weight_names"]]
        name = next(text for text in names if "bias" in text)
        del group[name]
        group.create_dataset(name, shape=(2**22,), dtype="f4", chunks=(1024,))
    report = load_weights_file(flat(), path, partial=True)
    assert report.names("differs") == ("c",) and "(4194304,) in the file" in report.layers[4].detail


def test_nothing_that_fits_is_an_error_even_when_partial(saved):
    _, path = saved
    tiny = keras.Sequential([keras.Input((2,)), layers.Dense(9, name="q")], name="tiny")
    with pytest.raises(InputError, match=r"Nothing in .* fits the network 'tiny'"):
        load_weights_file(tiny, path, partial=True)


def test_a_few_shapes_that_agree_by_chance_are_no_part_of_a_network(tmp_path):
    """Under two hundredths of the parameters, none by name: that is another network, asked for in part or not."""
    many = [layers.Conv2D(64, 3, name=f"here_{index}") for index in range(3)]
    net = keras.Sequential([keras.Input((16, 16, 3)), *many, layers.Dense(2, name="top")], name="net")
    others = [layers.Conv2D(5, 5, name="there"), layers.Dense(64, name="wide"), layers.Dense(2, name="last")]
    file = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((16, 16, 3)), *others], name="other").save_weights(file)
    before = net.get_weights()
    with pytest.raises(InputError, match=r"1 of 4 layers .* of another network"):
        load_weights_file(net, file, partial=True)
    assert equal(before, net.get_weights())


def test_the_report_goes_into_run_json():
    rows = (LayerReport("a", "matched", 10), LayerReport("b", "matched", 5, "3 input channels made 1"))
    report = joined([LoadReport("x.h5", rows), LoadReport("y.h5", (LayerReport("c", "missing", 5),))])
    assert report.to_dict() == {
        "path": "x.h5, y.h5",
        "counts": {"matched": 2, "renamed": 0, "differs": 0, "missing": 1, "unused": 0},
        "loaded_share": 0.75,
        "layers": [
            {"layer": "b", "state": "matched", "num_parameters": 5, "detail": "3 input channels made 1"},
            {"layer": "c", "state": "missing", "num_parameters": 5, "detail": ""},
        ],
    }


def test_layers_that_keras_counted_are_found_by_their_order(tmp_path):
    def trunk(count):
        convolutions = [keras.layers.Conv2D(3, 3, padding="same") for _ in range(count)]
        return keras.Sequential([keras.Input((8, 8, 3)), *convolutions])

    whole = with_values(trunk(6), seed=5)
    whole.save(tmp_path / "six.keras")
    first = trunk(3)  # Keras counted on: its names are those of the last three of the file, if anything
    load_weights_file(first, tmp_path / "six.keras", partial=True)
    for one, other in zip(first.weights, whole.weights[:6], strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
