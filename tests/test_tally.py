import numpy as np
import pytest

from tfxfer import tally
from tfxfer.tally import Tally, draw_counts, group_numbers


def test_draws_keep_each_stratums_size_and_have_the_unbiased_variance():
    strata = np.array([0, 2, 0, 0, 1, 2, 0])  # of 4, 1 and 2 groups
    counts = np.concatenate(list(draw_counts(strata, 40_000, np.random.default_rng(0))), axis=1)
    assert counts.shape == (7, 40_000)
    for stratum, size in ((0, 4), (1, 1), (2, 2)):
        np.testing.assert_allclose(counts[strata == stratum].sum(0), size)
    np.testing.assert_allclose(counts.mean(1), 1, atol=0.02)
    # The mean of n values, weighted by the counts, must vary as s² / n with s² by n - 1.
    values = np.array([3.0, 0, -1, 4, 0, 0, 7])
    first = values[strata == 0]
    assert (values[strata == 0] @ counts[strata == 0] / 4).var() == pytest.approx(first.var(ddof=1) / 4, rel=0.03)
    assert (counts[4] == 1).all()


def test_draws_come_in_blocks_of_bounded_size(monkeypatch):
    monkeypatch.setattr(tally, "_BLOCK_SIZE", 1000)
    blocks = list(draw_counts(np.zeros(30, int), 100, np.random.default_rng(0)))
    assert [block.shape for block in blocks] == [(30, 33), (30, 33), (30, 33), (30, 1)]


def test_a_group_of_several_classes_is_drawn_with_its_commonest():
    made = Tally(np.array([0, 1, 1, 2, 2, 0]), np.full((6, 3), 1 / 3), np.array([0, 0, 0, 1, 1, 2]))
    assert made.stratum_of_group.tolist() == [1, 2, 0]


def test_groups_are_numbered_as_they_come_in():
    assert group_numbers(["b", "a", "b", ("c", 1)], 4).tolist() == [0, 1, 0, 2]
    assert group_numbers(None, 4) is None


def test_effective_groups_by_hand():
    labels = np.array([0] * 6 + [1] * 2)
    made = Tally(labels, np.eye(2)[labels], np.array([0, 0, 0, 0, 1, 2, 3, 4]))
    assert made.effective_groups("accuracy") == pytest.approx(64 / (16 + 1 + 1 + 1 + 1))
    # Half the balanced accuracy is class 0 by 4/6, 1/6, 1/6; half is class 1 by two halves.
    expected = 1 / (0.25 * (16 / 36 + 1 / 36 + 1 / 36) + 0.25 * (1 / 4 + 1 / 4))
    assert made.effective_groups("balanced_accuracy") == pytest.approx(expected)


def test_a_draw_of_weight_zero_is_a_number():
    made = Tally(np.array([0, 1]), np.eye(2), weights=[1.0, 0.0])
    scores = made.scores(np.array([[0.0], [2.0]]))
    assert all(np.isfinite(values).all() for values in scores.values())
