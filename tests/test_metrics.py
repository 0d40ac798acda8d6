import json
import math
import warnings

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics as sk

from tfxfer import metrics
from tfxfer.errors import InputError

SK = {
    "accuracy": sk.accuracy_score,
    "macro_f1": lambda y, p, **given: sk.f1_score(y, p, average="macro", **given),
    "balanced_accuracy": sk.balanced_accuracy_score,
}


def made_up(num_images: int, num_classes: int, seed: int, strength: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Labels of every class and probabilities that are right fairly often."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_images) % num_classes)
    logits = rng.normal(size=(num_images, num_classes))
    logits[np.arange(num_images), labels] += strength
    exp = np.exp(logits)
    return labels, exp / exp.sum(1, keepdims=True)


def sure(predictions: np.ndarray, num_classes: int) -> np.ndarray:
    return np.eye(num_classes)[predictions]


def names(num_classes: int) -> list[str]:
    return [f"class {k}" for k in range(num_classes)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("num_images", "num_classes", "seed"), [(30, 2, 0), (57, 4, 1), (200, 10, 2)])
def test_values_are_those_of_scikit_learn(num_images, num_classes, seed, weighted):
    labels, probabilities = made_up(num_images, num_classes, seed)
    weights = np.random.default_rng(seed).uniform(0.2, 3, num_images) if weighted else None
    predictions = probabilities.argmax(1)
    scores = metrics.score(labels, probabilities, names(num_classes), weights=weights, draws=100)
    for name, reference in SK.items():
        expected = reference(labels, predictions, sample_weight=weights)
        assert scores[name]["value"] == pytest.approx(expected, abs=1e-12)
        assert metrics.metric_value(name, labels, probabilities, weights=weights) == pytest.approx(expected, abs=1e-12)
        by_number = metrics.metric_value(name, labels, predictions=predictions, weights=weights)
        assert by_number == pytest.approx(expected, abs=1e-12)
    expected = sk.log_loss(labels, probabilities, sample_weight=weights)
    assert metrics.log_loss(labels, probabilities, weights) == pytest.approx(expected, abs=1e-12)
    assert scores["log_loss"]["value"] == pytest.approx(expected, abs=1e-12)
    assert scores["confusion_matrix"] == sk.confusion_matrix(labels, predictions).tolist()
    table = sk.precision_recall_fscore_support(labels, predictions, sample_weight=weights, zero_division=0)
    for row, *expected in zip(scores["per_class"], *table[:3], np.bincount(labels), strict=True):
        assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(expected, abs=1e-12)


def test_classes_without_images_are_treated_as_scikit_learn_does():
    labels = np.array([0, 0, 1, 1])  # class 2 is predicted but absent, class 3 is neither
    predictions = np.array([0, 2, 1, 1])
    for name, reference in SK.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn remarks on the class that is only predicted
            expected = reference(labels, predictions)
        assert metrics.metric_value(name, labels, sure(predictions, 4)) == pytest.approx(expected), name


def test_saturated_probabilities_cost_what_scikit_learn_says_for_float32():
    labels, wrong = np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]], "float32")
    assert metrics.log_loss(labels, wrong) == pytest.approx(sk.log_loss(labels, wrong), rel=1e-6)
    np.testing.assert_allclose(metrics.per_image_log_loss(labels, wrong), [-math.log(2.0**-23), 0])


def slow_calibration_error(labels, probabilities, bins):
    total = 0.0
    for b in range(bins):
        rows = [i for i in range(len(labels)) if b / bins < max(probabilities[i]) <= (b + 1) / bins]
        if rows:
            right = np.mean([np.argmax(probabilities[i]) == labels[i] for i in rows])
            total += len(rows) / len(labels) * abs(right - np.mean([max(probabilities[i]) for i in rows]))
    return total


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_is_that_of_a_plain_loop(bins):
    labels, probabilities = made_up(300, 4, 5)
    expected = slow_calibration_error(labels, probabilities, bins)
    assert metrics.calibration_error(labels, probabilities, bins) == pytest.approx(expected, abs=1e-12)
    if bins == metrics.CALIBRATION_BINS:
        scores = metrics.score(labels, probabilities, names(4), draws=100)
        assert scores["calibration_error"]["value"] == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_known_cases():
    half = np.full((10, 2), 0.5)
    assert metrics.calibration_error(np.arange(10) % 2, half) == pytest.approx(0)
    assert metrics.calibration_error(np.zeros(10, int), sure(np.ones(10, int), 2)) == pytest.approx(1)


def test_gaps_of_different_bins_do_not_cancel():
    table = np.array([[0.85, 0.15], [0.95, 0.05], [0.25, 0.75], [0.0, 1.0]])  # right, wrong, right, right
    found = metrics.calibration_error([0, 1, 1, 1], table, bins=10)
    assert found == pytest.approx((0.15 + 0.95 + 0.25) / 4)


def test_interval_of_the_calibration_error_allows_for_its_bias():
    rng = np.random.default_rng(3)
    covered = 0
    for repeat in range(200):
        labels = np.arange(60) % 3
        confidence = 0.4 + 0.6 * rng.beta(4, 1.5, 60)  # and right 0.1 less often, so the true error is 0.1
        predictions = np.where(rng.random(60) < confidence - 0.1, labels, (labels + 1) % 3)
        table = np.repeat((1 - confidence)[:, None] / 2, 3, axis=1)
        table[np.arange(60), predictions] = confidence
        found = metrics.score(labels, table, names(3), draws=300, seed=repeat)["calibration_error"]
        covered += found["low"] <= 0.1 <= found["high"]
    assert covered / 200 >= 0.86  # percentiles as they are: 0.67


def drawn_one_by_one(labels, groups, draws, seed, statistic):
    """The bootstrap spelled out: lists of images, n - 1 of a class's n groups, their weight raised to make up."""
    rng = np.random.default_rng(seed)
    members = {group: np.flatnonzero(groups == group) for group in np.unique(groups)}
    strata = [[g for g, rows in members.items() if labels[rows[0]] == k] for k in np.unique(labels)]
    found = []
    for _ in range(draws):
        rows, weights = [], []
        for stratum in strata:
            picked = rng.choice(stratum, len(stratum) - 1)
            taken = np.concatenate([members[g] for g in picked])
            rows.append(taken)
            weights.append(np.full(len(taken), len(stratum) / (len(stratum) - 1)))
        found.append(statistic(np.concatenate(rows), np.concatenate(weights)))
    return np.array(found)


@pytest.fixture
def grouped():
    """Images of 3 classes in 43 groups of 1 to 6 that are mostly right or wrong together."""
    rng = np.random.default_rng(7)
    sizes = rng.integers(1, 7, 43)
    groups = np.repeat(np.arange(43), sizes)
    labels = groups % 3
    right = rng.random(43)[groups] < 0.65
    flipped = rng.random(len(groups)) < 0.1
    predictions = np.where(right ^ flipped, labels, (labels + 1) % 3)
    probabilities = 0.7 * sure(predictions, 3) + 0.1
    return labels, probabilities, groups


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "balanced_accuracy", "log_loss"])
def test_intervals_are_those_of_a_bootstrap_spelled_out(grouped, name):
    labels, probabilities, groups = grouped
    predictions = probabilities.argmax(1)

    def statistic(rows, weights):
        if name == "log_loss":
            return sk.log_loss(labels[rows], probabilities[rows], sample_weight=weights)
        return SK[name](labels[rows], predictions[rows], sample_weight=weights)

    reference = drawn_one_by_one(labels, groups, 600, 3, statistic)
    found = metrics.score(labels, probabilities, names(3), groups=groups, draws=20_000)[name]
    spread = reference.std()
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(reference, [0.025, 0.975]), abs=0.25 * spread)
    by_image = metrics.score(labels, probabilities, names(3))[name]
    assert found["high"] - found["low"] > 1.3 * (by_image["high"] - by_image["low"])


def test_interval_of_the_accuracy_has_the_width_that_its_variance_implies():
    labels, probabilities = made_up(600, 3, 11)
    right = probabilities.argmax(1) == labels
    per_class = [right[labels == k] for k in range(3)]
    expected = math.sqrt(sum(one.var(ddof=1) * len(one) for one in per_class)) / 600
    found = metrics.score(labels, probabilities, names(3), draws=20_000)["accuracy"]
    assert (found["high"] - found["low"]) / (2 * norm.ppf(0.975)) == pytest.approx(expected, rel=0.06)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), (15, 30, 30, 25))
    recall, hit = np.array([0.6, 0.8, 0.9, 0.7]), dict.fromkeys(metrics.METRICS, 0)
    support = np.bincount(labels)
    hits = support * recall
    predicted = hits + ((support - hits).sum() - (support - hits)) / 3
    truth = {
        "accuracy": hits.sum() / 100,
        "macro_f1": np.mean(2 * hits / (support + predicted)),
        "balanced_accuracy": recall.mean(),
    }
    for repeat in range(300):
        wrong = (labels + rng.integers(1, 4, 100)) % 4
        predictions = np.where(rng.random(100) < recall[labels], labels, wrong)
        scores = metrics.score(labels, sure(predictions, 4), names(4), draws=400, seed=repeat)
        for name in hit:
            hit[name] += scores[name]["low"] <= truth[name] <= scores[name]["high"]
    for name, times in hit.items():
        assert 0.91 <= times / 300 <= 0.985, (name, times)


def test_intervals_by_group_cover_the_truth_where_those_by_image_do_not():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 5)
    labels = groups % 2
    by_group = by_image = 0
    for repeat in range(200):
        predictions = np.where((rng.random(60) < 0.7)[groups], labels, 1 - labels)  # a group is right as a whole
        table = sure(predictions, 2)
        with_groups = metrics.score(labels, table, names(2), groups=groups, draws=400, seed=repeat)["accuracy"]
        without = metrics.score(labels, table, names(2), draws=400, seed=repeat)["accuracy"]
        by_group += with_groups["low"] <= 0.7 <= with_groups["high"]
        by_image += without["low"] <= 0.7 <= without["high"]
    assert by_group / 200 >= 0.91
    assert by_image / 200 <= 0.75


def test_wilson_interval_by_its_formula():
    z = 1.959964
    for hits, num in ((0, 20), (20, 20), (7, 31)):
        p = hits / num
        half = z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
        expected = [(p + z * z / (2 * num) + sign * half) / (1 + z * z / num) for sign in (-1, 1)]
        assert metrics.wilson_interval(p, num) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("right", [True, False])
def test_all_right_and_all_wrong_get_wilsons_interval(right):
    labels = np.repeat([0, 1], (30, 10))
    probabilities = sure(labels if right else 1 - labels, 2)
    scores = metrics.score(labels, probabilities, names(2))
    unseen = 1.959964**2 / (40 + 1.959964**2)
    expected = (1 - unseen, 1) if right else (0, unseen)
    assert (scores["accuracy"]["low"], scores["accuracy"]["high"]) == pytest.approx(expected, abs=1e-6)
    assert "Wilson" in scores["interval"]
    # The mean of two recalls, of 30 and of 10 images, is as uncertain as a share of 4 / (1/30 + 1/10) = 30 images.
    unseen = 1.959964**2 / (30 + 1.959964**2)
    expected = (1 - unseen, 1) if right else (0, unseen)
    for name in ("macro_f1", "balanced_accuracy"):
        assert (scores[name]["low"], scores[name]["high"]) == pytest.approx(expected, abs=1e-6)
    # Eight equal groups count as eight observations, not as forty.
    grouped = metrics.score(labels, probabilities, names(2), groups=np.arange(40) // 5)["accuracy"]
    assert grouped["high"] - grouped["low"] == pytest.approx(1.959964**2 / (8 + 1.959964**2), abs=1e-6)


def test_score_is_json_repeats_with_its_seed_and_says_what_it_covers(grouped):
    labels, probabilities, groups = grouped
    scores = metrics.score(labels, probabilities, names(3), groups=groups)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert metrics.score(labels, probabilities, names(3), groups=groups) == scores
    assert metrics.score(labels, probabilities, names(3), groups=[("cell", g) for g in groups]) == scores
    assert metrics.score(labels, probabilities, names(3), groups=groups, seed=1) != scores
    assert (scores["num_images"], scores["num_groups"]) == (len(labels), 43)
    assert scores["interval"] == "95 % bootstrap, 2000 draws, by group, stratified by class"
    assert "not retraining" in scores["covers"] and "Few" not in scores["covers"]
    few = metrics.score(labels, probabilities, names(3), groups=np.where(labels == 2, -1, groups))
    assert "Few groups stand behind class 2 (1)" in few["covers"]


def test_weights_count_like_copies():
    labels, probabilities = made_up(40, 3, 4)
    copies = np.random.default_rng(4).integers(1, 4, 40)
    repeated = metrics.score(np.repeat(labels, copies), np.repeat(probabilities, copies, 0), names(3), draws=100)
    weighted = metrics.score(labels, probabilities, names(3), weights=copies, draws=100)
    for name in metrics.SCORES:
        assert weighted[name]["value"] == pytest.approx(repeated[name]["value"], abs=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "log_loss"])
def test_paired_difference_is_that_of_a_bootstrap_spelled_out(grouped, metric):
    labels, a, groups = grouped
    rng = np.random.default_rng(9)
    b = np.where((rng.random(len(labels)) < 0.25)[:, None], np.roll(a, 1, axis=1), a)

    def statistic(rows, weights):
        if metric == "log_loss":
            values = [sk.log_loss(labels[rows], one[rows], sample_weight=weights) for one in (a, b)]
        else:
            values = [SK[metric](labels[rows], one[rows].argmax(1), sample_weight=weights) for one in (a, b)]
        return values[0] - values[1]

    reference = drawn_one_by_one(labels, groups, 600, 3, statistic)
    found = metrics.paired_difference(a, b, labels, metric=metric, groups=groups, draws=20_000)
    spread = reference.std()
    assert found["difference"] == pytest.approx(statistic(np.arange(len(labels)), np.ones(len(labels))), abs=1e-12)
    assert found["standard_error"] == pytest.approx(spread, rel=0.1)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(reference, [0.025, 0.975]), abs=0.25 * spread)


def test_paired_standard_error_is_mcnemars_and_far_below_that_of_two_samples():
    labels = np.zeros(400, int)
    a, b = np.zeros(400, int), np.zeros(400, int)
    a[:70] = b[:60] = 1  # both wrong on 60 images
    a[60:70], b[390:] = 1, 1  # and each alone on ten
    found = metrics.paired_difference(sure(a, 2), sure(b, 2), labels, draws=20_000)
    assert found["difference"] == pytest.approx(0)
    assert found["standard_error"] == pytest.approx(math.sqrt(20) / 400, rel=0.03)
    swapped = metrics.paired_difference(sure(b, 2), sure(a, 2), labels, draws=20_000)
    assert (swapped["low"], swapped["high"]) == pytest.approx((-found["high"], -found["low"]), abs=1e-12)


def test_no_disagreement_seen_is_not_proof_that_there_is_none():
    labels, table = made_up(100, 2, 0)
    found = metrics.paired_difference(table, table, labels)
    unseen = 1.959964**2 / (100 + 1.959964**2)
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((0, -unseen, unseen), abs=1e-6)


def test_seeds_are_drawn_too():
    labels, base = made_up(300, 2, 0, strength=9)
    flipped = base.copy()
    flipped[:30] = flipped[:30, ::-1]  # a training that went worse: 10 points lower
    one = metrics.paired_difference(base, base, labels)
    three = metrics.paired_difference(np.stack([base, base, flipped]), np.stack([base] * 3), labels, draws=20_000)
    assert three["difference"] == pytest.approx(-0.1 / 3, abs=1e-9)
    assert three["low"] < -0.08 < one["low"]
    # The seeds differ by 0, 0 and -0.1: variance 0.1² / 3, that of their mean a third of it. The images add little.
    assert three["standard_error"] == pytest.approx(0.1 / 3, rel=0.06)


def scores_with(metric, low, high):
    return {metric: {"value": (low + high) / 2, "low": low, "high": high}}


def test_split_warning_where_the_intervals_do_not_overlap():
    assert metrics.intervals_overlap({"low": 0.2, "high": 0.5}, {"low": 0.3, "high": 0.4})
    assert not metrics.intervals_overlap({"low": 0.2, "high": 0.5}, {"low": 0.51, "high": 0.6})
    near = metrics.split_warning(scores_with("accuracy", 0.8, 0.9), scores_with("accuracy", 0.85, 0.95), "accuracy")
    assert near is None
    text = metrics.split_warning(scores_with("macro_f1", 0.9, 0.98), scores_with("macro_f1", 0.7, 0.8), "macro_f1")
    assert "0.940 (0.900 to 0.980) on the validation part" in text and "--group-by" in text


GOOD = np.full((4, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.score([0, 1, 0], GOOD, ["a", "b"]), "labels"),
        (lambda: metrics.score([0, 1, 0, 2], GOOD, ["a", "b"]), "0..1"),
        (lambda: metrics.score([0.0, 1, 0, 1], GOOD, ["a", "b"]), "whole numbers"),
        (lambda: metrics.score([0, 1, 0, 1], GOOD * 6 - 2, ["a", "b"]), "logits"),
        (lambda: metrics.score([0, 1, 0, 1], GOOD * np.nan, ["a", "b"]), "finite"),
        (lambda: metrics.score([0, 1, 0, 1], GOOD, ["a"]), "class names"),
        (lambda: metrics.score([0, 1, 0, 1], GOOD, ["a", "b"], groups=[1, 2]), "2 groups"),
        (lambda: metrics.score([0, 1, 0, 1], GOOD, ["a", "b"], weights=[1, 1, 1, -1]), "weights"),
        (lambda: metrics.score([0, 1, 0, 1], GOOD, ["a", "b"], draws=10), "draws"),
        (lambda: metrics.score([0, 1, 0, 1], GOOD, ["a", "b"], confidence=95), "confidence"),
        (lambda: metrics.metric_value("acuracy", [0], predictions=[0]), "'accuracy'"),
        (lambda: metrics.metric_value("accuracy", [0]), "either"),
        (lambda: metrics.metric_value("accuracy", [0], predictions=[-1]), "predictions"),
        (lambda: metrics.metric_value("accuracy", ["cat"], predictions=[0]), "labels"),
        (lambda: metrics.paired_difference(GOOD, GOOD[:, :1], [0, 0, 0, 0]), "agree"),
        (lambda: metrics.paired_difference(GOOD[0], GOOD[0], [0, 0]), "(N, K)"),
        (lambda: metrics.calibration_error([0, 1, 0, 1], GOOD, bins=0), "bins"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(call, says):
    with pytest.raises(InputError) as caught:
        call()
    assert says in str(caught.value)
