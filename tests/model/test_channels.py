import keras
import numpy as np
import onnxruntime
import pytest
from small_networks import SIZE_PX, norm_backbone

import tfxfer
from tfxfer.errors import InputError
from tfxfer.model.channels import card_for_channels, with_channels
from tfxfer.sources.catalog import get_source, load_backbone


def images_of(channels: int, size_px: int = SIZE_PX, count: int = 4) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 256, (count, size_px, size_px, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_where_all_channels_show_the_same_the_network_gives_what_it_gave(channels):
    backbone = norm_backbone()
    grey = images_of(1).astype("float32")
    wider = with_channels(backbone, channels)
    np.testing.assert_allclose(
        wider(np.repeat(grey, channels, axis=-1)), backbone(np.repeat(grey, 3, axis=-1)), rtol=1e-4, atol=1e-4
    )


def test_above_three_the_first_three_keep_their_kernels():
    backbone = norm_backbone()
    old, new = (net.get_layer("a_conv").kernel.numpy() for net in (backbone, with_channels(backbone, 5)))
    np.testing.assert_allclose(new[:, :, :3], old * 3 / 5, rtol=1e-6)
    np.testing.assert_allclose(new[:, :, 3], old.mean(axis=2) * 3 / 5, rtol=1e-5)
    np.testing.assert_array_equal(new[:, :, 4], new[:, :, 3])


def test_the_card_has_a_scale_for_each_channel():
    card = get_source("mobilenet_v2_imagenet")
    wide = card_for_channels(card, 5)
    assert wide.scale[:3] == card.scale and wide.scale[3] == wide.scale[4] == pytest.approx(np.mean(card.scale))
    assert card_for_channels(card, 1).offset == (pytest.approx(np.mean(card.offset)),)
    assert card_for_channels(card, 3) is card


def test_a_network_of_five_channels_trains_is_saved_and_exported(tmp_path):
    model = tfxfer.build_model("digits_cnn", ["a", "b"], channels=5)
    tfxfer.freeze(model, "conv2")
    images = images_of(5, 40, 12)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(images, np.arange(12) % 2, verbose=0)
    expected = model.predict(images, verbose=0)
    model.save(tmp_path / "five.keras")
    again = keras.models.load_model(tmp_path / "five.keras")
    np.testing.assert_array_equal(again.predict(images, verbose=0), expected)
    certificates = tfxfer.export(model, tmp_path / "exports", samples=images_of(5, 32), class_names=["a", "b"])
    assert all(certificate.passed for certificate in certificates)
    session = onnxruntime.InferenceSession(str(tmp_path / "exports/model.onnx"))
    assert session.get_inputs()[0].shape == ["batch", "height", "width", 5]
    np.testing.assert_allclose(session.run(["probabilities"], {"images": images})[0], expected, atol=1e-4)


def test_bad_numbers_and_networks_without_a_convolution_are_refused():
    with pytest.raises(InputError, match="at least 1, not 0"):
        with_channels(norm_backbone(), 0)
    flat = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2)], name="flat")
    with pytest.raises(InputError, match=r"'flat' cannot (take|be built for) 5 channels"):
        with_channels(flat, 5)


def test_rows_of_shared_classes_come_from_the_source():
    names = ["seven", "7", "other", "0"]
    model = tfxfer.build_model("digits_cnn", names)
    before = model.get_layer("logits").get_weights()
    assert tfxfer.keep_source_classes(model, "digits_cnn", names) == {"7": "7", "0": "0"}
    kernel, bias = model.get_layer("logits").get_weights()
    theirs = load_backbone("digits_cnn", include_top=True).layers[-1].get_weights()
    for row, source_row in ((1, 7), (3, 0)):
        np.testing.assert_array_equal(kernel[:, row], theirs[0][:, source_row])
        assert bias[row] == theirs[1][source_row]
    for row in (0, 2):
        np.testing.assert_array_equal(kernel[:, row], before[0][:, row])


def test_rows_that_no_class_shares_are_refused():
    with pytest.raises(InputError, match="No class of the target is a class of 'digits_cnn'"):
        tfxfer.keep_source_classes(tfxfer.build_model("digits_cnn", ["x", "y"]), "digits_cnn", ["x", "y"])
    with pytest.raises(InputError, match="3 class names were given for the 2 outputs"):
        tfxfer.keep_source_classes(tfxfer.build_model("digits_cnn", ["1", "2"]), "digits_cnn", ["1", "2", "3"])


def test_names_are_compared_as_people_read_them():
    names = ["Golden_Retriever", "my dog"]
    model = tfxfer.build_model("efficientnet_lite0_imagenet", names, image_size=64)
    assert tfxfer.keep_source_classes(model, "efficientnet_lite0_imagenet", names) == {
        "Golden_Retriever": "Golden Retriever"
    }


def test_a_first_layer_that_is_no_plain_convolution_is_refused():
    network = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.SeparableConv2D(4, 3), keras.layers.Flatten()])
    with pytest.raises(InputError, match="which is no convolution of the image"):
        with_channels(network, 5)
