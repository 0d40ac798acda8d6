"""The verdict on a model that goes on from another: by hand counts, and by the bootstrap that is tested elsewhere."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, recall_score

from tfxfer.metrics import paired_difference
from tfxfer.select.promotion import in_classes, judge_promotion

NAMES = ("a", "b", "c")
LABELS = np.repeat([0, 1, 2], [200, 200, 100])


def answers(*wrong: tuple[int, int, int]) -> np.ndarray:
    """One-hot answers that are right but for `count` images of class `k`, which are called `other`."""
    given = LABELS.copy()
    for k, count, other in wrong:
        given[np.flatnonzero(k == LABELS)[:count]] = other
    return np.eye(3)[given]


def judged(new, old, known=(True, True, False), **options):
    return judge_promotion(new, old, LABELS, known=known, class_names=NAMES, **options)


@pytest.mark.parametrize(
    ("wrong_new", "wrong_old", "known", "verdict", "reason"),
    [
        ([(0, 20, 1)], [(0, 20, 1), (2, 100, 0)], (1, 1, 0), "promote", "not surely worse on the classes that both"),
        ([(0, 60, 2)], [(2, 100, 0)], (1, 1, 0), "unclear", "surely worse on the classes that both know"),
        ([(0, 99, 2), (1, 99, 2)], [(2, 100, 0)], (1, 1, 0), "keep", "surely worse over all"),
        ([(0, 55, 1), (1, 44, 2)], [(2, 100, 0)], (1, 1, 0), "unclear", "cannot be told from so few"),
        ([], [(0, 60, 1)], (1, 1, 1), "promote", "surely better on the test images"),
        ([(0, 60, 1)], [], (1, 1, 1), "keep", "surely worse over all"),
        ([(0, 10, 1)], [(0, 10, 1)], (1, 1, 1), "keep", "no difference that matters"),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_both_intervals(wrong_new, wrong_old, known, verdict, reason):
    found = judged(answers(*wrong_new), answers(*wrong_old), known)
    assert found["verdict"] == verdict and reason in found["reason"]


def test_the_numbers_are_those_of_scikit_learn_over_all_and_over_known_images():
    new, old = answers((0, 30, 2), (1, 10, 0)), answers((1, 40, 0), (2, 100, 1))
    groups = [f"g{number // 4}" for number in range(500)]
    found = judged(new, old, groups=groups, seed=3)
    known = LABELS < 2
    assert found["all"]["new"] == pytest.approx(accuracy_score(LABELS, new.argmax(1))) == 460 / 500
    assert found["known"]["new"] == pytest.approx(360 / 400) and found["known"]["old"] == pytest.approx(360 / 400)
    assert (found["all"]["num_images"], found["known"]["num_images"]) == (500, 400)
    expected = paired_difference(new[known], old[known], LABELS[known], groups=groups[:400], seed=3)
    assert {key: found["known"][key] for key in expected} == expected
    recalls = [recall_score(LABELS, table.argmax(1), average=None) for table in (old, new)]
    assert [(row["old"], row["new"]) for row in found["per_class"]] == list(zip(*recalls, strict=True))[:2]
    (lost,) = found["losses"]
    assert (lost["name"], lost["images"], lost["sure"]) == ("a", 200, True)
    assert lost["difference"] == pytest.approx(-0.15) and lost["low"] < -0.15 < lost["high"] < 0


def test_a_new_name_given_once_does_not_cost_a_whole_class():
    new, old = answers((0, 1, 2)), answers((2, 100, 0))
    found = judged(new, old, metric="macro_f1")
    assert found["all"]["metric"] == "macro_f1" and found["known"]["metric"] == "balanced_accuracy"
    assert found["all"]["old"] == pytest.approx(f1_score(LABELS, old.argmax(1), average="macro"))
    known = LABELS < 2
    recalls = recall_score(LABELS[known], new[known].argmax(1), labels=[0, 1], average=None)
    assert found["known"]["new"] == pytest.approx(recalls.mean()) and recalls.mean() > 0.99
    assert found["verdict"] == "promote"


def test_weights_count_in_every_number():
    weights = np.where(np.arange(500) % 2, 1.0, 3.0)
    new, old = answers((0, 31, 1)), answers((1, 7, 0))
    found = judged(new, old, (1, 1, 1), weights=weights)
    assert found["all"]["new"] == pytest.approx(accuracy_score(LABELS, new.argmax(1), sample_weight=weights))
    assert found["per_class"][1]["old"] == pytest.approx(1 - weights[200:207].sum() / weights[200:400].sum())


def test_a_dropped_class_is_masked_and_an_unknown_one_is_never_answered():
    theirs = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    found = in_classes(theirs, ["gone", "b", "a"], ["a", "b", "new"])
    np.testing.assert_allclose(found, [[1 / 3, 2 / 3, 0], [0.5, 0.5, 0]])
