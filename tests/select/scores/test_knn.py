import numpy as np
import pytest
import scipy.stats
from sklearn.neighbors import KNeighborsClassifier

from tfxfer.errors import InputError
from tfxfer.select.scores import knn
from tfxfer.select.scores.knn import knn_score


def problem(num: int = 90, width: int = 6, classes: int = 4, signal: float = 0.8, seed: int = 0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, num)
    centres = random.normal(0, signal, (classes, width))
    features = centres[labels] + random.normal(0, 1, (num, width))
    return features * random.uniform(0.1, 10, (num, 1)), labels


def scikit_learn(features, labels, groups, k):
    """Its classifier trained anew for each image on all other groups; votes that tie go to the nearer class."""
    right = 0
    for image in range(len(labels)):
        others = groups != groups[image]
        classifier = KNeighborsClassifier(
            min(k, int(others.sum())), metric="cosine", weights=lambda distance: 1 + 1e-4 * (1 - distance)
        )
        classifier.fit(features[others], labels[others])
        right += classifier.predict(features[image : image + 1])[0] == labels[image]
    return right / len(labels)


@pytest.mark.parametrize("k", [1, 3, 4, 20])
def test_each_left_out_it_is_scikit_learn_s(k):
    features, labels = problem()
    expected = scikit_learn(features, labels, np.arange(90), k)
    assert 0.3 < expected < 0.9
    assert knn_score(features, labels, k=k) == expected


@pytest.mark.parametrize("k", [1, 5])
def test_groups_left_out_it_is_scikit_learn_s(k):
    features, labels = problem(60)
    groups = np.arange(60) // 4
    features[1::4] = features[::4] * 2  # what a leak looks like: the same direction, in the same group
    labels[1::4] = labels[::4]
    expected = scikit_learn(features, labels, groups, k)
    assert knn_score(features, labels, k=k, groups=[f"patient {group}" for group in groups]) == expected
    assert knn_score(features, labels, k=k) > expected


def test_blocks_of_rows_change_nothing(monkeypatch):
    features, labels = problem()
    groups = np.arange(90) // 2
    whole = knn_score(features, labels, groups=groups)
    for size in (1, 90 * 7, 90 * 89):
        monkeypatch.setattr(knn, "BLOCK_SIZE", size)
        assert knn_score(features, labels, groups=groups) == whole


def test_more_neighbours_than_there_are_images():
    """All others vote, of two a and three b: an a sees one a and three b, a b two and two, of which the nearer win."""
    features = [[1, 0], [1, 0.1], [0, 1], [0.1, 1], [0.2, 1]]
    assert knn_score(features, [0, 0, 1, 1, 1], k=50) == pytest.approx(3 / 5)
    # All of a in one group: the b's see the same as before, and each a only b.
    assert knn_score(features, [0, 0, 1, 1, 1], k=50, groups=["a", "a", "b", "c", "d"]) == pytest.approx(3 / 5)
    # A group that is nearly everything: it has one image to judge it, which is wrong, and its own may not vote.
    assert knn_score(features, [0, 0, 0, 0, 1], k=50, groups=["a", "a", "a", "a", "b"]) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lengths_do_not_matter_however_large(dtype):
    features, labels = problem()
    score = knn_score(features, labels)
    random = np.random.default_rng(2)
    turn = scipy.stats.ortho_group.rvs(6, random_state=3)
    lengths = 10.0 ** random.uniform(-30, 30, (90, 1))
    assert knn_score((features * lengths).astype(dtype), labels) == score
    assert knn_score((features @ turn).astype(dtype), labels) == score


def test_an_image_of_nothing_is_as_far_from_all():
    features = [[0, 0], [1, 0], [1, 0.1], [-1, 0], [-1, 0.1]]
    assert knn_score(features, [1, 0, 0, 1, 1], k=1) >= 4 / 5


def test_what_cannot_be_asked_is_refused():
    features, labels = problem(10)
    with pytest.raises(InputError, match="k must be at least 1, not 0"):
        knn_score(features, labels, k=0)
    with pytest.raises(InputError, match="All 10 images are of one group"):
        knn_score(features, labels, groups=["a"] * 10)
    with pytest.raises(InputError, match="9 groups were given for 10 images"):
        knn_score(features, labels, groups=range(9))
