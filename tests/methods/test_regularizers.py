import keras
import numpy as np
import pytest
import tensorflow as tf
from small_networks import norm_backbone, norm_model, pictures

from tfxfer.errors import InputError
from tfxfer.methods.regularizers import l2_sp_groups, l2_sp_penalty
from tfxfer.model.freeze import freeze

WEIGHTS = [np.array([[3.0, 1.0], [0.0, -2.0]]), np.array([5.0, 5.0])]
START = [np.array([[1.0, 1.0], [1.0, 0.0]]), np.array([5.0, 2.0])]
HEAD = [np.array([2.0, -1.0]), np.array([[0.5]])]


def test_the_penalty_by_hand():
    """Li et al., equation 3: alpha / 2 ||w_S - w_S0||^2 + beta / 2 ||w_new||^2."""
    # Away from the start: 4 + 0 + 1 + 4, and 0 + 9. The head: 4 + 1, and 0.25.
    assert float(l2_sp_penalty(WEIGHTS, START, 0.1, HEAD, 0.4)) == pytest.approx(0.1 / 2 * 18 + 0.4 / 2 * 5.25)
    assert float(l2_sp_penalty(WEIGHTS, START, 0.1)) == pytest.approx(0.9)
    assert float(l2_sp_penalty([], [], 0.1, HEAD, 0.4)) == pytest.approx(1.05)
    assert float(l2_sp_penalty(WEIGHTS, START, 0.1, HEAD)) == pytest.approx(0.9 + 0.01 / 2 * 5.25)
    assert float(l2_sp_penalty(START, START, 7.0)) == 0
    assert float(l2_sp_penalty([], [], 1.0)) == 0


def test_the_gradient_is_alpha_times_the_way_from_the_start_and_beta_times_the_head():
    values = [tf.constant(value) for value in WEIGHTS + HEAD]
    analytic, numeric = tf.test.compute_gradient(
        lambda a, b, c, d: l2_sp_penalty([a, b], START, 0.3, [c, d], 0.7), values
    )
    expected = [0.3 * (w - w0) for w, w0 in zip(WEIGHTS, START, strict=True)] + [0.7 * w for w in HEAD]
    for found, differences, value in zip(analytic, numeric, expected, strict=True):
        np.testing.assert_allclose(found, differences, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(np.reshape(found, value.shape), value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("start", [START[:1], START[::-1], [START[0], START[1][:1]]])
def test_a_start_of_other_weights_is_refused_even_where_it_would_broadcast(start):
    with pytest.raises(InputError, match="shape by shape"):
        l2_sp_penalty(WEIGHTS, start, 0.1)


@pytest.mark.parametrize("strengths", [(-0.1, 0.1), (0.1, -0.1), (float("nan"), 0.1)])
def test_negative_strengths_are_refused(strengths):
    alpha, beta = strengths
    with pytest.raises(InputError, match="at least 0"):
        l2_sp_penalty(WEIGHTS, START, alpha, HEAD, beta)


def test_half_precision_is_summed_in_single():
    far = [np.full(4, 300.0, np.float16)]  # its square is out of range
    found = l2_sp_penalty(far, [np.zeros(4, np.float16)], 1.0)
    assert found.dtype == tf.float32 and float(found) == 180000


@pytest.mark.parametrize(("batch_norm", "affine"), [("affine", True), ("train", True), ("frozen", False)])
def test_all_that_trains_of_the_backbone_is_shared_and_the_rest_is_the_head(batch_norm, affine):
    groups = l2_sp_groups(freeze(norm_model(), 1, batch_norm=batch_norm))
    names = {"b_conv/kernel", "c_conv/kernel"}
    if affine:
        names |= {f"{name}_bn/{part}" for name in "bc" for part in ("gamma", "beta")}
    assert {variable.path for variable in groups.shared} == names
    assert {variable.path for variable in groups.head} == {"logits/kernel", "logits/bias"}


def test_with_all_frozen_only_the_head_is_left():
    groups = l2_sp_groups(freeze(norm_model()))
    assert groups.shared == () and len(groups.head) == 2


def test_a_model_without_a_backbone_inside_is_refused():
    with pytest.raises(InputError, match="no backbone nested"):
        l2_sp_groups(norm_backbone())


def test_a_strong_pull_keeps_the_weights_at_their_start():
    """Descent on loss + alpha / 2 ||w - w0||^2; near a = infinity nothing shared moves, and the head still learns."""
    ways = {}
    for alpha in (0.0, 5.0):
        model = freeze(norm_model(), 1)
        groups = l2_sp_groups(model)
        start = [variable.numpy() for variable in groups.shared]
        images, targets = pictures(8).astype(np.float32), np.eye(3)[np.arange(8) % 3]
        loss = keras.losses.CategoricalCrossentropy()
        variables = groups.shared + groups.head
        head = groups.head[0].numpy()
        for _ in range(10):
            with tf.GradientTape() as tape:
                total = loss(targets, model(images)) + l2_sp_penalty(groups.shared, start, alpha, groups.head, 0.0)
            for variable, gradient in zip(variables, tape.gradient(total, [v.value for v in variables]), strict=True):
                variable.assign_sub(0.1 * gradient)
        ways[alpha] = np.sqrt(2 * float(l2_sp_penalty(groups.shared, start, 1.0)))
        assert np.abs(groups.head[0].numpy() - head).max() > 1e-3
    assert 0 < ways[5.0] < 0.3 * ways[0.0]
