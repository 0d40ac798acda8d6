import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge

from tfxfer.features.multi_block import MultiBlock
from tfxfer.features.solvers import log_softmax, weighted_log_loss


def problem(num: int = 150, seed: int = 0):
    """Forty features before the last block's six; the labels are in five of the forty."""
    random = np.random.default_rng(seed)
    labels = np.arange(num) % 3
    features = random.normal(0, 1, (num, 46))
    features[:, 3:8] += random.normal(0, 1.2, (3, 5))[labels]
    return (features * 10 ** random.uniform(-1, 1, 46) + random.normal(0, 2, 46)).astype(np.float32), labels


def test_the_columns_are_those_of_the_largest_weights_and_all_of_the_last_block():
    features, labels = problem()
    rows = np.arange(0, 150, 2)
    found = MultiBlock(features, labels, 3, num_last=6).columns(rows)
    x = ((features - features.mean(0)) / features.std(0))[rows]
    weights = Ridge(alpha=0.003 * 46 * len(rows)).fit(x, np.eye(3)[labels[rows]]).coef_
    best = np.argsort(-np.linalg.norm(weights[:, :40], axis=0))[:12]
    np.testing.assert_array_equal(found, [*sorted(best), *range(40, 46)])
    assert set(range(3, 8)) <= set(found)


def test_the_head_is_scikit_learn_s_on_the_chosen_columns():
    features, labels = problem()
    rows = np.arange(100)
    blocks = MultiBlock(features, labels, 3, num_last=6)
    head, columns = blocks.head(rows, strength=0.05), blocks.columns(rows)
    standard = ((features - features.mean(0)) / features.std(0))[:, columns]
    found = LogisticRegression(C=1 / (0.05 * 100), tol=1e-8, max_iter=5000).fit(standard[rows], labels[rows])
    np.testing.assert_allclose(log_softmax(head.logits(features)), found.predict_log_proba(standard), atol=0.03)
    assert not np.delete(head.kernel, columns, axis=0).any()


def test_features_are_chosen_without_the_held_out_images():
    """Labels by chance and a thousand features: who looks at held-out labels while choosing finds some that fit."""
    random = np.random.default_rng(0)
    features, labels = random.normal(0, 1, (60, 1000)).astype(np.float32), random.permutation(np.arange(60) % 2)
    folds = [(np.flatnonzero(np.arange(60) % 3 != fold), np.arange(fold, 60, 3)) for fold in range(3)]
    choice, table = MultiBlock(features, labels, 2, num_last=10).choose(folds)
    assert choice["log_loss"] > 0.6
    np.testing.assert_allclose(choice["log_loss"], weighted_log_loss(table, labels), rtol=1e-6)
