"""Training on views by RandAugment: which view, cached or fresh, what the probe does with them, and going on."""

import dataclasses

import keras
import numpy as np
import pytest
from small_networks import SIZE_PX, norm_model, pictures, values

from tfxfer.errors import InputError
from tfxfer.features import fresh
from tfxfer.features.crossing import crossing_of
from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix, extract, join_views
from tfxfer.features.views import RandView, augmented
from tfxfer.methods.probe import fit_probe
from tfxfer.model.freeze import freeze
from tfxfer.specs import Plan, Recipe, Stage
from tfxfer.train import augmentation
from tfxfer.train.batches import EpochBatches
from tfxfer.train.forgetting import SourceHead, make_regularizer
from tfxfer.train.journal import Journal, OpenUnit
from tfxfer.train.loop import SuffixTrainer
from tfxfer.train.outcome import TrainingData
from tfxfer.train.stages import run_stages
from tfxfer.workflow.planning import make_plan

PROBE = Stage("probe", solver="convex", freeze_depth="all", epochs=0)
TUNE = Stage("tune", freeze_depth=1, epochs=3, learning_rates=(1e-2,), min_steps=False)
NUM_TRAIN, NUM_HELD, SEED = 60, 24, 5


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(scope="module")
def data() -> TrainingData:
    total = NUM_TRAIN + NUM_HELD
    images = pictures(total, seed=3)
    return TrainingData(
        parts=(images[:NUM_TRAIN], images[NUM_TRAIN:]),
        labels=(images.mean((1, 2)).argmax(1)).astype(np.int64),  # the strongest colour
        weights=np.ones(total),
        groups=tuple(map(str, range(total))),
        rows=np.arange(NUM_TRAIN),
        held=np.arange(NUM_TRAIN, total),
        num_classes=3,
        may_pool=False,
    )


@pytest.fixture
def seen(monkeypatch):
    """(rows, activations) of every training batch, in the order they are read."""
    found, read = [], EpochBatches.read

    def noted(self, order, index):
        batch = read(self, order, index)
        found.append((batch.rows, batch.activations))
        return batch

    monkeypatch.setattr(EpochBatches, "read", noted)
    return found


def run(data, *stages, journal=None, callbacks=(), model=None, **plan):
    model = model or norm_model(3, dropout=0.2)
    given = {"augment": "rand", "batch_size": 16, "features": "last", "image_size": SIZE_PX, "seed": SEED}
    given |= {"precision": "float32", **plan}  # measuring another would read batches
    plan = Plan("small", Recipe("own", stages), **given)
    outcome = run_stages(model, plan, stages, data, auto_depth=1, journal=journal, callbacks=callbacks)
    return model, outcome


def test_the_view_of_an_image_is_chosen_by_seed_and_epoch(data, seen):
    _, outcome = run(data, PROBE, TUNE, views=3)
    told = outcome.selection["rand"]
    assert (
        (told["how"], told["num_views"]) == ("cached", 3) and told["cached_seconds"] > 0 and told["fresh_seconds"] > 0
    )
    assert outcome.cache["views"] == 3 and set(outcome.cache["disk"]) == {"plain", "rand 1", "rand 2"}
    images = np.concatenate(data.parts)
    cut = cut_model(norm_model(3), 1)
    of_view = [images, RandView(SEED, 1)(images), RandView(SEED, 2)(images)]
    expected = [cut.prefix.predict(pixels, verbose=0) for pixels in of_view]
    for epoch in range(3):
        random = np.random.default_rng((SEED, epoch))
        rows, chosen = random.permutation(NUM_TRAIN), random.integers(3, size=NUM_TRAIN)
        assert len(set(chosen)) == 3
        for index in range(4):
            found_rows, activations = seen[4 * epoch + index]
            part = slice(16 * index, 16 * index + 16)
            np.testing.assert_array_equal(found_rows, rows[part])
            for row, view, values_found in zip(rows[part], chosen[part], activations, strict=True):
                np.testing.assert_allclose(values_found, expected[view][row], atol=1e-4)


def test_the_probe_takes_the_views_where_it_does_not_get_worse(data):
    _, outcome = run(data, PROBE, dataclasses.replace(TUNE, learning_rates=(1e-8,)))
    told = outcome.selection["rand"]
    assert told["probe"] == ("all views" if told["log_loss_rise"] <= told["standard_error"] else "plain images only")
    cut = cut_model(norm_model(3), 1)
    chosen = ("plain", *(RandView(SEED, number) for number in (1, 2, 3)))
    features = extract(FrozenPrefix(cut), data.parts, chosen).features
    given = (data.labels, data.weights, data.groups, data.rows, data.held, 3)
    plain, viewed = (fit_probe(table, *given, seed=SEED) for table in (features[:1], features))
    rise = viewed.held_log_losses - plain.held_log_losses
    assert told["log_loss_rise"] == pytest.approx(rise.mean(), abs=1e-4)
    assert told["standard_error"] == pytest.approx(rise.std(ddof=1) / len(rise) ** 0.5, rel=1e-2)


def test_where_nothing_is_frozen_each_epoch_has_new_pixels(data, seen):
    _, outcome = run(data, PROBE, dataclasses.replace(TUNE, freeze_depth=0))
    told = outcome.selection["rand"]
    assert (told["how"], told["num_views"], told["probe"]) == ("fresh", 0, "plain images only")
    assert "Nothing is frozen" in told["why"] and outcome.cache["views"] == 1
    images = np.concatenate(data.parts)
    of_row = [{} for _ in range(3)]
    for epoch in range(3):
        random = np.random.default_rng((SEED, epoch))
        rows, numbers = random.permutation(NUM_TRAIN), random.integers(2**31 - 1, size=NUM_TRAIN)
        pixels = augmented(images[rows], SEED, numbers)
        for index in range(4):
            part = slice(16 * index, 16 * index + 16)
            found_rows, activations = seen[4 * epoch + index]
            np.testing.assert_array_equal(found_rows, rows[part])
            np.testing.assert_allclose(activations, pixels[part] / np.float32(255), atol=1e-6)
            of_row[epoch] |= dict(zip(found_rows.tolist(), activations, strict=True))
    differ = [(of_row[0][row] != of_row[1][row]).any() for row in range(NUM_TRAIN)]
    assert np.mean(differ) > 0.95


@pytest.mark.parametrize(("depth", "how"), [(0, "fresh"), (1, "cached")])
def test_stages_that_freeze_more_see_views_too(data, seen, depth, how):
    deeper = dataclasses.replace(TUNE, name="deeper", freeze_depth=2, epochs=1)
    _, outcome = run(data, PROBE, deeper, dataclasses.replace(TUNE, freeze_depth=depth, epochs=1))
    assert outcome.selection["rand"]["how"] == how
    shapes = [activations.shape[1:] for _, activations in seen[:8:4]]
    # Views that are kept are taken on to the deeper cut; new ones begin where the shallowest stage does.
    assert shapes == ([(3, 3, 6), (7, 7, 4)] if depth else [(16, 16, 3), (16, 16, 3)])
    chosen = np.random.default_rng((SEED, 0))
    assert (seen[0][0] == chosen.permutation(NUM_TRAIN)[:16]).all()


@pytest.mark.parametrize(("depth", "margin", "how"), [(0, 2.0, "fresh"), (1, 2.0, "cached"), (1, -np.inf, "fresh")])
def test_a_run_that_was_killed_goes_on_bit_for_bit(data, tmp_path, monkeypatch, depth, margin, how):
    monkeypatch.setattr(fresh, "MARGIN_SECONDS", margin)
    monkeypatch.setattr(OpenUnit, "due", lambda self: True)  # saved at every step
    stage = dataclasses.replace(TUNE, freeze_depth=depth)
    whole, outcome = run(data, PROBE, stage)

    class Kill(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            self.steps += 1
            if self.steps == 6:
                raise Killed

    with pytest.raises(Killed):
        run(data, PROBE, stage, journal=Journal(tmp_path), callbacks=[Kill()])
    keras.utils.set_random_seed(77)  # another process has another state
    again = Journal(tmp_path)
    resumed, found = run(data, PROBE, stage, journal=again)
    assert any("tune" in told and "epoch 2" in told for told in again.resumed), again.resumed
    assert found.selection["rand"]["how"] == outcome.selection["rand"]["how"] == how
    for path, value in values(whole).items():
        np.testing.assert_array_equal(values(resumed)[path], value, err_msg=path)
    np.testing.assert_array_equal(found.held_probabilities, outcome.held_probabilities)


@pytest.mark.parametrize(
    ("stage", "passes"),
    [
        (TUNE, 3),
        (dataclasses.replace(TUNE, learning_rates=(1e-2, 1e-3)), 2 * 3),
        (dataclasses.replace(TUNE, min_steps=True), 25),  # four steps an epoch, a hundred at least
        (dataclasses.replace(TUNE, steps=24, reference_batch_size=32), 12),  # 48 of 16 images
    ],
)
def test_keeping_views_pays_for_as_many_epochs_as_are_trained(data, monkeypatch, stage, passes):
    asked, decide = [], augmentation.decide_views
    monkeypatch.setattr(
        augmentation, "decide_views", lambda *given, **costs: asked.append(given) or decide(*given, **costs)
    )
    longest = []
    monkeypatch.setattr(SuffixTrainer, "run", lambda *given, epochs, **options: longest.append(epochs) or stop())

    class Seen(Exception):
        pass

    def stop():
        raise Seen

    with pytest.raises(Seen):
        run(data, PROBE, stage, views=3)
    assert asked == [(3, 2, passes)] and longest[0] * len(stage.learning_rates) == passes


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"views": 4}, r"views says how many views augment 'rand' makes"),
        ({"augment": "rand", "views": 1}, r"iews must be a whole number from 2 .* not 1"),
        ({"augment": "rand", "views": 101}, r"to 100, not 101"),
        ({"augment": "rand", "recipe": "probe"}, r"augment='rand' would do nothing"),
        ({"augment": "random"}, r"ugment must be 'auto', 'mirror', 'rand' or 'none', not 'random'"),
    ],
)
def test_what_cannot_be_or_would_do_nothing_is_refused(given, says):
    with pytest.raises(InputError, match=says):
        make_plan(source="digits_cnn", **given)


def test_a_plan_keeps_its_views():
    plan = make_plan(source="digits_cnn", augment="rand", views=6)
    assert Plan.from_dict(plan.to_dict()) == plan and (plan.augment, plan.views) == ("rand", 6)


@pytest.mark.parametrize("how", ["cached", "fresh"])
def test_learning_without_forgetting_keeps_the_source_s_outputs_on_each_view(data, how):
    model = freeze(norm_model(3), 1)
    cut = cut_model(model, 1)
    prefix = FrozenPrefix(cut, 16)
    plain = extract(prefix, data.parts)
    if how == "cached":
        extracted = join_views(plain, *(extract(prefix, data.parts, (RandView(SEED, number),)) for number in (1, 2)))
        views = np.array([0, 1, 2, 1])
    else:
        made = fresh.FreshViews(fresh.features_of(prefix), data.parts, plain.features.as_activations(), SEED)
        crossing = fresh.FreshViews(crossing_of(cut), data.parts, plain.activations, SEED)
        extracted = dataclasses.replace(plain, activations=crossing, fresh_features=made)
        views = np.array([0, 7, 9, 123456])
    head = SourceHead(np.arange(20, dtype=np.float32).reshape(5, 4) / 10, np.ones(4, np.float32))
    stage = dataclasses.replace(TUNE, regularizer="lwf")
    recorder = make_regularizer(stage, model, {}, head, extracted, data.labels).recorder(data.rows)
    rows = np.array([3, 50, 8, 3])
    pixels = augmented(np.concatenate(data.parts)[rows], SEED, views)
    features = extract(prefix, (pixels,)).features[0][:]
    np.testing.assert_allclose(recorder(views, rows, None), features @ head.kernel + head.bias, rtol=1e-4)
