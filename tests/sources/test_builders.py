import keras
import numpy as np
import pytest

from tfxfer.sources.builders import BUILDERS
from tfxfer.sources.catalog import load_backbone

PHOTO_NETS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "mobilenet_v2")


def kernels(model):
    return {layer.name: np.array(layer.kernel) for layer in model.layers if hasattr(layer, "kernel")}


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_random_weights_repeat_with_the_seed_and_no_two_kernels_are_equal(name):
    first, again, other = (kernels(BUILDERS[name](32, include_top=True, seed=seed)) for seed in (0, 0, 1))
    starts = [tuple(kernel.ravel()[:9]) for kernel in (*first.values(), *other.values())]
    assert len(set(starts)) == len(starts)
    assert all(np.array_equal(first[layer], again[layer]) for layer in first)


@pytest.mark.parametrize("name", PHOTO_NETS)
def test_random_weights_keep_the_signal_alive(name):
    model = BUILDERS[name](64, seed=0)
    images = np.random.default_rng(0).normal(size=(4, 64, 64, 3)).astype("float32")
    # BatchNorm uses the batch's statistics, as in the first training step.
    features = np.array(model(images, training=True))
    assert 0.05 < features.std() < 5 and (features > 0).mean() > 0.5
    # He's standard deviation for the fan out: sqrt(2 / (3 * 3 * 32)) of the stem, sqrt(2 / 9) of a 3x3 depthwise.
    stem, depthwise = model.get_layer("stem_conv").kernel, model.get_layer("block_02_depthwise").kernel
    assert np.std(stem) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.1)
    assert np.std(depthwise) == pytest.approx((2 / 9) ** 0.5, rel=0.1)


def test_only_torch_padding_differs_between_the_two_networks_strides():
    pads = {
        name: [layer.name for layer in BUILDERS[name](32).layers if layer.name.endswith("_pad")] for name in PHOTO_NETS
    }
    assert pads == {
        "efficientnet_lite0": [],
        "efficientnet_lite1": [],
        "efficientnet_lite2": [],
        "mobilenet_v2": ["stem_pad", "block_01_pad", "block_03_pad", "block_06_pad", "block_13_pad"],
    }


def test_a_backbone_is_plain_keras_and_can_be_cut_saved_and_loaded(tmp_path):
    backbone = load_backbone("efficientnet_lite0_imagenet", image_size=32)
    assert {type(layer).__module__.partition(".")[0] for layer in backbone.layers} == {"keras"}
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    whole = np.array(backbone(images, training=False))
    middle = backbone.get_layer("block_12_add").output
    lower, upper = keras.Model(backbone.input, middle), keras.Model(middle, backbone.output)
    np.testing.assert_array_equal(np.array(upper(lower(images, training=False), training=False)), whole)
    backbone.save(tmp_path / "backbone.keras")
    again = keras.models.load_model(tmp_path / "backbone.keras", safe_mode=True)
    np.testing.assert_array_equal(np.array(again(images, training=False)), whole)


def test_a_call_in_inference_mode_moves_no_batch_norm_statistic():
    backbone = load_backbone("efficientnet_lite0_imagenet", image_size=32)
    before = [np.array(weight) for weight in backbone.non_trainable_weights]
    backbone(np.ones((2, 32, 32, 3), "float32"), training=False)
    assert len(before) == 2 * 49
    for weight, value in zip(backbone.non_trainable_weights, before, strict=True):
        np.testing.assert_array_equal(np.array(weight), value)
