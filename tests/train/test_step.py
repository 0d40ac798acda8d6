import keras
import numpy as np
import pytest

from tfxfer.train.batches import Batch
from tfxfer.train.state import callback_states, set_callback_states
from tfxfer.train.step import TrainingStep, shares_of

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(10, 6)).astype("float32")
Y = np.eye(3, dtype="float32")[RANDOM.integers(0, 3, 10)]
W = RANDOM.uniform(0.5, 2, 10).astype("float32")


def network(regularizer=None) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(5, activation="tanh", kernel_regularizer=regularizer), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers])


def batch(rows=slice(None)) -> Batch:
    return Batch(np.arange(10)[rows], X[rows], Y[rows], W[rows])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_is_gradient_descent_on_the_loss_worked_by_hand(smoothing):
    """One Dense layer: dL/dlogits = w (softmax - target) / n, dL/dkernel = x^T of that."""
    net = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    kernel, bias = (value.astype("float64") for value in net.get_weights())
    result = TrainingStep(net, keras.optimizers.SGD(0.5), smoothing=smoothing, clip_norm=None)(batch())
    logits = X @ kernel + bias
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    smooth = Y * (1 - smoothing) + smoothing / 3
    slope = W[:, None] * (shares - smooth) / 10
    np.testing.assert_allclose(net.get_weights()[0], kernel - 0.5 * X.T @ slope, atol=1e-6)
    np.testing.assert_allclose(net.get_weights()[1], bias - 0.5 * slope.sum(0), atol=1e-6)
    loss = -(smooth * np.log(shares)).sum(1) @ W
    hits = (logits.argmax(1) == Y.argmax(1)) @ W
    plain = -(Y * np.log(shares)).sum(1) @ W
    np.testing.assert_allclose(result.sums, [loss, 10, hits, plain, W.sum()], rtol=1e-5)


def test_the_gradient_is_clipped_as_a_whole():
    free, clipped = network(), network()
    TrainingStep(free, keras.optimizers.SGD(1.0), clip_norm=None)(batch())
    TrainingStep(clipped, keras.optimizers.SGD(1.0), clip_norm=0.01)(batch())
    start = network().get_weights()
    steps = [
        np.concatenate([(a - b).ravel() for a, b in zip(net.get_weights(), start, strict=True)])
        for net in (free, clipped)
    ]
    assert np.linalg.norm(steps[0]) > 0.1
    np.testing.assert_allclose(steps[1], 0.01 * steps[0] / np.linalg.norm(steps[0]), atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_micro_batches_give_the_gradient_of_the_whole_batch(count):
    whole, parted = network("l2"), network("l2")
    one = TrainingStep(whole, keras.optimizers.AdamW(0.01))
    other = TrainingStep(parted, keras.optimizers.AdamW(0.01), micro_batches=count)
    for rows in (slice(None), slice(3, 10), slice(0, 1)):
        found, expected = other(batch(rows)), one(batch(rows))
        np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-5)
    for a, b in zip(parted.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 6])
def test_convolutions_get_no_empty_part_of_a_batch(size):
    """They refuse one; in steps of two, the fourth part of five images would be empty."""

    def made(**options):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Conv2D(3, 2, kernel_regularizer="l2"), keras.layers.Flatten(), keras.layers.Dense(3)]
        net = keras.Sequential([keras.Input((3, 3, 1)), *layers])
        return net, TrainingStep(net, keras.optimizers.SGD(0.5), **options)

    random = np.random.default_rng(size)
    images = random.normal(size=(size, 3, 3, 1)).astype("float32")
    few = Batch(np.arange(size), images, np.eye(3, dtype="float32")[random.integers(3, size=size)], W[:size])
    (whole, one), (parted, other) = made(), made(micro_batches=4)
    np.testing.assert_allclose(other(few).sums, one(few).sums, rtol=1e-5)
    for a, b in zip(parted.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_two_tensors_that_cross_are_as_one_that_is_parted_inside(count):
    whole = network()
    first, second = keras.Input((2,)), keras.Input((4,))
    keras.utils.set_random_seed(0)
    parted = keras.Model((first, second), whole(keras.layers.Concatenate()([first, second])))
    step = TrainingStep(parted, keras.optimizers.SGD(0.5), micro_batches=count)
    found = step(Batch(np.arange(10), (X[:, :2], X[:, 2:]), Y, W))
    expected_net = network()
    expected = TrainingStep(expected_net, keras.optimizers.SGD(0.5), micro_batches=count)(batch())
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-5)
    for a, b in zip(whole.get_weights(), expected_net.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("what", ["activations", "weights"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_change_nothing(what, value):
    net = network()
    step = TrainingStep(net, keras.optimizers.AdamW(0.01))
    assert step(batch()).finite
    weights, optimizer = net.get_weights(), [variable.numpy() for variable in step.optimizer.variables]
    broken = batch()
    spoilt = getattr(broken, what).copy()
    spoilt[4] = value
    broken = Batch(**{**vars(broken), what: spoilt})
    assert not step(broken).finite
    for a, b in zip(weights, net.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(optimizer, step.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b.numpy())
    assert step(batch()).finite


def test_a_batch_is_shared_so_that_each_image_counts_once():
    for size, count in ((10, 3), (2, 3), (1, 4), (6, 2)):
        shares = shares_of(batch(slice(0, size)), count)
        assert len(shares) == count and min(len(share.weights) for share in shares) >= 1
        weights = np.concatenate([share.weights for share in shares])
        seen = np.concatenate([share.activations for share in shares])
        assert len(seen) == max(size, count)
        np.testing.assert_array_equal(weights[weights > 0], W[:size])
        np.testing.assert_array_equal(seen[weights > 0], X[:size])
        np.testing.assert_array_equal(np.concatenate([share.targets for share in shares])[weights > 0], Y[:size])


def test_what_callbacks_remember_goes_with_the_checkpoint():
    def watching():
        found = [
            keras.callbacks.EarlyStopping(monitor="loss", patience=5, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=3),
        ]
        for callback in found:
            callback.set_model(model)
            callback.on_train_begin()
        return found

    model = network()
    model.compile("sgd", "mse")
    first = watching()
    for epoch, loss in enumerate((1.0, 0.5, 0.7)):
        for callback in first:
            callback.on_epoch_end(epoch, {"loss": loss})
    second = watching()
    set_callback_states(second, *callback_states(first))
    for name in ("wait", "best", "best_epoch", "patience"):
        assert getattr(second[0], name) == getattr(first[0], name)
    assert (second[0].wait, second[0].best, second[1].wait) == (1, 0.5, 1)
    for a, b in zip(second[0].best_weights, first[0].best_weights, strict=True):
        np.testing.assert_array_equal(a, b)
