import numpy as np
import pytest

from tfxfer.errors import InputError
from tfxfer.features.solvers import Anchor, LogisticPath, log_softmax, weighted_log_loss
from tfxfer.methods import METHODS
from tfxfer.methods import probe as probe_module
from tfxfer.methods.probe import fit_probe, make_folds
from tfxfer.specs import Recipe, Stage


def problem(num: int = 120, width: int = 12, classes: int = 4, noise: float = 1.6, seed: int = 0):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(num) % classes)
    features = random.normal(0, 1, (classes, width))[labels] + random.normal(0, noise, (num, width))
    return features.astype(np.float32), labels


def fit(features, labels, *, weights=None, groups=None, rows=None, held=(), seed=0):
    count = len(labels)
    return fit_probe(
        features if features.ndim == 3 else features[None],
        labels,
        np.ones(count) if weights is None else weights,
        tuple(map(str, range(count))) if groups is None else groups,
        np.arange(count) if rows is None else rows,
        np.asarray(held, int),
        int(labels.max()) + 1,
        seed=seed,
    )


def test_folds_are_stratified_and_cover_every_row_once():
    labels = np.repeat([0, 1, 2], [50, 30, 10])
    rows = np.arange(0, 90, 1)
    pairs, name = make_folds(labels, [str(row) for row in rows], rows, [])
    assert name == "5-fold" and len(pairs) == 5
    np.testing.assert_array_equal(np.sort(np.concatenate([held for _, held in pairs])), rows)
    for train, held in pairs:
        np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), rows)
        np.testing.assert_array_equal(np.bincount(labels[held]), [10, 6, 2])


def test_a_group_stays_on_one_side():
    labels = np.repeat([0, 1], 40)
    groups = [f"g{row // 4}" for row in range(80)]
    pairs, _ = make_folds(labels, groups, np.arange(80), [])
    for train, held in pairs:
        assert not {groups[row] for row in train} & {groups[row] for row in held}


def test_only_the_rows_given_are_folded():
    labels = np.arange(60) % 2
    rows = np.arange(10, 50)
    pairs, _ = make_folds(labels, [str(row) for row in range(60)], rows, np.arange(50, 60))
    assert set(np.concatenate([held for _, held in pairs])) == set(rows)


@pytest.mark.parametrize(("smallest", "name"), [(3, "3-fold"), (2, "2-fold"), (1, "2-fold")])
def test_a_class_of_few_groups_lowers_the_number_of_folds(smallest, name):
    labels = np.repeat([0, 1], [30, smallest * 2])
    groups = [*map(str, range(30)), *(f"twins {row // 2}" for row in range(smallest * 2))]
    pairs, found = make_folds(labels, groups, np.arange(len(labels)), [])
    assert found == name
    assert all(len(train) and len(held) for train, held in pairs)


def test_folds_repeat_with_the_seed_and_change_with_it():
    labels = np.arange(60) % 3
    names = [str(row) for row in range(60)]
    first, again, other = (make_folds(labels, names, np.arange(60), [], seed=seed)[0] for seed in (1, 1, 2))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(first, other, strict=True))


def test_the_probe_s_loss_is_that_of_images_held_out():
    features, labels = problem()
    probe = fit(features, labels)
    assert probe.chosen_by == "5-fold log loss" and probe.num_views == 1
    pairs, _ = make_folds(labels, [str(row) for row in range(120)], np.arange(120), [])
    path = LogisticPath(features, labels, 4)
    table = np.empty((120, 4))
    for train, held in pairs:
        table[held] = path.log_probabilities(path.optimum(probe.choice["strength"], rows=train), held)
    assert probe.log_loss == pytest.approx(-table[np.arange(120), labels].mean(), rel=0.01)
    assert probe.held_log_losses.mean() == pytest.approx(probe.log_loss, rel=1e-5)
    # Its own images flatter it.
    assert weighted_log_loss(log_softmax(probe.head(np.arange(120)).logits(features)), labels) < probe.log_loss


def test_with_many_images_the_validation_part_decides(monkeypatch):
    monkeypatch.setattr(probe_module, "MAX_FOLDED_IMAGES", 80)
    features, labels = problem()
    rows, held = np.arange(90), np.arange(90, 120)
    probe = fit(features, labels, rows=rows, held=held)
    assert probe.chosen_by == "validation log loss"
    head = LogisticPath(features, labels, 4)
    theta = head.optimum(probe.choice["strength"], rows=rows)
    table = head.log_probabilities(theta, held)
    assert probe.log_loss == pytest.approx(-table[np.arange(30), labels[held]].mean(), rel=0.01)
    assert len(probe.held_log_losses) == 30


def test_the_temperature_makes_the_training_images_as_uncertain_as_new_ones():
    features, labels = problem(noise=2.5)
    probe = fit(features, labels)
    assert probe.temperature > 1.1
    logits = probe.head(np.arange(120)).logits(features)
    cooled = weighted_log_loss(log_softmax(logits / probe.temperature), labels)
    assert cooled == pytest.approx(probe.log_loss, rel=0.02)


def test_every_view_of_a_training_image_counts_and_only_the_plain_one_of_a_held_out_image():
    plain, labels = problem(60)
    other = plain + np.random.default_rng(5).normal(0, 1, plain.shape).astype(np.float32)
    probe = fit(np.stack([plain, other]), labels)
    assert probe.num_views == 2 and len(probe.held_log_losses) == 60
    rows = np.arange(0, 60, 2)
    both = LogisticPath(np.concatenate([plain, other]), np.tile(labels, 2), 4)
    expected = both.to_head(
        both.optimum(probe.choice["strength"], rows=np.concatenate([rows, rows + 60])), probe.choice["strength"], 0
    )
    np.testing.assert_allclose(probe.head(rows).kernel, expected.kernel, atol=1e-5)
    # Noise in the second view's held-out copies would change nothing.
    assert probe.held_log_losses.mean() == pytest.approx(probe.log_loss, rel=1e-5)


def test_weights_count_in_the_head_and_in_the_choice():
    features, labels = problem()
    weights = np.where(labels == 0, 4.0, 0.5)
    weights = weights / weights.mean()
    probe = fit(features, labels, weights=weights)
    plain = fit(features, labels)
    shares = [(p.head(np.arange(120)).logits(features).argmax(1) == 0).mean() for p in (probe, plain)]
    assert shares[0] > shares[1] + 0.05
    assert probe.log_loss != pytest.approx(plain.log_loss, rel=1e-3)


def test_grouped_copies_do_not_make_the_probe_sure_of_itself():
    """Thirty things in four copies each, and nothing to learn: folds that part copies believe the memory of them."""
    random = np.random.default_rng(0)
    things = np.repeat(np.arange(30), 4)
    features = (random.normal(0, 1, (30, 40))[things] + random.normal(0, 0.05, (120, 40))).astype(np.float32)
    labels = things % 2
    apart = fit(features, labels)
    together = fit(features, labels, groups=[str(thing) for thing in things])
    assert apart.log_loss < 0.3 and together.log_loss > 0.6
    assert together.choice["strength"] > apart.choice["strength"]


def test_the_methods_take_their_stages():
    convex, tuned = Stage("probe", solver="convex", epochs=0), Stage("tune")
    both = Recipe("both", (convex, tuned))
    assert METHODS["fine_tune"](both) == (convex, tuned)
    assert METHODS["probe"](both) == (convex,)
    (only,) = METHODS["probe"](Recipe("tune", (tuned,)))
    assert only.solver == "convex"


def test_a_head_from_before_is_kept_where_held_out_images_say_so():
    """A head that was made for very many images, against ten of a class: theirs alone is worse, and is not taken."""
    features, labels = problem(3000, seed=3)
    good = LogisticPath(features[100:2000], labels[100:2000], 4).solve(0.01)
    few, own = features[:40], labels[:40]
    anchor = Anchor(good.kernel, good.bias, np.ones(4, bool))

    def choose(anchor, judged=None):
        groups = tuple(map(str, range(40)))
        return fit_probe(
            few[None], own, np.ones(40), groups, np.arange(40), np.zeros(0, int), 4, anchor=anchor, judged=judged
        )

    new = features[2000:], labels[2000:]
    from_zero, from_before = choose(None), choose(anchor)
    assert from_before.log_loss < from_zero.log_loss
    losses = [
        weighted_log_loss(log_softmax(p.head(np.arange(40)).logits(new[0])), new[1]) for p in (from_before, from_zero)
    ]
    assert losses[0] < losses[1]
    bad = Anchor(-good.kernel, -good.bias, np.ones(4, bool))
    assert choose(bad).choice["stiffness"] == "0.0" and choose(bad).log_loss == from_zero.log_loss
    np.testing.assert_array_equal(choose(bad).head(np.arange(40)).kernel, from_zero.head(np.arange(40)).kernel)
    judged = np.arange(0, 40, 2)
    assert len(choose(anchor, judged).held_log_losses) == 20


@pytest.mark.parametrize("solver", ["ridge", "prototype"])
def test_a_closed_form_head_leaves_all_views_of_held_out_images_out(solver):
    """A second view that gives the label away is worth nothing where the held-out images' own is left out."""
    plain, labels = problem(80)
    groups, rows = tuple(map(str, range(80))), np.arange(80)
    both = np.stack([plain, plain])
    one, two = (
        fit_probe(x, labels, np.ones(80), groups, rows, rows[:0], 4, solver=solver) for x in (plain[None], both)
    )
    assert two.log_loss == pytest.approx(one.log_loss, rel=1e-3)
    assert one.held_log_losses.mean() == pytest.approx(one.log_loss, rel=1e-4)
    np.testing.assert_allclose(two.head(rows).kernel, one.head(rows).kernel, atol=1e-3)
    assert one.solver == solver and one.chosen_by == "5-fold log loss"


def test_a_continued_run_needs_the_logistic_head():
    features, labels = problem(40)
    anchor = Anchor(np.zeros((12, 4), np.float32), np.zeros(4, np.float32), np.ones(4, bool))
    with pytest.raises(InputError, match="solver 'convex', not 'ridge'"):
        fit_probe(
            features[None], labels, np.ones(40), tuple(map(str, range(40))), np.arange(40), np.arange(0), 4,
            anchor=anchor, solver="ridge",
        )  # fmt: skip
