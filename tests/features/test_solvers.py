import numpy as np
import pytest
import scipy.optimize
from sklearn.linear_model import LogisticRegression

from tfxfer.features.solvers import (
    Anchor,
    LogisticPath,
    best_temperature,
    choose_strength,
    log_softmax,
    weighted_log_loss,
)


def problem(num: int, width: int, classes: int = 3, seed: int = 0):
    """Features of unlike scales around centres that overlap."""
    random = np.random.default_rng(seed)
    labels = np.arange(num) % classes
    centres = random.normal(0, 0.4, (classes, width))
    features = centres[labels] + random.normal(0, 1, (num, width))
    return (features * 10 ** random.uniform(-1, 1, width) + random.normal(0, 3, width)).astype(np.float32), labels


def scikit_learn(features, labels, strength, weights=None):
    """Its optimum of the same problem: on standardised features, C = 1 / (strength * n)."""
    mean, scale = features.mean(0), features.std(0)
    standard = ((features - mean) / scale).astype(np.float64)
    total = len(labels) if weights is None else weights.sum()
    found = LogisticRegression(C=1 / (strength * total), tol=1e-8, max_iter=5000).fit(standard, labels, weights)
    if len(found.classes_) == 2:  # one row for two classes: the symmetric softmax of the same function
        return found, lambda x: found.predict_log_proba((x - mean) / scale)
    return found, lambda x: found.predict_log_proba((x - mean) / scale)


@pytest.mark.parametrize("strength", [1.0, 0.03, 0.001])
@pytest.mark.parametrize(("num", "width"), [(120, 8), (30, 80)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_optimum_is_scikit_learn_s(num, width, strength, weighted):
    features, labels = problem(num, width)
    weights = np.random.default_rng(1).uniform(0.2, 3, num) if weighted else None
    weights = weights / weights.mean() if weighted else None
    head = LogisticPath(features, labels, 3, weights).solve(strength)
    found, expected = scikit_learn(features, labels, strength, weights)
    new = problem(50, width, seed=2)[0]
    for x in (features, new):
        # Thirty images in eighty directions, nearly unregularised: float32 leaves the last digits open there.
        atol = 0.15 if (num, strength) == (30, 0.001) else 0.02
        np.testing.assert_allclose(log_softmax(head.logits(x)), expected(x), rtol=0.01, atol=atol)
    # In standardised features even the coefficients are the same; a bias common to all classes is free.
    ours = head.kernel * features.std(0)[:, None]
    np.testing.assert_allclose(ours, found.coef_.T, atol=0.01 * np.abs(found.coef_).max())
    bias = head.bias + features.mean(0) @ head.kernel
    np.testing.assert_allclose(bias - bias.mean(), found.intercept_ - found.intercept_.mean(), atol=0.01)


def test_rows_select_the_images_that_count_but_not_the_standardisation():
    features, labels = problem(90, 6)
    path = LogisticPath(features, labels, 3)
    rows = np.arange(0, 90, 2)
    head = path.to_head(path.optimum(0.05, rows=rows), 0.05, 0.0)
    standard = (features - features.mean(0)) / features.std(0)
    found = LogisticRegression(C=1 / (0.05 * len(rows)), tol=1e-8, max_iter=5000).fit(standard[rows], labels[rows])
    np.testing.assert_allclose(head.kernel * features.std(0)[:, None], found.coef_.T, atol=0.01)


@pytest.mark.parametrize("width", [7, 60])
def test_the_dense_layer_is_the_function_in_rotated_coordinates(width):
    features, labels = problem(40, width)
    path = LogisticPath(features, labels, 3)
    theta = path.optimum(0.01)
    head = path.to_head(theta, 0.01, 0.5)
    assert head.kernel.dtype == head.bias.dtype == np.float32
    assert (head.kernel.shape, head.bias.shape) == ((width, 3), (3,))
    assert (head.strength, head.log_loss) == (0.01, 0.5)
    rows = np.arange(40)
    np.testing.assert_allclose(log_softmax(head.logits(features)), path.log_probabilities(theta, rows), atol=2e-3)


def test_a_feature_that_never_moves_gets_no_weight():
    features, labels = problem(60, 5)
    features[:, 2] = 7.25
    features[:, 3] = 7.25 + 1e-12
    head = LogisticPath(features, labels, 3).solve(0.01)
    assert np.isfinite(head.kernel).all()
    np.testing.assert_array_equal(head.kernel[2:4], 0)
    rest = LogisticPath(np.delete(features, [2, 3], axis=1), labels, 3).solve(0.01)
    np.testing.assert_allclose(np.delete(head.kernel, [2, 3], axis=0), rest.kernel, atol=1e-3)


def test_a_start_near_by_leads_to_the_same_optimum():
    features, labels = problem(100, 10)
    path = LogisticPath(features, labels, 3)
    cold = path.optimum(0.001)
    warm = path.optimum(0.001, start=path.optimum(0.003))
    np.testing.assert_allclose(warm, cold, atol=0.02 * np.abs(cold).max())


def test_the_strength_is_chosen_by_log_loss_where_accuracy_would_choose_another():
    features, labels = problem(60, 20, seed=4)
    path = LogisticPath(features, labels, 3)
    folds = [(np.setdiff1d(np.arange(60), np.arange(k, 60, 4)), np.arange(k, 60, 4)) for k in range(4)]
    strengths = (3.0, 0.3, 0.03, 0.003, 0.0003)
    chosen, scores = choose_strength(path, folds, strengths)
    losses, accuracies = {}, {}
    for strength in strengths:
        table = np.empty((60, 3))
        for train, held in folds:
            table[held] = path.log_probabilities(path.optimum(strength, rows=train), held)
        losses[strength] = -table[np.arange(60), labels].mean()
        accuracies[strength] = (table.argmax(1) == labels).mean()
        if strength == chosen:
            np.testing.assert_allclose(scores, table, atol=0.02)
    assert chosen == min(losses, key=losses.__getitem__)
    assert max(accuracies.values()) > accuracies[chosen]


def test_rows_never_held_out_have_no_score():
    features, labels = problem(40, 5)
    _, scores = choose_strength(LogisticPath(features, labels, 3), [(np.arange(30), np.arange(30, 35))])
    assert np.isfinite(scores[30:35]).all() and np.isnan(np.delete(scores, np.arange(30, 35), axis=0)).all()


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 8.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_temperature_is_that_of_a_brute_force_search(sharpness, weighted):
    random = np.random.default_rng(3)
    labels = random.integers(0, 4, 200)
    logits = sharpness * (np.eye(4)[labels] * 1.5 + random.normal(0, 1, (200, 4)))
    weights = random.uniform(0, 2, 200) if weighted else None

    def loss(temperature):
        scaled = logits / temperature
        scores = scaled - scipy.special.logsumexp(scaled, axis=1, keepdims=True)
        return -np.average(scores[np.arange(200), labels], weights=weights)

    temperatures = np.exp(np.linspace(-5, 5, 4001))
    brute = min(temperatures, key=loss)
    temperature, found = best_temperature(logits, labels, weights)
    assert temperature == pytest.approx(brute, rel=0.005)
    assert found == pytest.approx(loss(brute), rel=1e-5)
    # Log probabilities serve as well as logits.
    assert best_temperature(log_softmax(logits), labels, weights)[0] == pytest.approx(temperature, rel=0.005)


def test_log_softmax_and_log_loss_of_large_logits():
    logits = np.array([[1000.0, 0.0], [3.0, 3.0]])
    np.testing.assert_allclose(log_softmax(logits), [[0, -1000], [-np.log(2)] * 2])
    assert weighted_log_loss(log_softmax(logits), np.array([1, 0])) == pytest.approx((1000 + np.log(2)) / 2)
    assert weighted_log_loss(log_softmax(logits), np.array([1, 0]), [0, 1]) == pytest.approx(np.log(2))


def anchored(num: int = 90, width: int = 5, classes: int = 4):
    """A problem of four classes, and a head from before that knows the first three."""
    features, labels = problem(num, width, classes)
    random = np.random.default_rng(7)
    kernel = (random.normal(0, 0.5, (width, classes)) / features.std(0)[:, None]).astype(np.float32)
    anchor = Anchor(kernel, random.normal(0, 1, classes).astype(np.float32), np.arange(classes) < 3)
    return features, labels, anchor


@pytest.mark.parametrize("ratio", [1.0, 30.0])
def test_the_optimum_round_a_head_from_before_is_that_of_its_formula(ratio):
    """mean_i w_i * cross-entropy_i + strength / 2 * sum_k stiffness_k * |kernel_k - anchor_k|^2, by plain BFGS."""
    features, labels, anchor = anchored()
    weights = np.random.default_rng(3).uniform(0.5, 2, len(labels))
    path = LogisticPath(features, labels, 4, weights / weights.mean(), anchor).stiffened(ratio)
    strength, scale = 0.05, features.std(0).astype(float)
    stiffness = np.where(anchor.known, ratio, 1.0)

    def objective(flat):
        kernel, bias = flat[:-4].reshape(-1, 4) / scale[:, None], flat[-4:]  # in the units of standardised features
        logits = (features - features.mean(0)) @ kernel + bias
        moved = (kernel - anchor.kernel) * scale[:, None]
        return weighted_log_loss(log_softmax(logits), labels, weights) + strength / 2 * (stiffness * moved**2).sum()

    found = scipy.optimize.minimize(objective, np.zeros(features.shape[1] * 4 + 4), method="BFGS", tol=1e-9)
    expected = found.x[:-4].reshape(-1, 4) / scale[:, None]
    head = path.solve(strength, tolerance=1e-8)
    np.testing.assert_allclose(head.kernel * scale[:, None], expected * scale[:, None], atol=2e-3)
    logits = (features - features.mean(0)) @ expected + found.x[-4:]
    np.testing.assert_allclose(log_softmax(head.logits(features)), log_softmax(logits), atol=5e-3)


def test_columns_that_are_held_for_good_do_not_move_and_the_others_do():
    features, labels, anchor = anchored()
    head = LogisticPath(features, labels, 4, None, anchor).stiffened(np.inf).solve(0.01)
    np.testing.assert_array_equal(head.kernel[:, :3], anchor.kernel[:, :3])
    np.testing.assert_array_equal(head.bias[:3], anchor.bias[:3])
    assert np.abs(head.kernel[:, 3] - anchor.kernel[:, 3]).max() > 0.01
    whole = Anchor(anchor.kernel, anchor.bias, np.ones(4, bool))
    path = LogisticPath(features, labels, 4, None, whole).stiffened(np.inf)
    np.testing.assert_array_equal(path.solve(0.01).kernel, anchor.kernel)
    held = np.arange(20)
    found = path.log_probabilities(path.optimum(0.01), held)
    np.testing.assert_allclose(found, log_softmax(features[held] @ anchor.kernel + anchor.bias), atol=1e-5)
