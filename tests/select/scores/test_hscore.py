import numpy as np
import pytest
import scipy.stats
from sklearn.covariance import LedoitWolf

from tfxfer.errors import InputError
from tfxfer.select.scores.hscore import h_score


def problem(num: int, width: int, classes: int = 3, signal: float = 0.5, seed: int = 0):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(num) ** 2 % classes if classes > 2 else np.arange(num) % classes)
    labels[:classes] = np.arange(classes)
    centres = random.normal(0, signal, (classes, width))
    features = centres[labels] + random.normal(0, 1, (num, width))
    return features * 10 ** random.uniform(-1, 0.5, width) + 3, labels


def between(features, labels):
    """Covariance of the features with each image's replaced by its class's mean."""
    means = np.stack([features[labels == label].mean(0) for label in labels])
    return np.cov(means, rowvar=False, bias=True)


@pytest.mark.parametrize(("num", "width", "classes"), [(60, 5, 3), (200, 12, 4), (50, 2, 2)])
def test_without_shrinkage_it_is_the_plain_definition(num, width, classes):
    features, labels = problem(num, width, classes)
    spread = np.cov(features, rowvar=False, bias=True)
    expected = np.trace(np.linalg.inv(spread) @ between(features, labels))
    assert h_score(features, labels, shrinkage=0) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("num", "width"), [(60, 5), (30, 80), (25, 25), (1200, 40)])
@pytest.mark.parametrize("signal", [0.0, 0.5])
def test_with_shrinkage_it_is_the_definition_with_scikit_learn_s_covariance(num, width, signal):
    features, labels = problem(num, width, signal=signal)
    found = LedoitWolf(assume_centered=True).fit(features - features.mean(0))
    expected = (1 - found.shrinkage_) * np.trace(np.linalg.inv(found.covariance_) @ between(features, labels))
    assert 0 < found.shrinkage_ < 1
    assert h_score(features, labels) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("num", "width"), [(60, 5), (20, 50)])
@pytest.mark.parametrize("share", [0.01, 0.4, 1.0])
def test_a_share_may_be_given(num, width, share):
    features, labels = problem(num, width)
    spread = np.cov(features, rowvar=False, bias=True)
    shrunk = (1 - share) * spread + share * np.trace(spread) / width * np.eye(width)
    expected = (1 - share) * np.trace(np.linalg.inv(shrunk) @ between(features, labels))
    assert h_score(features, labels, shrinkage=share) == pytest.approx(expected, rel=1e-9)


def test_two_features_by_hand():
    """Points (±1, ±2) in two classes by the sign of the first feature, one point more of each class at its mean.

    Variances 1 and 16/6, no covariance; class means (±1, 0): 1 of the first variance, all of it.
    """
    features = np.array([[1, 2], [1, -2], [1, 0], [-1, 2], [-1, -2], [-1, 0]], float)
    labels = [0, 0, 0, 1, 1, 1]
    assert h_score(features, labels, shrinkage=0) == pytest.approx(1.0)
    # Half shrunk: the mean variance is 11/6, so the first becomes 1/2 + 11/12, and half of 1 is divided by it.
    assert h_score(features, labels, shrinkage=0.5) == pytest.approx(0.5 / (0.5 + 11 / 12))


def test_few_images_reach_the_largest_value_by_chance_unless_shrunk():
    random = np.random.default_rng(0)
    noise, labels = random.normal(0, 1, (30, 100)), np.arange(30) % 3
    assert h_score(noise, labels, shrinkage=0) == pytest.approx(2.0)
    assert h_score(noise, labels) < 0.5
    assert h_score(noise + 3 * np.eye(100)[labels * 7], labels) > 2 * h_score(noise, labels)


def test_what_changes_nothing():
    features, labels = problem(60, 6)
    random = np.random.default_rng(1)
    linear, turn = random.normal(0, 1, (6, 6)), scipy.stats.ortho_group.rvs(6, random_state=1)
    plain, shrunk = h_score(features, labels, shrinkage=0), h_score(features, labels)
    assert h_score(features @ linear - 7, labels, shrinkage=0) == pytest.approx(plain, rel=1e-8)
    assert h_score(3e5 * features @ turn - 7, labels) == pytest.approx(shrunk, rel=1e-8)
    assert h_score(features @ linear, labels) != pytest.approx(shrunk, rel=1e-2)
    # A feature twice is one direction still; without the pseudo-inverse there would be no value.
    assert h_score(np.hstack([features, features]), labels, shrinkage=0) == pytest.approx(plain, rel=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1])
@pytest.mark.parametrize("shape", [(12, 3), (12, 40)])
def test_features_that_never_move_score_nothing(value, shape):
    for shrinkage in (None, 0, 0.5):
        assert h_score(np.full(shape, value), np.arange(12) % 3, shrinkage=shrinkage) == 0


def test_one_feature_has_nothing_to_be_shrunk_towards():
    features, labels = np.array([[0.0], [2.0], [4.0], [6.0]]), [0, 0, 1, 1]
    assert h_score(features, labels) == pytest.approx(4 / 5)
    assert LedoitWolf().fit(features).shrinkage_ == 0


@pytest.mark.parametrize("shrinkage", [-0.1, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(shrinkage):
    with pytest.raises(InputError, match=r"shrinkage must be in 0\.\.1, or None"):
        h_score(*problem(20, 3), shrinkage=shrinkage)
