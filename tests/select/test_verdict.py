import numpy as np
import pytest

from tfxfer.errors import InputError
from tfxfer.select.verdict import VERDICTS, judge, verdict


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.02, 0.10, "positive"),
        (0.001, 0.10, "positive"),
        (0.001, 0.008, "equivalent"),  # surely better, by too little to matter
        (-0.01, 0.01, "equivalent"),
        (0.0, 0.0, "equivalent"),
        (-0.009, -0.001, "equivalent"),  # surely worse, by too little to fail a run
        (-0.01, 0.011, "inconclusive"),
        (0.0, 0.2, "inconclusive"),
        (-0.3, 0.3, "inconclusive"),
        (-0.3, -0.001, "negative"),
        (-0.3, -0.2, "negative"),
    ],
)
def test_the_word_follows_from_interval_and_margin(low, high, expected):
    assert judge(low, high, margin=0.01) == expected
    assert expected in VERDICTS


def test_margin_moves_equivalence_only():
    assert judge(0.001, 0.008, margin=0) == "positive"
    assert judge(0.02, 0.04, margin=0.05) == "equivalent"


def with_errors(labels, num_classes, wrong):
    """Probabilities that are right but on the images `wrong`."""
    predictions = labels.copy()
    predictions[wrong] = (predictions[wrong] + 1) % num_classes
    return 0.8 * np.eye(num_classes)[predictions] + 0.2 / num_classes


def test_a_clear_winner_a_clear_loser_and_too_few_images():
    labels = np.arange(400) % 4
    good, bad = with_errors(labels, 4, slice(0, 40)), with_errors(labels, 4, slice(0, 100))
    won, lost = verdict(good, bad, labels), verdict(bad, good, labels)
    assert won["verdict"] == "positive" and won["difference"] == pytest.approx(0.15)
    assert 0.11 < won["low"] < 0.13 and 0.17 < won["high"] < 0.19  # the standard error is 0.0179
    assert lost["verdict"] == "negative" and lost["difference"] == pytest.approx(-0.15)
    few = np.r_[0:8]
    close = verdict(with_errors(labels[few], 4, slice(0, 1)), with_errors(labels[few], 4, slice(1, 3)), labels[few])
    assert close["verdict"] == "inconclusive"
    assert set(won) == {"verdict", "metric", "difference", "low", "high", "standard_error", "margin"}


def test_as_good_as_each_other_needs_enough_images():
    for num, expected in ((200, "inconclusive"), (4000, "equivalent")):
        labels = np.arange(num) % 2
        a, b = with_errors(labels, 2, slice(0, 4)), with_errors(labels, 2, slice(4, 8))
        assert verdict(a, b, labels)["verdict"] == expected


def test_groups_take_certainty_away():
    labels = np.arange(120) % 2
    groups = np.arange(120) // 30 * 2 + labels  # 8 groups of 15
    good, bad = with_errors(labels, 2, slice(0, 0)), with_errors(labels, 2, np.flatnonzero(np.isin(groups, [0, 1])))
    assert verdict(good, bad, labels)["verdict"] == "positive"
    assert verdict(good, bad, labels, groups=groups)["verdict"] == "inconclusive"


def test_the_metric_decides():
    labels = np.repeat([0, 1], [900, 60])
    rare = with_errors(labels, 2, np.arange(0, 63))  # 63 errors in the large class
    common = with_errors(labels, 2, np.arange(900, 930))  # 30 errors in the small one
    assert verdict(rare, common, labels)["verdict"] == "negative"
    assert verdict(rare, common, labels, metric="balanced_accuracy")["verdict"] == "positive"


def test_a_false_alarm_is_as_rare_as_a_95_percent_interval_makes_it():
    rng = np.random.default_rng(2)
    labels = np.arange(150) % 3
    words = []
    for repeat in range(300):
        a, b = (with_errors(labels, 3, rng.random(150) < 0.2) for _ in range(2))
        words.append(verdict(a, b, labels, draws=400, seed=repeat)["verdict"])
    assert words.count("positive") + words.count("negative") <= 26  # 5 % of 300 are 15, standard deviation 3.8
    assert words.count("inconclusive") >= 270


def test_several_seeds_on_both_sides():
    labels = np.arange(300) % 3
    lucky, unlucky = with_errors(labels, 3, slice(0, 10)), with_errors(labels, 3, slice(0, 90))
    base = with_errors(labels, 3, slice(0, 60))
    assert verdict(lucky, base, labels)["verdict"] == "positive"
    mixed = verdict(np.stack([lucky, unlucky, lucky]), np.stack([base] * 3), labels)
    assert mixed["verdict"] == "inconclusive" and mixed["difference"] == pytest.approx((50 - 30 + 50) / 900)


def test_bad_arguments_are_refused():
    labels, table = np.array([0, 1]), np.eye(2)
    with pytest.raises(InputError, match="margin"):
        verdict(table, table, labels, margin=-0.1)
    with pytest.raises(InputError, match="metric 'auc'"):
        verdict(table, table, labels, metric="auc")
    with pytest.raises(InputError, match="from low to high"):
        judge(0.2, 0.1)
