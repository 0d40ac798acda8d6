import numpy as np
import pytest

from tfxfer.errors import InputError
from tfxfer.select.winner import choose_cheapest, corrected_score


def tables_of(hits: np.ndarray, labels: np.ndarray, classes: int = 2) -> np.ndarray:
    """Probabilities that are right where `hits` says so."""
    told = np.where(hits, labels, (labels + 1) % classes)
    return np.eye(classes)[told] * 0.8 + 0.2 / classes


LABELS = np.arange(100) % 2


def with_accuracy(share: float, seed: int = 0) -> np.ndarray:
    hits = np.zeros(100, bool)
    hits[np.random.default_rng(seed).permutation(100)[: round(100 * share)]] = True
    return hits


def test_of_equal_candidates_the_cheapest_is_taken():
    """90 and 89 of 100 right on other images differ by far less than their standard error; 60 by far more."""
    candidates = [tables_of(with_accuracy(share, seed), LABELS) for seed, share in enumerate((0.9, 0.89, 0.6))]
    found = choose_cheapest(LABELS, candidates, [30.0, 20.0, 10.0])
    assert (found.best, found.chosen, found.equal) == (0, 1, (1, 0))
    assert found.differences == pytest.approx((0.0, 0.01, 0.3))


def test_the_error_is_that_of_the_paired_difference():
    """One right on just one image more: the error of the difference by hand, sqrt(p (1 - p) / n) with p = 0.03."""
    better, worse = with_accuracy(0.9), with_accuracy(0.9)
    worse[np.flatnonzero(worse)[:3]] = False
    found = choose_cheapest(LABELS, [tables_of(better, LABELS), tables_of(worse, LABELS)], [2.0, 1.0])
    assert found.standard_errors[1] == pytest.approx(np.sqrt(0.03 * 0.97 / 100), rel=0.1)
    assert found.chosen == 0  # 0.03 against 0.017


def test_seeds_of_a_candidate_count_together():
    candidates = [[tables_of(with_accuracy(share, seed), LABELS) for seed in range(3)] for share in (0.6, 0.9)]
    assert choose_cheapest(LABELS, candidates, [1.0, 1.0]).chosen == 1


def test_winners_of_many_that_know_nothing_are_corrected_to_chance():
    """On the average of data sets; on one alone a candidate may be lucky on all of it."""
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        hits = rng.random((50, 100)) < 0.5
        found.append(corrected_score(LABELS, [tables_of(row, LABELS) for row in hits], draws=200))
    assert np.mean([one["value"] for one in found]) > 0.6
    assert np.mean([one["corrected"] for one in found]) == pytest.approx(0.5, abs=0.03)
    assert all(one["optimism"] == pytest.approx(one["value"] - one["corrected"]) for one in found)
    assert all(one["low"] < one["corrected"] < one["high"] for one in found)


def test_the_correction_is_that_of_the_paper_by_hand():
    """Each draw in a loop: choose on the drawn images, judge on the others."""
    rng = np.random.default_rng(3)
    hits = rng.random((4, 30)) < np.array([0.5, 0.6, 0.6, 0.7])[:, None]
    labels = LABELS[:30]
    found = corrected_score(labels, [tables_of(row, labels) for row in hits], draws=4000)
    by_hand = []
    for _ in range(4000):
        drawn = rng.integers(30, size=30)
        others = np.setdiff1d(np.arange(30), drawn)
        by_hand.append(hits[hits[:, drawn].mean(1).argmax(), others].mean())
    assert found["corrected"] == pytest.approx(np.mean(by_hand), abs=0.01)


def test_a_candidate_that_is_surely_best_needs_little_correction():
    candidates = [tables_of(with_accuracy(share, seed), LABELS) for seed, share in enumerate((0.95, 0.5, 0.5))]
    assert abs(corrected_score(LABELS, candidates)["optimism"]) < 0.01


def test_images_of_one_group_are_never_on_both_sides():
    """Ten copies of each of ten images: who is right on all copies of most is right on what is left out by chance."""
    groups = np.repeat(np.arange(10), 10)
    rng = np.random.default_rng(1)
    candidates = [tables_of((rng.random(10) < 0.5)[groups], LABELS) for _ in range(30)]
    grouped = corrected_score(LABELS, candidates, groups=groups.tolist())
    assert grouped["corrected"] < 0.6 < corrected_score(LABELS, candidates)["corrected"]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: choose_cheapest(LABELS, [], []), "0 candidates and 0 costs"),
        (lambda: choose_cheapest(LABELS, [tables_of(with_accuracy(0.5), LABELS)], [1.0, 2.0]), "1 candidates and 2"),
        (lambda: corrected_score(LABELS, []), "has no winner"),
        (lambda: corrected_score([0, 1], [[[1.0, 0.0], [0.0, 1.0]]], groups=["a", "a"]), "at least two groups"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, told):
    with pytest.raises(InputError, match=told):
        call()
