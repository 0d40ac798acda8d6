import keras
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV

from tfxfer.metrics import metric_value
from tfxfer.model.build import build_model
from tfxfer.select.baseline import judge_baselines, quick_baselines, random_features_baseline
from tfxfer.select.scratch import _Mirrored, train_from_scratch
from tfxfer.sources.catalog import get_source
from tfxfer.specs import Plan, Recipe, Stage
from tfxfer.train.clock import Clock
from tfxfer.train.outcome import TrainingData

PLAN = Plan("digits_cnn", Recipe("probe", (Stage("probe", solver="convex", epochs=0),)), image_size=32, seed=1)
NAMES = ["majority class", "logistic regression on pixels", "SVC on pixels", "random weights, same head"]


@pytest.fixture(scope="module")
def parts(digits):
    """160 digits to train on, 40 held out, 300 to test on."""
    images, labels = digits
    order = np.random.default_rng(0).permutation(len(labels))[:500]
    images, labels = images[order], labels[order]
    data = TrainingData(
        parts=(images[:160], images[160:200]),
        labels=labels[:200],
        weights=np.ones(200),
        groups=tuple(map(str, range(200))),
        rows=np.arange(160),
        held=np.arange(160, 200),
        num_classes=10,
        may_pool=True,
    )
    return data, images[200:], labels[200:]


def answers(labels, right: int, classes: int = 3) -> np.ndarray:
    """Probabilities that are right on the first `right` images."""
    chosen = labels.copy()
    chosen[right:] = (chosen[right:] + 1) % classes
    return 0.1 + 0.7 * np.eye(classes)[chosen]


LABELS = np.random.default_rng(1).integers(0, 3, 400)


@pytest.mark.parametrize(
    ("right", "word"), [(380, "positive"), (200, "negative"), (300, "equivalent"), (310, "inconclusive")]
)
def test_the_verdict_is_against_the_best_baseline_and_names_it(right, word):
    table = answers(LABELS, right)
    if word == "inconclusive":  # gains ten images, and loses and gains others
        table = answers(LABELS, 290)
        table[300:320] = 0.1 + 0.7 * np.eye(3)[LABELS[300:320]]
    baselines = {"weak": answers(LABELS, 120), "strong": answers(LABELS, 300), "middle": answers(LABELS, 299)}
    found = judge_baselines(table, baselines, LABELS, None, None, metric="accuracy", seed=0)
    assert (found["best"], found["verdict"]) == ("strong", word)
    assert found["scores"] == pytest.approx({"weak": 0.3, "strong": 0.75, "middle": 299 / 400})
    assert found["model"] == pytest.approx((right) / 400)
    assert found["difference"] == pytest.approx(found["model"] - 0.75)
    assert found["margin"] == 0.01 and found["metric"] == "accuracy"


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy"])
def test_the_metric_asked_for_decides_which_is_best(metric):
    labels = np.repeat([0, 1, 2], [360, 20, 20])
    common = 0.1 + 0.7 * np.eye(3)[np.zeros(400, int)]  # all of the common class: 90 % accurate
    fair = answers(labels, 0)
    fair[100:] = 0.1 + 0.7 * np.eye(3)[labels[100:]]  # 75 % accurate, right on all rare ones
    tables = {"common": common, "fair": fair}
    assert judge_baselines(fair, tables, labels, None, None, metric="accuracy", seed=0)["best"] == "common"
    found = judge_baselines(fair, tables, labels, None, None, metric=metric, seed=0)
    assert found["best"] == "fair" and found["scores"]["fair"] == metric_value(metric, labels, fair)


def test_seeds_are_averaged_on_both_sides():
    ours = np.stack([answers(LABELS, 380), answers(LABELS, 360)])
    theirs = {
        "lucky once": np.stack([answers(LABELS, 340), answers(LABELS, 100)]),
        "steady": np.stack([answers(LABELS, 300), answers(LABELS, 300)]),
    }
    found = judge_baselines(ours, theirs, LABELS, None, None, metric="accuracy", seed=0)
    assert found["best"] == "steady" and found["verdict"] == "positive"
    assert found["model"] == pytest.approx(370 / 400)
    assert found["scores"] == pytest.approx({"lucky once": 220 / 400, "steady": 300 / 400})


def test_groups_and_weights_of_the_test_images_count():
    ours, theirs = answers(LABELS, 330), {"other": answers(LABELS, 300)}
    alone = judge_baselines(ours, theirs, LABELS, None, None, metric="accuracy", seed=0)
    groups = np.arange(400) // 40
    together = judge_baselines(ours, theirs, LABELS, groups, None, metric="accuracy", seed=0)
    assert alone["verdict"] == "positive" and together["verdict"] != "positive"
    weights = np.where((np.arange(400) >= 300) & (np.arange(400) < 330), 0.0, 1.0)
    weighed = judge_baselines(ours, theirs, LABELS, None, weights, metric="accuracy", seed=0)
    assert weighed["difference"] == pytest.approx(0)


def test_the_quick_baselines_learn_what_there_is_to_learn(parts):
    data, images, labels = parts
    found = quick_baselines(get_source("digits_cnn"), PLAN, data, images)
    assert list(found) == NAMES
    accuracy = {name: metric_value("accuracy", labels, table) for name, table in found.items()}
    for table in found.values():
        assert table.shape == (300, 10)
        np.testing.assert_allclose(table.sum(1), 1, rtol=1e-5)
    assert accuracy["majority class"] < 0.16
    assert min(accuracy["logistic regression on pixels"], accuracy["SVC on pixels"]) > 0.85
    assert 0.5 < accuracy["random weights, same head"] < accuracy["SVC on pixels"]


def test_random_weights_get_the_same_head_as_any_other(parts):
    """Features by plain Keras, head by scikit-learn: as accurate, to a few images."""
    data, images, labels = parts
    found = random_features_baseline(get_source("digits_cnn"), PLAN, data, images)
    again = random_features_baseline(get_source("digits_cnn"), PLAN, data, images)
    np.testing.assert_allclose(found, again, atol=1e-5)
    keras.utils.set_random_seed(PLAN.seed)
    model = build_model("digits_cnn", 10, weights=False, seed=PLAN.seed)
    network = keras.Model(model.input, model.get_layer("dropout").input)
    train, test = network.predict(np.concatenate(data.parts), verbose=0), network.predict(images, verbose=0)
    mean, scale = train.mean(0), np.maximum(train.std(0), 1e-6)
    head = LogisticRegressionCV(
        Cs=np.logspace(-3, 1, 5), l1_ratios=(0,), scoring="neg_log_loss", use_legacy_attributes=False, max_iter=2000
    ).fit((train - mean) / scale, data.labels)
    expected = (head.predict((test - mean) / scale) == labels).mean()
    assert metric_value("accuracy", labels, found) == pytest.approx(expected, abs=0.04)


def test_the_weights_of_training_images_count_in_every_quick_baseline(parts):
    import dataclasses

    data, images, _ = parts
    weights = np.where(data.labels == 3, 8.0, 0.5)
    heavy = dataclasses.replace(data, weights=weights / weights.mean())
    card = get_source("digits_cnn")
    plain, skewed = (quick_baselines(card, PLAN, each, images) for each in (data, heavy))
    assert (skewed["majority class"].argmax(1) == 3).all()
    for name in NAMES[1:]:
        assert skewed[name][:, 3].mean() > plain[name][:, 3].mean(), name


def test_mirrored_views_are_those_of_one_array_of_both():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (7, 4, 5, 3), np.uint8)
    before = pixels.copy()
    view, rows = random.integers(0, 2, 20), random.integers(0, 7, 20)
    batch = _Mirrored(pixels)[view, rows]
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_array_equal(batch, np.stack([pixels, pixels[:, :, ::-1]])[view, rows])
    assert batch.dtype == np.float32


@pytest.fixture
def small(parts):
    data, images, labels = parts
    assert np.asarray(Image.fromarray(images[0])).shape == (32, 32, 3)
    return data, images[:50], labels[:50]


def test_steps_that_run_out_are_told_and_the_loss_told_is_that_of_the_weights_kept(small, monkeypatch):
    monkeypatch.setattr("tfxfer.select.scratch.MIN_EPOCHS", 2)
    monkeypatch.setattr("tfxfer.select.scratch.PEAK_RATE", 0.02)
    data, _, _ = small
    held = np.concatenate(data.parts)[data.held]
    found = train_from_scratch(get_source("digits_cnn"), PLAN, data, held, transfer_epochs=2, mirror=True)
    assert (found.epochs, found.converged) == (6, False)
    assert found.probabilities.shape == (len(held), 10)
    told = np.log(found.probabilities[np.arange(len(held)), data.labels[data.held]])
    weights = data.weights[data.held]
    assert found.best_log_loss == pytest.approx(-(told * weights).sum() / weights.sum(), rel=1e-3)


class Reads:
    """Rows of an array, and how many were asked for at once."""

    def __init__(self, pixels: np.ndarray, sizes: list[int]):
        self.pixels, self.shape, self.dtype, self.sizes = pixels, pixels.shape, pixels.dtype, sizes

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, rows):
        found = self.pixels[rows]
        self.sizes.append(len(found))
        return found


@pytest.mark.parametrize("seen", [{"mirror": True}, {"mirror": False, "rand": True}])
def test_training_from_scratch_reads_a_batch_at_a_time(parts, monkeypatch, seen):
    """500 images; a weight of zero on the last 90 of the validation part says how those behind the first 64 count."""
    monkeypatch.setattr("tfxfer.select.scratch.MIN_EPOCHS", 1)
    data, images, labels = parts
    pixels, sizes = np.concatenate([*data.parts, images]), []
    many = TrainingData(
        parts=(Reads(pixels[:200], sizes), Reads(pixels[200:], sizes)),
        labels=np.concatenate([data.labels, labels]),
        weights=np.where(np.arange(500) < 410, 1.0, 0.0),
        groups=tuple(map(str, range(500))),
        rows=np.arange(150),
        held=np.arange(150, 500),
        num_classes=10,
        may_pool=True,
    )
    found = train_from_scratch(get_source("digits_cnn"), PLAN, many, pixels[150:410], transfer_epochs=0, **seen)
    assert max(sizes) == 64 and sum(sizes) >= 500
    told = np.log(found.probabilities[np.arange(260), many.labels[150:410]])
    assert found.best_log_loss == pytest.approx(-told.mean(), rel=1e-3)


def test_time_that_runs_out_stops_training_from_scratch_and_nothing_is_proven(small):
    data, test, _ = small
    over = Clock(1.0, started=0.0, now=lambda: 2.0)
    found = train_from_scratch(
        get_source("digits_cnn"), PLAN, data, test, transfer_epochs=2, mirror=False, clock=over, held_seconds=1.0
    )
    assert (found.epochs, found.converged) == (1, False) and np.isfinite(found.best_log_loss)
    assert over.stopped and found.probabilities.shape == (len(test), 10)


def test_baselines_that_are_not_wanted_are_not_there(small):
    data, test, _ = small
    asked = []
    found = quick_baselines(get_source("digits_cnn"), PLAN, data, test, wanted=lambda name: bool(asked.append(name)))
    assert list(found) == ["majority class"] and asked == ["classifiers on pixels", "random weights, same head"]
    prior = np.bincount(data.labels, weights=data.weights, minlength=10) / data.weights.sum()
    np.testing.assert_allclose(found["majority class"], np.tile(prior, (len(test), 1)))


@pytest.mark.slow
def test_training_from_scratch_stalls_and_is_a_baseline_to_be_reckoned_with(parts):
    data, images, labels = parts
    found = train_from_scratch(get_source("digits_cnn"), PLAN, data, images, transfer_epochs=60, mirror=False)
    assert found.converged and found.epochs < 180
    assert metric_value("accuracy", labels, found.probabilities) > 0.85
