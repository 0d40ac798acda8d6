import keras
import numpy as np
import pytest
import tensorflow as tf

from tfxfer.errors import InputError
from tfxfer.methods.losses import (
    category_relationship,
    co_tuning_loss,
    knowledge_retention_loss,
    label_smoothed_cross_entropy,
)

LN2, LN3 = np.log(2), np.log(3)


def logits_of(*rows):
    """Logits that give these probabilities, moved by a constant that must not matter."""
    return np.log(np.array(rows, np.float64)) + 3.0


def table(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of probabilities."""
    return np.random.default_rng(seed).dirichlet(np.ones(columns), rows)


def check_gradient(loss, logits, expected) -> None:
    """TensorFlow's gradient of the summed loss is the closed form, and that of central differences."""
    analytic, numeric = tf.test.compute_gradient(lambda z: tf.reduce_sum(loss(z)), [tf.constant(logits)], delta=1e-4)
    np.testing.assert_allclose(analytic[0], numeric[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(np.reshape(analytic[0], logits.shape), expected, rtol=1e-9)


def softmax(z):
    exponentials = np.exp(z - z.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def test_label_smoothing_by_hand():
    """Szegedy et al., section 7: q'(k) = (1 - eps) q(k) + eps / K, loss H(q', p)."""
    loss = label_smoothed_cross_entropy([[1, 0, 0], [0, 0, 1]], logits_of([0.5, 0.25, 0.25], [0.5, 0.25, 0.25]), 0.3)
    # eps / K = 0.1. Row 1: 0.8 ln 2 + 0.2 ln 4. Row 2: 0.1 ln 2 + 0.9 ln 4.
    np.testing.assert_allclose(loss, [1.2 * LN2, 1.9 * LN2], rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_that_of_keras(smoothing):
    targets, logits = table(7, 4), np.random.default_rng(1).normal(0, 3, (7, 4))
    keras_loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing, reduction=None)
    found = label_smoothed_cross_entropy(targets.astype(np.float32), logits.astype(np.float32), smoothing)
    np.testing.assert_allclose(found, keras_loss(targets, logits), rtol=1e-5)


def test_label_smoothing_gradient():
    targets, logits = table(3, 4), np.random.default_rng(2).normal(0, 2, (3, 4))
    smoothed = 0.8 * targets + 0.2 / 4
    check_gradient(lambda z: label_smoothed_cross_entropy(targets, z, 0.2), logits, softmax(logits) - smoothed)


def test_knowledge_retention_by_hand():
    """Li and Hoiem, equations 2 to 4, at T = 2: square roots of the probabilities, made to sum to one."""
    loss = knowledge_retention_loss(logits_of([0.64, 0.36]), logits_of([0.2, 0.8]))
    # Roots 0.8 : 0.6 and 1 : 2, so y' = (4/7, 3/7) and p' = (1/3, 2/3).
    np.testing.assert_allclose(loss, [4 / 7 * LN3 + 3 / 7 * (LN3 - LN2)], rtol=1e-12)


def test_knowledge_retention_at_temperature_one_is_plain_cross_entropy():
    loss = knowledge_retention_loss(logits_of([0.5, 0.25, 0.25]), logits_of([0.25, 0.25, 0.5]), 1.0)
    np.testing.assert_allclose(loss, [0.5 * 2 * LN2 + 0.25 * 2 * LN2 + 0.25 * LN2], rtol=1e-12)


def test_knowledge_retention_is_least_where_nothing_was_forgotten():
    recorded = logits_of([0.7, 0.2, 0.1])
    same = float(knowledge_retention_loss(recorded, recorded - 5)[0])
    soft = np.sqrt([0.7, 0.2, 0.1]) / np.sqrt([0.7, 0.2, 0.1]).sum()
    assert same == pytest.approx(-(soft * np.log(soft)).sum())
    for other in ([0.2, 0.7, 0.1], [0.8, 0.1, 0.1], [0.6, 0.3, 0.1]):
        assert float(knowledge_retention_loss(recorded, logits_of(other))[0]) > same


def test_knowledge_retention_gradient_has_no_factor_of_the_squared_temperature():
    recorded, logits = np.random.default_rng(3).normal(0, 2, (2, 3, 4))
    expected = (softmax(logits / 2) - softmax(recorded / 2)) / 2
    check_gradient(lambda z: knowledge_retention_loss(recorded, z), logits, expected)


def test_knowledge_retention_leaves_the_record_alone():
    with tf.GradientTape() as tape:
        recorded = tf.constant([[1.0, 2.0]])
        tape.watch(recorded)
        loss = knowledge_retention_loss(recorded, [[0.5, 0.0]])
    assert tape.gradient(loss, recorded) is None


RELATIONSHIP = np.array([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]])


def test_co_tuning_by_hand():
    """You et al.: the cross-entropy of the source head with p(y_s | y_t)."""
    logits = logits_of(*[[0.25, 0.25, 0.5]] * 3)
    loss = co_tuning_loss([[1, 0], [0, 1], [0.5, 0.5]], logits, RELATIONSHIP)
    # 0.75 ln 4 + 0.25 ln 2; 0.5 ln 4 + 0.5 ln 2; a mixed image: the mean of both.
    np.testing.assert_allclose(loss, [1.75 * LN2, 1.5 * LN2, 1.625 * LN2], rtol=1e-12)


def test_co_tuning_gradient():
    targets, logits = np.eye(2)[[0, 1, 1]], np.random.default_rng(4).normal(0, 2, (3, 3))
    check_gradient(
        lambda z: co_tuning_loss(targets, z, RELATIONSHIP), logits, softmax(logits) - RELATIONSHIP[[0, 1, 1]]
    )


def test_the_relationship_is_the_mean_of_each_class():
    """You et al., the direct way: p(y_s | y_t = y) is the mean of f_0(x) over the images of class y."""
    probabilities = [[0.8, 0.2, 0.0], [0.1, 0.0, 0.9], [0.6, 0.2, 0.2], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]]
    found = category_relationship(probabilities, [0, 2, 0, 1, 2], 3)
    np.testing.assert_allclose(found, [[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.05, 0.85]], rtol=1e-6)
    assert found.dtype == np.float32


def test_the_relationship_lowers_the_loss_of_the_head_that_it_came_from():
    """Least of all relationships given its class: the mean of cross-entropies is linear in the predicted logs."""
    probabilities, labels = table(200, 5, seed=5), np.arange(200) % 3
    found = category_relationship(probabilities, labels, 3)
    assert np.abs(found.sum(1) - 1).max() < 1e-6
    targets = np.eye(3)[labels]
    own, other = (
        np.mean(co_tuning_loss(targets, np.log(relation)[labels], found)) for relation in (found, found[[1, 2, 0]])
    )
    assert own < other


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], [0, 0], "class 1 has no image"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], r"\[0, 2\), found 0 to 2"),
        ([[2.0, -1.0], [0.5, 0.5]], [0, 1], "not logits"),
        ([[2.0, 1.0], [0.5, 0.5]], [0, 1], "not logits"),
        ([[np.nan, 1.0], [0.5, 0.5]], [0, 1], "not logits"),
        ([[0.5, 0.5]], [0, 1], "shapes"),
    ],
)
def test_a_relationship_that_cannot_be_known_is_refused(probabilities, labels, message):
    with pytest.raises(InputError, match=message):
        category_relationship(probabilities, labels, 2)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_settings_out_of_range_are_refused(value):
    with pytest.raises(InputError, match="smoothing"):
        label_smoothed_cross_entropy([[1.0]], [[1.0]], value)
    with pytest.raises(InputError, match="temperature"):
        knowledge_retention_loss([[1.0]], [[1.0]], min(value, 0.0))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: label_smoothed_cross_entropy([[1, 0, 0]], z),
        lambda z: knowledge_retention_loss([[1.0, 0, 0]], z),
        lambda z: co_tuning_loss([[1, 0]], z, RELATIONSHIP),
    ],
)
def test_half_precision_is_summed_in_single_and_graphs_give_the_same(loss):
    logits = np.array([[300.0, -300.0, 0.0]], np.float16)  # exp overflows
    found = loss(logits)
    assert found.dtype == tf.float32 and np.isfinite(found[0])
    np.testing.assert_allclose(found, loss(logits.astype(np.float64)), rtol=1e-5)
    np.testing.assert_allclose(tf.function(loss)(tf.constant(logits)), found, rtol=1e-6)
