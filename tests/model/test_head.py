import keras
import numpy as np
import pytest

from tfxfer.data import load_data
from tfxfer.errors import InputError
from tfxfer.model.head import Classes, as_head, attach_head


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (Classes(("b", "a")), ("b", "a")),
        (Classes(["b", "a"]), ("b", "a")),
        (2, ("0", "1")),
        (["cat", "dog", "cow"], ("cat", "dog", "cow")),
        (("cat", "dog"), ("cat", "dog")),
    ],
)
def test_a_head_is_classes_a_number_or_names_in_the_order_given(head, names):
    assert as_head(head) == Classes(names)


def test_a_dataset_brings_its_classes():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 8, 8, 3), np.uint8)
    data = load_data((images, np.arange(24) % 2), class_names=["night", "day"], near_duplicates=False)
    assert as_head(data).names == ("night", "day")


@pytest.mark.parametrize("head", [1, 0, ["cat"], ["cat", "cat"], Classes])
def test_fewer_than_two_different_classes_are_refused(head):
    with pytest.raises(InputError, match=r"at least two classes with different names|must be Classes"):
        as_head(head)


@pytest.mark.parametrize("head", [True, 2.0, None, "cat", ["cat", 3]])
def test_what_is_no_head_is_refused_by_its_type(head):
    with pytest.raises(InputError, match=rf"The head must be .*, not {type(head).__name__}"):
        as_head(head)


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5])
def test_a_dropout_rate_out_of_range_is_refused(dropout):
    with pytest.raises(InputError, match=rf"dropout must lie in \[0, 1\), not {dropout}"):
        attach_head(keras.Input((5,)), Classes(("a", "b")), dropout=dropout, logits=False)


def test_the_head_is_a_softmax_over_a_dense_layer():
    features = keras.Input((5,))
    layers = {logits: attach_head(features, as_head(3), dropout=0.5, logits=logits) for logits in (False, True)}
    model = keras.Model(features, layers[False])
    assert model.output_names == ["probabilities"] or model.layers[-1].name == "probabilities"
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    kernel, bias = np.random.default_rng(1).normal(size=(5, 3)), np.array([1.0, 0, -1])
    model.get_layer("logits").set_weights([kernel, bias])
    scores = np.exp(x @ kernel + bias)
    found = model.predict(x, verbose=0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, scores / scores.sum(1, keepdims=True), rtol=1e-5)
    plain = keras.Model(features, layers[True])
    plain.get_layer("logits").set_weights([kernel, bias])
    np.testing.assert_allclose(plain.predict(x, verbose=0), x @ kernel + bias, rtol=1e-4, atol=1e-5)
    assert plain.layers[-1].name == "logits"
