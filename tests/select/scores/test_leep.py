import numpy as np
import pytest

from tfxfer.errors import InputError
from tfxfer.select.scores.leep import leep_score


def test_four_images_by_hand():
    """Source classes A and B; labels 0 0 1 1.

    Joint sums: of label 0, A 1 + 1 = 2 and B 0; of label 1, A 1/2 and B 1/2 + 1 = 3/2. So P(0 | A) = 2 / 2.5 = 0.8,
    P(1 | A) = 0.2, P(1 | B) = 1, and the labels get 0.8, 0.8, 0.5 * 0.2 + 0.5 * 1 = 0.6 and 1.
    """
    table = [[1, 0], [1, 0], [0.5, 0.5], [0, 1]]
    assert leep_score(table, [0, 0, 1, 1]) == pytest.approx((2 * np.log(0.8) + np.log(0.6)) / 4, abs=1e-12)


def test_it_is_the_definition_summed_in_loops():
    random = np.random.default_rng(0)
    table, labels = random.dirichlet(np.full(7, 0.3), 50), random.integers(0, 4, 50)
    total = 0.0
    for image in range(50):
        chance = 0.0
        for source in range(7):
            joint = sum(table[i, source] for i in range(50) if labels[i] == labels[image]) / 50
            chance += table[image, source] * joint / (sum(table[:, source]) / 50)
        total += np.log(chance)
    assert leep_score(table, labels) == pytest.approx(total / 50, abs=1e-12)


def test_its_ends_are_certainty_and_the_entropy_of_the_labels():
    labels = np.array([0, 0, 0, 1])
    assert leep_score(np.eye(2)[labels], labels) == pytest.approx(0)
    same = leep_score(np.full((4, 3), 1 / 3), labels)
    assert same == pytest.approx(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    random = np.random.default_rng(0)
    for seed in range(20):
        table = np.random.default_rng(seed).dirichlet(np.full(5, 0.5), 4)
        assert same - 1e-12 <= leep_score(table, random.permutation(labels)) <= 1e-12


def test_source_classes_unseen_or_renamed_and_sums_a_little_off_change_nothing():
    random = np.random.default_rng(0)
    table, labels = random.dirichlet(np.ones(5), 30), random.integers(0, 3, 30)
    score = leep_score(table, labels)
    assert leep_score(np.hstack([np.zeros((30, 2)), table]), labels) == pytest.approx(score, abs=1e-12)
    assert leep_score(table[:, random.permutation(5)], labels) == pytest.approx(score, abs=1e-12)
    assert leep_score(table * np.linspace(0.992, 1.008, 30)[:, None], labels) == pytest.approx(score, abs=1e-12)


def test_probabilities_that_are_none_are_refused():
    with pytest.raises(InputError, match="sum to 1 in each row; pass the source's softmax, not logits"):
        leep_score([[3.0, -1.0], [0.5, 0.5]], [0, 1])
    with pytest.raises(InputError, match="sum to 1"):
        leep_score([[0.9, 0.8], [0.5, 0.5]], [0, 1])
    with pytest.raises(InputError, match="Row 1 of the probabilities holds a value that is not finite"):
        leep_score([[0.5, 0.5], [np.nan, 0.5]], [0, 1])
    with pytest.raises(InputError, match=r"must be \(N, Z\), an image a row, not \(3,\)"):
        leep_score([0.1, 0.2, 0.7], [0, 1, 1])
    with pytest.raises(InputError, match=r"2 rows of probabilities need labels \(2,\)"):
        leep_score([[0.5, 0.5], [0.5, 0.5]], [0, 1, 1])
