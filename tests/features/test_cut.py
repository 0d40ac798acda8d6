import keras
import numpy as np
import pytest
from small_networks import around, norm_model, pictures, skip_backbone

from tfxfer.features.cut import cut_model
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze


def softmax(logits):
    scores = np.exp(logits - logits.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def mobilenet():
    """MobileNetV2 with random weights, and BatchNorm statistics far from those of any batch."""
    model = build_model("mobilenet_v2_imagenet", 5, image_size=64, weights=False)
    random = np.random.default_rng(0)
    for layer in model.get_layer("mobilenet_v2").layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            mean, variance = random.normal(0, 0.1, mean.shape), random.uniform(0.5, 1.5, variance.shape)
            layer.set_weights([gamma, random.normal(0, 0.2, beta.shape), mean, variance])
    return model


@pytest.mark.parametrize("depth", [0, 1, 7, 14, 18, 19])
def test_suffix_of_prefix_is_the_model(mobilenet, depth):
    freeze(mobilenet, depth)
    cut = cut_model(mobilenet, depth)
    images = pictures(4, size_px=64).astype(np.float32)
    expected = mobilenet(images).numpy()  # eager: tracing this network again and again would take longer
    assert expected.std(0).max() > 1e-3  # the images are told apart at all
    np.testing.assert_allclose(softmax(cut.suffix(cut.prefix(images)).numpy()), expected, atol=2e-6)
    assert cut.depth == depth
    # Nothing is copied, and nothing is lost.
    held = {id(variable) for part in (cut.prefix, cut.suffix) for variable in part.variables}
    assert {id(variable) for variable in mobilenet.variables if "seed" not in variable.path} <= held
    frozen = {id(variable) for variable in cut.prefix.trainable_variables}
    assert not frozen
    assert {id(v) for v in cut.suffix.trainable_variables} == {id(v) for v in mobilenet.trainable_variables}


def test_the_tail_gives_the_features(mobilenet):
    images = pictures(3, size_px=64).astype(np.float32)
    cut = cut_model(mobilenet, 16)
    backbone = mobilenet.get_layer("mobilenet_v2")
    normal = mobilenet.get_layer("normalise")(images).numpy()
    expected = backbone(normal)
    np.testing.assert_allclose(cut.tail(cut.prefix(images)), expected, atol=1e-5)
    everything = cut_model(mobilenet, 19)
    assert everything.tail is None
    np.testing.assert_allclose(everything.prefix(images), expected, atol=1e-5)


def test_training_the_suffix_trains_the_model():
    model = norm_model()
    freeze(model, 1, batch_norm="affine")
    cut = cut_model(model, 1)
    images = pictures(8).astype(np.float32)
    before = model.predict(images, verbose=0)
    cut.suffix.compile(optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    cut.suffix.fit(cut.prefix.predict(images, verbose=0), np.arange(8) % 3, epochs=3, verbose=0)
    after = model.predict(images, verbose=0)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(softmax(cut.suffix(cut.prefix(images)).numpy()), after, atol=1e-5)


@pytest.mark.parametrize("state", ["frozen", "affine", "adapt", "train"])
def test_the_suffix_treats_statistics_as_the_model_does(state):
    moves = {}
    for part in ("model", "suffix"):
        model = freeze(norm_model(), 1, batch_norm=state)
        cut = cut_model(model, 1)
        images = pictures(8).astype(np.float32)
        if part == "model":
            model(images, training=True)
        else:
            cut.suffix(cut.prefix(images, training=False), training=True)
        moves[part] = {v.path: v.numpy() for v in model.non_trainable_variables if "moving" in v.path}
    for path, value in moves["model"].items():
        np.testing.assert_allclose(moves["suffix"][path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    untouched = {v.path: v.numpy() for v in norm_model().non_trainable_variables if "moving" in v.path}
    changed = {path for path, value in moves["suffix"].items() if value.tobytes() != untouched[path].tobytes()}
    expected = {f"{n}_bn/moving_{what}" for n in "bc" for what in ("mean", "variance")} if state == "train" else set()
    assert changed == expected


def test_two_tensors_cross_a_skip():
    model = around(skip_backbone())
    images = pictures(3).astype(np.float32)
    for depth, count in ((0, 1), (1, 1), (2, 2), (3, 1)):  # block_1's output goes round block_2 and block_3
        cut = cut_model(model, depth)
        assert len(cut.suffix.inputs) == count
        np.testing.assert_allclose(softmax(cut.suffix(cut.prefix(images)).numpy()), model(images), atol=1e-5)
        if depth == 2:
            expected = model.get_layer("skip_backbone")(model.get_layer("normalise")(images))
            np.testing.assert_allclose(cut.tail(cut.prefix(images)), expected, atol=1e-5)
