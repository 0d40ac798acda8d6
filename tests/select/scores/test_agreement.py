import numpy as np
import pytest
import scipy.stats

from tfxfer.errors import InputError
from tfxfer.select.scores.agreement import rank_agreement


def one_way(ours, theirs, by):
    """Weighted tau with ranks taken by one side, the greatest first: the definition in loops."""
    rank = {source: place + 1 for place, source in enumerate(sorted(range(len(by)), key=lambda i: -by[i]))}
    total = weight_of_all = 0.0
    for i in range(len(ours)):
        for j in range(i):
            weight = 1 / rank[i] + 1 / rank[j]
            total += weight * np.sign(ours[i] - ours[j]) * np.sign(theirs[i] - theirs[j])
            weight_of_all += weight
    return total / weight_of_all


def test_three_sources_by_hand():
    """Of the pairs 12, 13, 23 (1 + 1/2, 1 + 1/3, 1/2 + 1/3 = 9/6, 8/6, 5/6) one is in the wrong order."""
    truth = [0.9, 0.8, 0.7]
    assert rank_agreement([2, 3, 1], truth) == pytest.approx((8 + 5 - 9) / 22)  # the best two: 12 by either ranking
    assert rank_agreement([3, 1, 2], truth) == pytest.approx((9 + 8 - 5) / 22)  # the last two cost less
    assert rank_agreement([3, 2, 1], truth) == pytest.approx(1) and rank_agreement([1, 2, 3], truth) == pytest.approx(
        -1
    )


def test_it_is_the_definition_in_loops():
    random = np.random.default_rng(0)
    for _ in range(20):
        ours, theirs = random.normal(0, 1, 8), random.normal(0, 1, 8)
        expected = (one_way(ours, theirs, ours) + one_way(ours, theirs, theirs)) / 2
        assert rank_agreement(ours, theirs) == pytest.approx(expected)
        assert rank_agreement(theirs, ours) == pytest.approx(expected)


def test_only_the_order_counts():
    random = np.random.default_rng(1)
    ours, theirs = random.normal(0, 1, 10), random.uniform(0, 1, 10)
    found = rank_agreement(ours, theirs)
    assert rank_agreement(np.exp(3 * ours), 100 * theirs) == pytest.approx(found)
    order = random.permutation(10)
    assert rank_agreement(ours[order], theirs[order]) == pytest.approx(found)
    assert found != pytest.approx(scipy.stats.kendalltau(ours, theirs).statistic, abs=1e-3)


def test_what_has_no_order_is_refused():
    with pytest.raises(InputError, match="for each of two sources or more"):
        rank_agreement([1.0], [2.0])
    with pytest.raises(InputError, match=r"not \(2,\) and \(3,\)"):
        rank_agreement([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="The accuracy of source 1 is not finite"):
        rank_agreement([1, 2, 3], [0.5, np.nan, 0.7])
    with pytest.raises(InputError, match=r"Every source has the score 0\.5"):
        rank_agreement([0.5, 0.5, 0.5], [0.5, 0.6, 0.7])
