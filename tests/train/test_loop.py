import dataclasses

import keras
import numpy as np
import pytest
from small_networks import moved, norm_model, pictures, spoil, values
from stopping import Stop, stop_after_saves

from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.methods import mixing
from tfxfer.methods.optimizers import blockwise_factors
from tfxfer.methods.schedule import warmup_cosine
from tfxfer.model.freeze import freeze
from tfxfer.specs import Stage
from tfxfer.train.batches import EpochBatches
from tfxfer.train.journal import Journal
from tfxfer.train.loop import NotFinite, SuffixTrainer, Trained

IMAGES, LABELS = pictures(22), np.arange(22) % 3
WEIGHTS = np.random.default_rng(0).uniform(0.5, 2, 22).astype(np.float32)
ROWS, HELD = np.arange(16), np.arange(16, 22)
STAGE = Stage("tune", epochs=3, learning_rates=(3e-3,), warmup_share=0.2, weight_decay=0.05, batch_norm="affine")


def ready(stage=STAGE, *, views=("plain",), dropout=0.0, depth=1, **options):
    """A model cut at `depth`, and a trainer of its suffix."""
    model = freeze(norm_model(dropout=dropout), depth, batch_norm=stage.batch_norm)
    cut = cut_model(model, depth)
    extracted = extract(FrozenPrefix(cut, 8), (IMAGES,), views)
    return model, SuffixTrainer(cut.suffix, extracted, LABELS, WEIGHTS, stage, 8, **options)


def batches(views, num_views, seed=0):
    targets = np.eye(3, dtype=np.float32)[LABELS]
    return EpochBatches(views, num_views, targets, WEIGHTS, ROWS, 8, seed)


def test_each_epoch_has_every_row_once_in_a_new_order_and_a_view_of_its_own():
    activations = np.arange(2 * 22).reshape(2, 22)  # view * 22 + row
    data = batches(activations, 2)
    assert len(data) == 2
    orders, views = [], []
    for epoch in range(6):
        found = list(data.epoch(epoch))
        seen = np.concatenate([batch.activations for batch in found])
        np.testing.assert_array_equal(np.sort(seen % 22), ROWS)
        for batch in found:
            np.testing.assert_array_equal(batch.rows, batch.activations % 22)
            np.testing.assert_array_equal(batch.targets.argmax(1), LABELS[batch.rows])
            np.testing.assert_array_equal(batch.weights, WEIGHTS[batch.rows])
        orders.append(tuple(seen % 22))
        views.append(seen // 22)
    assert len(set(orders)) == 6
    assert 0.3 < np.mean(views) < 0.7
    later = [batch.activations for batch in data.epoch(3, first=1)]  # as a resumed run reads them
    np.testing.assert_array_equal(later[0] % 22, orders[3][8:])
    assert len(later) == 1 and list(data.epoch(3, first=2)) == []
    other = np.concatenate([batch.rows for batch in batches(activations, 2, seed=1).epoch(0)])
    assert tuple(other) != orders[0]


@pytest.mark.parametrize("batch_norm", ["affine", "train"])
def test_training_from_the_cache_is_plain_keras_training_of_the_whole_model(batch_norm):
    stage = Stage(**{**STAGE.to_dict(), "learning_rates": (3e-3,), "batch_norm": batch_norm})
    model, trainer = ready(stage, views=("plain", "mirror"))
    before = values(model)
    trainer.run(ROWS, 3e-3, seed=5)

    plain = freeze(norm_model(), 1, batch_norm=batch_norm)
    optimizer = keras.optimizers.AdamW(3e-3, weight_decay=0.05, global_clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    plain.compile(optimizer=optimizer, loss=keras.losses.CategoricalCrossentropy(label_smoothing=0.1))

    keras.utils.set_random_seed(5)
    data = batches(np.stack([IMAGES, IMAGES[:, :, ::-1]]), 2, seed=5)
    for step, batch in enumerate(batch for epoch in range(3) for batch in data.epoch(epoch)):
        optimizer.learning_rate = 3e-3 * warmup_cosine(step, 6, 0.2)
        plain.train_on_batch(batch.activations, batch.targets, batch.weights)
    changed = moved(before, model)
    assert {"b_conv/kernel", "logits/kernel"} <= changed and "a_conv/kernel" not in changed
    for path, value in values(plain).items():
        np.testing.assert_allclose(values(model)[path], value, atol=2e-4, err_msg=path)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_run_starts_over_whatever_ran_before(dropout):
    _, trainer = ready(dropout=dropout, views=("plain", "mirror"))
    first = trainer.run(ROWS, 3e-3, held=HELD, seed=7)
    other = trainer.run(ROWS, 1e-2, seed=8)
    again = trainer.run(ROWS, 3e-3, held=HELD, seed=7)
    assert all(np.array_equal(a, b) for a, b in zip(first.weights, again.weights, strict=True))
    assert first.history == again.history and first.loss == again.loss
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(first.weights, other.weights, strict=True))


def test_a_start_given_is_the_start():
    _, trainer = ready()
    trainer.start = [value * 0.5 for value in trainer.start]
    run = trainer.run(ROWS, 1e-9, epochs=1)
    for value, start in zip(run.weights, trainer.start, strict=True):
        np.testing.assert_allclose(value, start, atol=1e-6)


def test_the_weights_kept_are_those_of_the_epoch_with_the_least_held_out_loss():
    stage = Stage(**{**STAGE.to_dict(), "learning_rates": (0.05,), "epochs": 12, "weight_decay": 0.0})
    _, trainer = ready(stage)
    run = trainer.run(ROWS, 0.05, held=HELD)
    losses = [entry["val_loss"] for entry in run.history]
    assert run.epochs == int(np.argmin(losses)) + 1 < len(losses)  # it rose again, or this test shows nothing
    assert run.loss == pytest.approx(min(losses))
    trainer.suffix.set_weights(run.weights)
    table = trainer.log_probabilities(HELD)
    np.testing.assert_allclose(run.held_log_probabilities, table, atol=1e-6)
    np.testing.assert_allclose(np.exp(table).sum(1), 1, rtol=1e-5)
    targets = 0.9 * np.eye(3)[LABELS[HELD]] + 0.1 / 3
    smoothed = -(targets * table).sum(1)
    # Keras' loss: the weighted sum over the batch, divided by its size.
    assert run.loss == pytest.approx(float((smoothed * WEIGHTS[HELD]).sum() / len(HELD)), rel=1e-4)


def test_a_run_stops_when_the_held_out_loss_does_not_fall_any_more():
    stage = Stage(**{**STAGE.to_dict(), "learning_rates": (0.3,), "epochs": 60, "patience": 2})
    _, trainer = ready(stage)
    run = trainer.run(ROWS, 0.3, held=HELD)
    assert len(run.history) == run.epochs + 2 < 60
    _, trainer = ready(dataclasses.replace(stage, patience=0))
    assert len(trainer.run(ROWS, 0.3, held=HELD, epochs=20).history) == 20


def test_a_refit_follows_the_first_epochs_of_the_same_schedule():
    _, trainer = ready()
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))

    run = trainer.run(np.arange(22), 1e-3, epochs=5, stop_after=2, callbacks=[Rates()])
    assert run.epochs == len(run.history) == 2
    np.testing.assert_allclose(rates, [1e-3 * warmup_cosine(step, 15, 0.2) for step in range(6)], rtol=1e-5)


def test_callbacks_and_history_see_epochs_numbered_on():
    _, trainer = ready()
    seen = []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(epoch))
    run = trainer.run(ROWS, 1e-3, held=HELD, first_epoch=4, callbacks=[watch])
    assert seen == [4, 5, 6] == [entry["epoch"] for entry in run.history]
    for entry in run.history:
        assert {"learning_rate", "loss", "accuracy", "log_loss", "val_loss", "val_accuracy", "val_log_loss"} <= set(
            entry
        )


def test_weight_decay_shrinks_kernels_and_nothing_else():
    stage = Stage(**{**STAGE.to_dict(), "learning_rates": (1e-3,), "weight_decay": 5.0})
    decayed, trainer = ready(stage)
    trainer.run(ROWS, 1e-3)
    stage = Stage(**{**stage.to_dict(), "learning_rates": (1e-3,), "weight_decay": 0.0})
    plain, trainer = ready(stage)
    trainer.run(ROWS, 1e-3)
    one, other = values(decayed), values(plain)
    shrunk = {path for path in one if np.linalg.norm(one[path]) < 0.99 * np.linalg.norm(other[path])}
    assert shrunk == {"b_conv/kernel", "c_conv/kernel", "logits/kernel"}


def test_rates_that_blow_up_give_an_infinite_loss_not_nan():
    stage = Stage(**{**STAGE.to_dict(), "learning_rates": (9.9,), "warmup_share": 0.0})
    _, trainer = ready(stage)
    trainer.start = [value * 1e30 for value in trainer.start]
    run = trainer.run(ROWS, 9.9, held=HELD)
    assert run.loss == float("inf")


def test_blocks_learn_at_their_share_of_the_rate():
    """Adam's first step is the rate for every number that has a gradient, whatever that is."""
    stage = dataclasses.replace(STAGE, weight_decay=0.0, warmup_share=0.0, epochs=1)
    model = freeze(norm_model(), 1, batch_norm="frozen")
    factors = blockwise_factors(model, 0.5)
    cut = cut_model(model, 1)
    extracted = extract(FrozenPrefix(cut, 8), (IMAGES,), ("plain",))
    trainer = SuffixTrainer(cut.suffix, extracted, LABELS, WEIGHTS, stage, 8, factors=factors)
    before = values(model)
    trainer.run(np.arange(8), 1e-3)
    steps = {path: np.abs(value - before[path]).max() for path, value in values(model).items()}
    found = {name: steps[f"{name}/kernel"] / 1e-3 for name in ("a_conv", "b_conv", "c_conv", "logits")}
    assert found == pytest.approx({"a_conv": 0.0, "b_conv": 0.25, "c_conv": 0.5, "logits": 1.0}, rel=1e-3)


@pytest.mark.parametrize("held", [None, HELD])
def test_the_weights_kept_are_the_average_over_the_steps(held):
    stage = dataclasses.replace(STAGE, average=0.8)
    _, trainer = ready(stage)
    expected = [np.asarray(value, "float64") for value in trainer.start]
    ends = []

    class Averages(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            decay = min(0.8, (1 + self.steps) / (10 + self.steps))
            self.steps += 1
            for index, value in enumerate(self.model.get_weights()):
                expected[index] = decay * expected[index] + (1 - decay) * value

        def on_epoch_end(self, epoch, logs=None):
            ends.append([value.copy() for value in expected])

    # The loop takes the step into the average before it tells callbacks of it.
    run = trainer.run(ROWS, 3e-3, held=held, callbacks=[Averages()])
    for one, other in zip(run.weights, ends[run.epochs - 1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    plain = ready()[1].run(ROWS, 3e-3, held=held)
    assert max(np.abs(one - other).max() for one, other in zip(run.weights, plain.weights, strict=True)) > 1e-4


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_batches_are_mixed_by_seed_epoch_and_number(options):
    x = np.random.default_rng(1).normal(size=(1, 22, 6, 6, 2)).astype("float32")
    targets = np.eye(3, dtype=np.float32)[LABELS]
    plain = EpochBatches(x, 1, targets, WEIGHTS, ROWS, 8, 5)
    mixed = EpochBatches(x, 1, targets, WEIGHTS, ROWS, 8, 5, **options)
    (name, alpha), mix = next(iter(options.items())), {"mixup": mixing.mixup, "cutmix": mixing.cutmix}
    for epoch in range(2):
        for index, (one, other) in enumerate(zip(plain.epoch(epoch), mixed.epoch(epoch), strict=True)):
            random = np.random.default_rng((5, epoch, index, 1))
            expected = mix[name](one.activations, one.targets, one.weights, random, alpha=alpha)
            np.testing.assert_array_equal(other.activations, expected.images)
            np.testing.assert_array_equal(other.targets, expected.targets)
            np.testing.assert_allclose(other.targets.sum(1), 1, atol=1e-6)
            assert not np.array_equal(other.activations, one.activations)
            assert other.targets.dtype == other.weights.dtype == np.float32
    again = EpochBatches(x, 1, targets, WEIGHTS, ROWS, 8, 5, **options)
    np.testing.assert_array_equal(next(iter(again.epoch(1, first=1))).activations, other.activations)


def test_a_stage_in_parts_is_the_stage():
    whole = ready(dataclasses.replace(STAGE, batch_norm="frozen"))[1].run(ROWS, 3e-3)
    parts = ready(dataclasses.replace(STAGE, batch_norm="frozen", micro_batches=3))[1].run(ROWS, 3e-3)
    for one, other in zip(whole.weights, parts.weights, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


# -- stopping and going on -----------------------------------------------------------------------------------------


def resumed(tmp_path, stop_after: int, stage=STAGE, rate=3e-3, **options):
    """Save after every batch, stop after so many, go on with another trainer; what came out, and where it went on."""
    journal = Journal(tmp_path, every_seconds=0.0)

    def stopping(unit):
        stop_after_saves(unit, stop_after)
        _, trainer = ready(stage, dropout=0.3, views=("plain", "mirror"))
        return trainer.run(ROWS, rate, seed=7, unit=unit, **options).state()

    with pytest.raises(Stop):
        journal.run("tune", stopping)
    keras.utils.set_random_seed(99)  # another process has another state
    again = Journal(tmp_path)
    _, trainer = ready(stage, dropout=0.3, views=("plain", "mirror"))
    trainer.run(ROWS, 1e-2, epochs=1, seed=1)
    found = again.run("tune", lambda unit: trainer.run(ROWS, rate, seed=7, unit=unit, **options).state())
    return Trained.of_state(*found), again.resumed


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
@pytest.mark.parametrize("held", [None, HELD])
@pytest.mark.parametrize("options", [{}, {"average": 0.9, "mixup": 0.4, "cutmix": 1.0, "micro_batches": 2}])
def test_a_resumed_run_is_the_unstopped_one_bit_for_bit(tmp_path, stop_after, held, options):
    stage = dataclasses.replace(STAGE, **options)
    _, trainer = ready(stage, dropout=0.3, views=("plain", "mirror"))
    whole = trainer.run(ROWS, 3e-3, seed=7, held=held)
    found, told = resumed(tmp_path, stop_after, stage, held=held)
    assert told == [f"tune at epoch {(stop_after - 1) // 2 + 1}, batch {(stop_after - 1) % 2 + 1}"]
    assert all(np.array_equal(a, b) for a, b in zip(whole.weights, found.weights, strict=True))
    assert whole.history == found.history and whole.epochs == found.epochs
    if held is not None:
        np.testing.assert_array_equal(whole.held_log_probabilities, found.held_log_probabilities)


@pytest.mark.parametrize("stop_after", [3, 7])
def test_early_stopping_and_the_best_epoch_survive_a_resume(tmp_path, stop_after):
    stage = dataclasses.replace(STAGE, epochs=40, patience=2, warmup_share=0.0)
    rates = {"held": HELD, "epochs": 40}
    whole = ready(stage, dropout=0.3, views=("plain", "mirror"))[1].run(ROWS, 0.2, seed=7, **rates)
    assert len(whole.history) == whole.epochs + 2 < 40
    assert stop_after < 2 * len(whole.history)
    found, _ = resumed(tmp_path, stop_after, stage, rate=0.2, **rates)
    assert found.epochs == whole.epochs and found.history == whole.history
    assert all(np.array_equal(a, b) for a, b in zip(whole.weights, found.weights, strict=True))


def test_a_callback_goes_on_where_it_was(tmp_path):
    class Count(keras.callbacks.Callback):
        seen = 0

        def on_train_begin(self, logs=None):
            self.seen = 0

        def on_train_batch_end(self, batch, logs=None):
            self.seen += 1

    count = Count()
    resumed(tmp_path, 3, callbacks=[count])
    assert count.seen == 6  # three epochs of two batches, counted once each


@pytest.mark.parametrize("held", [None, HELD])
def test_input_that_is_no_number_stops_at_its_batch_and_names_its_rows(held):
    _, trainer = ready()
    spoil(trainer.extracted, 11)
    before = trainer.suffix.get_weights()
    with pytest.raises(NotFinite) as error:
        trainer.run(ROWS, 3e-3, held=held)
    assert 11 in error.value.rows and error.value.where == "input" and error.value.step <= 2
    assert all(np.isfinite(value).all() for value in trainer.suffix.get_weights())
    assert len(before) == len(trainer.suffix.get_weights())


def test_a_rate_that_is_too_high_is_an_error_where_no_held_out_images_tell():
    stage = Stage(**{**STAGE.to_dict(), "learning_rates": (9.9,), "warmup_share": 0.0})
    _, trainer = ready(stage)
    trainer.start = [value * 1e30 for value in trainer.start]
    with pytest.raises(NotFinite):
        trainer.run(ROWS, 9.9)
