import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from tfxfer.select.scores import logme
from tfxfer.select.scores.logme import logme_score

LOG_2PI = np.log(2 * np.pi)


def problem(num: int, width: int, classes: int = 3, signal: float = 0.5, seed: int = 0):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(num) % classes)
    centres = random.normal(0, signal, (classes, width))
    features = centres[labels] + random.normal(0, 1, (num, width))
    return features * 10 ** random.uniform(-1, 0.5, width) + 0.3, labels


def dense_evidence(features, target, log_alpha, log_beta):
    """Of targets that are normal with the covariance of weights and noise together: no decomposition, no formula."""
    covariance = features @ features.T / np.exp(log_alpha) + np.eye(len(target)) / np.exp(log_beta)
    return scipy.stats.multivariate_normal(np.zeros(len(target)), covariance).logpdf(target) / len(target)


def paper_evidence(features, target, log_alpha, log_beta):
    """The paper's closed form, term by term, with A and m as D x D and D."""
    (num, width), alpha, beta = features.shape, np.exp(log_alpha), np.exp(log_beta)
    a = alpha * np.eye(width) + beta * features.T @ features
    m = beta * np.linalg.solve(a, features.T @ target)
    missed = ((features @ m - target) ** 2).sum()
    logs = num / 2 * np.log(beta) + width / 2 * np.log(alpha) - num / 2 * LOG_2PI - np.linalg.slogdet(a)[1] / 2
    return (logs - beta / 2 * missed - alpha / 2 * m @ m) / num


def maximised(evidence, features, target):
    """The best of several searches over both logarithms."""
    starts = [(-4.0, 1.0), (0.0, 1.0), (4.0, 1.0), (8.0, 1.0)]
    options = {"xatol": 1e-7, "fatol": 1e-13, "maxiter": 4000, "maxfev": 4000}
    found = [
        scipy.optimize.minimize(
            lambda at: -evidence(features, target, *at), start, method="Nelder-Mead", options=options,
            bounds=[(-14, 22), (-4, 16)],
        )
        for start in starts
    ]  # fmt: skip
    return -min(each.fun for each in found)


@pytest.mark.parametrize(
    ("num", "width", "signal"), [(40, 5, 0.5), (40, 5, 0.0), (24, 60, 0.5), (24, 60, 0.05), (20, 20, 0.3)]
)
def test_it_is_the_largest_evidence_that_a_direct_search_finds(num, width, signal):
    features, labels = problem(num, width, signal=signal)
    targets = np.eye(3)[labels]
    for evidence in (dense_evidence, paper_evidence):
        expected = np.mean([maximised(evidence, features, target) for target in targets.T])
        assert logme_score(features, labels) == pytest.approx(expected, abs=2e-6)


def test_one_feature_by_hand():
    """F = (1, 1, 1), y = (1, 1, 0) and (0, 0, 1).

    F'F = 3. Of |y|^2 lie 4/3 and 1/3 along F, 2/3 across. With one feature the best share of the signal is
    1 - across / (2 along): 3/4 and 0, so alpha / beta is 1 and infinity. What is left of |y|^2 is 4/3 / 4 + 2/3 = 1 and
    1/3 + 2/3 = 1; the determinant is 1 + 3 / 1 = 4 and 1.
    """
    each = -(np.log(2 * np.pi / 3) + 1) / 2
    expected = np.mean([each - np.log(4) / 6, each])
    assert logme_score(np.ones((3, 1)), [0, 0, 1]) == pytest.approx(expected, abs=1e-9)


def test_features_without_signal_leave_the_evidence_of_plain_noise():
    """y is as near to F as across: two images with the same feature. Then all is noise of variance 1/2."""
    assert logme_score(np.ones((2, 1)), [0, 1]) == pytest.approx(-(np.log(np.pi) + 1) / 2, abs=1e-8)
    # No features to speak of: the same for each class, with variance 1/4 and 3/4.
    expected = np.mean([-(np.log(2 * np.pi * share) + 1) / 2 for share in (0.25, 0.75)])
    assert logme_score(np.zeros((4, 3)), [0, 1, 1, 1]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("num", "width"), [(60, 6), (200, 12)])
def test_it_ends_where_the_paper_s_iteration_ends(num, width):
    features, labels = problem(num, width, signal=0.4, seed=3)
    squares = np.linalg.eigvalsh(features.T @ features)
    expected = []
    for target in np.eye(3)[labels].T:
        alpha = beta = 1.0
        for _ in range(5000):
            m = beta * np.linalg.solve(alpha * np.eye(width) + beta * features.T @ features, features.T @ target)
            gamma = (beta * squares / (alpha + beta * squares)).sum()
            alpha, beta = gamma / (m @ m), (num - gamma) / ((features @ m - target) ** 2).sum()
        expected.append(paper_evidence(features, target, np.log(alpha), np.log(beta)))
    assert logme_score(features, labels) == pytest.approx(np.mean(expected), abs=1e-10)


def test_the_ratio_is_a_fixed_point_to_the_tolerance_that_is_stated():
    features, labels = problem(80, 8, classes=4)
    squares, inside, outside = logme._spectrum(features, np.eye(4)[labels])
    squares /= squares.max()
    wide = np.full(4, np.log(logme.MIN_RATIO)), np.full(4, np.log(logme.MAX_RATIO))
    for start in (-20.0, -1.0, 10.0):
        found = logme._fixed_points(squares, inside, outside, 80, np.full(4, start), wide)
        again = logme._iterated(squares, inside, outside, 80, found)
        np.testing.assert_allclose(again, found, rtol=0, atol=2 * logme.TOLERANCE)


def test_of_several_peaks_the_highest_counts():
    squares, inside, outside = (
        np.repeat([1.0, 2.8e-9], [9, 1]),
        np.repeat([0.3, 0.05], [9, 1])[:, None],
        np.array([1e-4]),
    )

    def evidence(log_ratio):
        noise = 1 / (1 + squares / np.exp(log_ratio))
        return -(np.log(2 * np.pi * (noise @ inside + outside)[0] / 12) + 1 - np.log(noise).sum() / 12) / 2

    lower = logme._fixed_points(squares, inside, outside, 12, np.array([-24.0]), (np.array([-26.0]), np.array([-20.0])))
    for step in (-0.1, 0.1):
        assert evidence(lower[0]) > evidence(lower[0] + step)
    best = max(evidence(at) for at in np.linspace(-27, 18, 20001))
    assert best > evidence(lower[0]) + 5
    assert logme._maximum_evidence(squares, inside, outside, 12) == pytest.approx(best, abs=1e-6)


def test_a_class_without_noise_has_the_evidence_at_the_least_ratio():
    """Orthonormal columns that are two of the classes, the third their complement: bounded, and finite."""
    labels = np.repeat([0, 1], 8)
    features = np.eye(2)[labels] / np.sqrt(8)
    # Both squared singular values are 1, all 8 of |y|^2 lie along one: noise is ratio / (1 + ratio) of it.
    noise = logme.MIN_RATIO / (1 + logme.MIN_RATIO)
    expected = -(np.log(2 * np.pi * 8 * noise / 16) + 1 - 2 * np.log(noise) / 16) / 2
    assert logme_score(features, labels) == pytest.approx(expected, abs=1e-6)


def test_few_images_without_noise_have_the_evidence_of_the_weights_alone():
    """Targets with energies in proportion to the squares, as weights of one variance make them; three images.

    Then y is normal with covariance F F' / alpha: its energy in that metric is 3, and the determinant 0.001.
    """
    squares = np.array([1.0, 0.1, 0.01])
    found = logme._maximum_evidence(squares, squares[:, None], np.zeros(1), 3)
    assert found == pytest.approx(-(np.log(2 * np.pi) + 1 + np.log(0.001) / 3) / 2, abs=1e-9)


def test_rows_come_in_blocks_of_any_number():
    features, labels = problem(5000, 7)
    whole = features.astype(np.float64)
    squares, inside, outside = logme._spectrum(whole, np.eye(3)[labels])
    vectors, values, _ = np.linalg.svd(whole, full_matrices=False)
    along = vectors.T @ np.eye(3)[labels]
    np.testing.assert_allclose(squares, values**2, rtol=1e-10)
    np.testing.assert_allclose(inside, along**2, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(outside, np.bincount(labels) - (along**2).sum(0), rtol=1e-10)


@pytest.mark.parametrize(("num", "width"), [(50, 8), (20, 40)])
def test_turning_and_scaling_change_nothing_and_doubled_columns_only_the_prior(num, width):
    features, labels = problem(num, width)
    score = logme_score(features, labels)
    turn = scipy.stats.ortho_group.rvs(width, random_state=1)
    for other in (features @ turn, features * 1e-6, features * 1e6, np.hstack([features, features])):
        assert logme_score(other, labels) == pytest.approx(score, abs=1e-7)
    assert logme_score(features + 5, labels) != pytest.approx(score, abs=1e-3)


def test_more_signal_scores_higher():
    found = [logme_score(*problem(150, 10, signal=signal, seed=5)) for signal in (0.0, 0.3, 0.8, 2.0)]
    assert found == sorted(found) and found[-1] - found[0] > 0.1
