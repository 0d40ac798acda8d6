import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeClassifierCV
from sklearn.neighbors import NearestCentroid

from tfxfer.features.closed_form import Prototypes, RidgePath
from tfxfer.features.solvers import log_softmax, weighted_log_loss
from tfxfer.methods.probe import Logistic


def problem(num: int, width: int, classes: int = 3, noise: float = 1.0, seed: int = 0):
    """Features of unlike scales around centres that overlap."""
    random = np.random.default_rng(seed)
    labels = np.arange(num) % classes
    features = random.normal(0, 0.7, (classes, width))[labels] + random.normal(0, noise, (num, width))
    return (features * 10 ** random.uniform(-1, 1, width) + random.normal(0, 3, width)).astype(np.float32), labels


def folds_of(num: int, count: int = 4):
    rows = np.arange(num)
    return [(rows[rows % count != fold], rows[rows % count == fold]) for fold in range(count)]


def standard(features):
    return (features - features.mean(0)) / features.std(0)


def ridge_scores(x, labels, strength, train, test, weights=None, penalised=None):
    """scikit-learn's ridge regression of one-hot labels; its penalty is not divided by the number of images."""
    weights = np.ones(len(labels)) if weights is None else weights
    model = Ridge(alpha=strength * weights[train if penalised is None else penalised].sum())
    return model.fit(x[train], np.eye(3)[labels[train]], sample_weight=weights[train]).predict(x[test])


@pytest.mark.parametrize("strength", [10.0, 0.1])
@pytest.mark.parametrize(("num", "width"), [(120, 8), (40, 90)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_ridge_head_is_scikit_learn_s(num, width, strength, weighted):
    features, labels = problem(num, width)
    weights = np.random.default_rng(1).uniform(0.2, 3, num) if weighted else None
    rows = np.flatnonzero(np.arange(num) % 5)
    head = RidgePath(features, labels, 3, weights).head(rows, strength=strength)
    expected = ridge_scores(standard(features), labels, strength, rows, np.arange(num), weights)
    np.testing.assert_allclose(head.logits(features), expected, atol=2e-4)


@pytest.mark.parametrize(("num", "width"), [(120, 8), (40, 90)])
@pytest.mark.parametrize("weighted", [False, True])
def test_leaving_a_fold_out_is_training_without_it(num, width, weighted):
    """Log losses of all strengths from one decomposition, against a ridge fitted anew for each fold."""
    features, labels = problem(num, width, noise=2.0)
    weights = np.random.default_rng(1).uniform(0.2, 3, num) if weighted else np.ones(num)
    folds, strengths = folds_of(num), (30.0, 1.0, 0.03)
    choice, table = RidgePath(features, labels, 3, weights).choose(folds, strengths)
    tested, losses = np.concatenate([test for _, test in folds]), {}
    for strength in strengths:
        scores = [ridge_scores(standard(features), labels, strength, *fold, weights, np.arange(num)) for fold in folds]
        losses[strength] = min(  # a fine grid of temperatures
            weighted_log_loss(log_softmax(np.concatenate(scores) / t), labels[tested], weights[tested])
            for t in np.geomspace(0.01, 100, 2000)
        )
    assert choice["strength"] == min(losses, key=losses.get)
    assert choice["log_loss"] == pytest.approx(min(losses.values()), abs=1e-3)
    assert weighted_log_loss(table[tested], labels[tested], weights[tested]) == pytest.approx(
        choice["log_loss"], rel=1e-4
    )


def test_one_image_left_out_is_scikit_learn_s_ridge_classifier_cv():
    features, labels = problem(60, 20, noise=2.5)
    strengths = (3.0, 0.3, 0.03)
    folds = [(np.delete(np.arange(60), row), np.array([row])) for row in range(60)]
    _, table = RidgePath(features, labels, 3).choose(folds, strengths[1:2])
    theirs = RidgeClassifierCV(alphas=[0.3 * 60], store_cv_results=True).fit(standard(features), labels)
    left = theirs.cv_results_[..., 0]  # squared errors of -1/+1 targets
    ours = np.where(
        np.eye(3)[labels] == 1, 1 - np.sqrt(left), np.sqrt(left) - 1
    )  # their scores, where errors are below
    # The softmax of scores / T keeps differences: twice those of 0/1 targets, divided by T.
    temperature = RidgePath(features, labels, 3).choose(folds, strengths[1:2])[0]["temperature"]
    known = (ours[:, :1] - ours[:, 1:]) / 2 / temperature
    assert np.median(np.abs((table[:, :1] - table[:, 1:]) - known)) < 1e-3


def test_held_out_images_that_no_fold_trains_on_are_judged_by_the_whole():
    features, labels = problem(90, 30)
    rows, held = np.arange(70), np.arange(70, 90)
    choice, table = RidgePath(features, labels, 3).choose([(rows, held)], (0.3,))
    expected = ridge_scores(standard(features), labels, 0.3, rows, held) / choice["temperature"]
    np.testing.assert_allclose(table[held], log_softmax(expected), atol=1e-3)
    assert np.isnan(table[rows]).all()


def test_the_nearest_mean_is_scikit_learn_s():
    features, labels = problem(90, 12, noise=2.0)
    path, rows = Prototypes(features, labels, 3), np.arange(0, 90, 2)
    x = standard(features)
    expected = NearestCentroid().fit(x[rows], labels[rows]).predict(x)
    np.testing.assert_array_equal(path.head(rows, distance="euclidean").logits(features).argmax(1), expected)
    means = np.stack([x[rows][labels[rows] == label].mean(0) for label in range(3)])
    cosines = x @ means.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    np.testing.assert_array_equal(path.head(rows, distance="cosine").logits(features).argmax(1), cosines.argmax(1))
    distances = ((x[:, None] - means) ** 2).sum(2)
    np.testing.assert_allclose(
        log_softmax(path.head(rows, distance="euclidean", temperature=3.0).logits(features)),
        log_softmax(-distances / 2 / 3.0), atol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [Logistic, RidgePath, Prototypes])
def test_features_on_disk_in_many_blocks_give_the_same(kind, tmp_path, monkeypatch):
    features, labels = problem(101, 17, noise=2.0)
    stored = np.memmap(tmp_path / "features", np.float32, "w+", shape=features.shape)
    stored[:] = features
    rows = np.arange(101)
    expected = kind(features, labels, 3).choose(folds_of(101))[0]
    whole = kind(features, labels, 3).head(rows, **expected)
    monkeypatch.setattr("tfxfer.features.rows.BLOCK_BYTES", 10 * 4 * 17)
    path = kind(stored, labels, 3)
    found = path.choose(folds_of(101))[0]
    assert found["log_loss"] == pytest.approx(expected["log_loss"], rel=1e-3)
    np.testing.assert_allclose(path.head(rows, **expected).kernel, whole.kernel, atol=1e-4)


@pytest.mark.parametrize("kind", [RidgePath, Prototypes])
def test_a_feature_that_never_moves_gets_no_weight(kind):
    features, labels = problem(60, 5)
    features[:, 2] = 7.25
    path = kind(features, labels, 3)
    head = path.head(np.arange(60), **path.choose(folds_of(60))[0])
    assert np.isfinite(head.kernel).all() and not head.kernel[2].any()
