import keras
import numpy as np
import pytest
from small_networks import around, norm_backbone, norm_model, pictures, skip_backbone

from tfxfer.features.cut import cut_model
from tfxfer.model.blocks import list_blocks
from tfxfer.model.build import build_model
from tfxfer.model.freeze import digest_backbone, freeze, list_layers
from tfxfer.model.taps import tap_model


def wide_features(model: keras.Model, images) -> np.ndarray:
    """What the head of a tapped model sees, layer by layer."""
    return keras.Model(model.inputs, model.get_layer("dropout").output).predict(images, verbose=0)


def test_the_head_sees_the_pooled_outputs_of_all_blocks_with_the_last_features_last():
    model, images = norm_model(), pictures(5).astype("float32")
    tapped = tap_model(model)
    assert tapped.blocks == ("a_conv", "b_conv", "c_conv") and tapped.widths == (4, 6, 5)
    backbone = norm_backbone()
    x = model.get_layer("normalise")(model.get_layer("adapt_image")(images))
    expected = []
    for name in ("a_relu", "b_relu", "c_relu"):
        expected.append(keras.Model(backbone.input, backbone.get_layer(name).output).predict(x, verbose=0).mean((1, 2)))
    np.testing.assert_allclose(wide_features(tapped.model, images), np.concatenate(expected, axis=1), atol=1e-5)
    # The layers are the model's own: what freezes and audits these sees the same.
    assert digest_backbone(tapped.model) == digest_backbone(model)
    assert tapped.model.get_layer("dropout").rate == model.get_layer("dropout").rate


def test_blocks_by_name_beside_the_last():
    tapped = tap_model(norm_model(), ("b_conv",))
    assert tapped.blocks == ("b_conv", "c_conv") and tapped.widths == (6, 5)


def test_where_several_tensors_leave_a_block_it_is_not_read():
    assert tap_model(around(skip_backbone())).blocks == ("block_1", "block_3")


def test_what_is_tapped_is_not_tapped_again():
    assert tap_model(tap_model(norm_model()).model) is None


@pytest.mark.parametrize("source", ["small", "digits_cnn"])
def test_a_tapped_model_is_saved_frozen_and_cut_as_any_other(source, tmp_path):
    """Blocks keep their names and layers with and without a card, after loading too."""
    model = norm_model() if source == "small" else build_model("digits_cnn", 3, weights=False)
    tapped = tap_model(model).model
    tapped.get_layer("logits").set_weights([w + 0.01 for w in tapped.get_layer("logits").get_weights()])
    tapped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    size = model.get_layer("adapt_image").size_px
    images = pictures(3, size_px=size).astype("float32")
    np.testing.assert_allclose(loaded.predict(images, verbose=0), tapped.predict(images, verbose=0), atol=1e-6)
    names = [block.name for block in list_blocks(model)]
    for each in (tapped, loaded):
        assert [block.name for block in list_blocks(each)] == names
        assert [block.num_parameters for block in list_blocks(each)] == [b.num_parameters for b in list_blocks(model)]
        trained = {state.block for state in list_layers(freeze(each, names[0])) if state.num_trainable}
        assert trained == {*names[1:], "head"}
        for depth in range(len(names) + 1):
            cut = cut_model(each, depth)
            logits = cut.suffix.predict(cut.prefix.predict(images, verbose=0), verbose=0)
            shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            np.testing.assert_allclose(shares, tapped.predict(images, verbose=0), atol=1e-5)
