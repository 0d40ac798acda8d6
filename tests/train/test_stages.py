import dataclasses
import json

import keras
import numpy as np
import pytest
from PIL import Image
from small_networks import SIZE_PX, around, moved, norm_model, skip_backbone, values

from tfxfer.errors import CheckError, InputError
from tfxfer.features.closed_form import RidgePath
from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.features.solvers import log_softmax
from tfxfer.methods.probe import fit_probe
from tfxfer.metrics import metric_value
from tfxfer.model.freeze import adapt_batch_norm, digest_frozen, freeze
from tfxfer.model.taps import tap_model
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Recipe, Stage
from tfxfer.train import stages as stages_module
from tfxfer.train import trainers as trainers_module
from tfxfer.train.clock import Clock
from tfxfer.train.journal import Journal
from tfxfer.train.outcome import TrainingData
from tfxfer.train.recipes import get_recipe
from tfxfer.train.stages import run_stages

PROBE = Stage("probe", solver="convex", freeze_depth="all", epochs=0)
# Far too low to move anything, and high enough to win surely over the few random features of an untrained network.
IDLE = Stage("tune", freeze_depth=1, epochs=2, learning_rates=(1e-8,), min_steps=False)
STRONG = Stage("tune", freeze_depth=1, epochs=12, learning_rates=(1e-2,), weight_decay=0.0, min_steps=False)


@pytest.fixture(scope="module")
def small_digits(digits):
    images, labels = digits
    kept = np.random.default_rng(0).permutation(np.flatnonzero(labels < 4))[:400]
    return np.stack([np.asarray(Image.fromarray(image).resize((SIZE_PX, SIZE_PX))) for image in images[kept]]), labels[
        kept
    ]


@pytest.fixture
def data(small_digits):
    """160 digits of four classes to train on, 120 held out."""
    return training_data(small_digits, 160, 120)


def training_data(small_digits, num_train, num_held, may_pool=False, groups=None) -> TrainingData:
    images, labels = small_digits
    total = num_train + num_held
    return TrainingData(
        parts=(images[:num_train], images[num_train:total]),
        labels=labels[:total],
        weights=np.ones(total),
        groups=tuple(map(str, range(total))) if groups is None else groups,
        rows=np.arange(num_train),
        held=np.arange(num_train, total),
        num_classes=4,
        may_pool=may_pool,
    )


def run(data, *stages, model=None, callbacks=(), clock=None, progress=None, on_model=lambda stage, model: None, **plan):
    model = model or norm_model(4)
    plan = {"augment": "none", "batch_size": 32, "features": "last", "image_size": SIZE_PX} | plan
    plan = Plan("small", Recipe("own", stages), **plan)
    try:
        outcome = run_stages(
            model, plan, stages, data,
            auto_depth=1, callbacks=callbacks, clock=clock, progress=progress, on_model=on_model,
        )  # fmt: skip
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C went through")
    return model, outcome


def probe_on(data, model, rows, held=()):
    """The probe by its own parts, on what the model's backbone computes now."""
    cut = cut_model(model, 3)
    features = extract(FrozenPrefix(cut), data.parts).features
    return features[0][:], fit_probe(
        features, data.labels, data.weights, data.groups, np.asarray(rows), np.asarray(held, int), data.num_classes
    )


def accuracy(table, labels) -> float:
    return metric_value("accuracy", labels, table)


def raising_at(epoch: int, error=KeyboardInterrupt):
    def stop(number, logs):
        if number == epoch:
            raise error

    return keras.callbacks.LambdaCallback(on_epoch_end=stop)


def check_model_is(model, data, outcome, head):
    """The model's head, and the probabilities it gives, are the probe's."""
    for ours, expected in zip(model.get_layer("logits").get_weights(), (head.kernel, head.bias), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max())
    assert outcome.chosen == "probe"


def test_the_probe_alone(data):
    model = norm_model(4)
    before = values(model)
    model, outcome = run(data, PROBE, model=model)
    assert moved(before, model) == {"logits/kernel", "logits/bias"}
    features, probe = probe_on(data, model, data.rows, data.held)
    check_model_is(model, data, outcome, probe.head(data.all_rows))
    np.testing.assert_array_equal(outcome.held, data.held)
    judged = np.exp(log_softmax(probe.head(data.rows).logits(features[data.held])))  # not trained on these
    np.testing.assert_allclose(outcome.held_probabilities, judged, atol=1e-3)
    assert outcome.selection["probe"]["log_loss"] == pytest.approx(probe.log_loss, rel=1e-3)
    assert outcome.history == [] and not outcome.interrupted and not outcome.out_of_time
    assert (outcome.audit["freeze_depth"], outcome.audit["num_blocks"]) == (3, 3)
    assert outcome.audit["bit_identical"] is True and outcome.audit["num_variables"] == 3 * 5


def test_a_ridge_probe_is_an_ordinary_dense_layer(data):
    model, outcome = run(data, dataclasses.replace(PROBE, solver="ridge"))
    features, _ = probe_on(data, model, data.rows, data.held)
    choice = {key: outcome.selection["probe"][key] for key in ("strength", "temperature", "log_loss")}
    head = RidgePath(features, data.labels, 4).head(data.all_rows, **choice)
    check_model_is(model, data, outcome, head)


def test_a_probe_on_several_blocks_is_a_model_around_the_same_layers(data):
    model, told = norm_model(4), []
    before = values(model)
    trained, outcome = run(
        data, PROBE, model=model, features="multi", on_model=lambda stage, model: told.append((stage, model))
    )
    assert told == [("probe", outcome.model)] and outcome.model is not trained
    assert moved(before, trained) == {"logits/kernel", "logits/bias"}  # the probe on the last block
    found = outcome.selection["features"]
    assert found["used"] == "multi" and found["blocks"][-1] == "c_conv" and outcome.audit["bit_identical"] is True
    tapped = tap_model(trained)
    wide = extract(FrozenPrefix(cut_model(tapped.model, 3)), data.parts).features[0][:]
    groups, weights = data.groups, data.weights
    probe = fit_probe(
        wide[None],
        data.labels,
        weights,
        groups,
        data.rows,
        data.held,
        4,
        solver="blocks",
        options={"num_last": tapped.widths[-1]},
    )
    expected = np.exp(log_softmax(probe.head(data.all_rows).logits(wide)))
    ours = outcome.model.predict(np.concatenate(data.parts).astype("float32"), verbose=0)
    np.testing.assert_allclose(ours, expected, atol=2e-3)
    judged = np.exp(log_softmax(probe.head(data.rows).logits(wide[data.held])))  # not trained on these
    np.testing.assert_allclose(outcome.held_probabilities, judged, atol=2e-3)
    gains = probe_on(data, trained, data.rows, data.held)[1].held_log_losses - probe.held_log_losses
    assert found["gain"] == pytest.approx(gains.mean(), abs=1e-3)
    assert found["standard_error"] == pytest.approx(gains.std(ddof=1) / len(gains) ** 0.5, rel=0.02)


def test_several_blocks_are_read_where_held_out_images_surely_gain(data):
    _, outcome = run(data, PROBE, features="auto")
    found = outcome.selection["features"]
    assert found["used"] == ("multi" if found["gain"] > found["standard_error"] else "last")
    assert found["gain"] == pytest.approx(found["log_loss_last"] - found["log_loss_multi"], abs=1e-3)


def test_fine_tuning_has_to_win_against_the_probe_on_several_blocks(data):
    model, outcome = run(data, PROBE, IDLE, features="multi")
    assert outcome.chosen == "probe" and outcome.model is not model
    model, outcome = run(data, PROBE, STRONG, features="multi")
    assert outcome.chosen != "probe" and outcome.model is model


@pytest.mark.parametrize(
    ("stages", "plan", "why"),
    [
        ((STRONG,), {}, "has no probe"),
        ((dataclasses.replace(PROBE, solver="ridge"),), {}, "solver is 'ridge'"),
        ((PROBE, dataclasses.replace(STRONG, batch_norm="adapt")), {}, "'adapt' changes"),
    ],
)
def test_several_blocks_that_cannot_be_read_are_refused_where_asked_for(data, stages, plan, why):
    with pytest.raises(InputError, match=why):
        run(data, *stages, features="multi", **plan)


def test_fine_tuning_that_does_not_surely_win_leaves_the_probe_bit_for_bit(data):
    model = norm_model(4)
    before = values(model)
    model, outcome = run(data, PROBE, IDLE, model=model)
    assert moved(before, model) == {"logits/kernel", "logits/bias"}
    features, probe = probe_on(data, model, data.rows, data.held)
    check_model_is(model, data, outcome, probe.head(data.all_rows))
    found = outcome.selection["fine_tune_against_probe"]
    assert found["replaces_probe"] is False and found["difference"] <= found["standard_error"]
    judged = np.exp(log_softmax(probe.head(data.rows).logits(features[data.held])))
    np.testing.assert_allclose(outcome.held_probabilities, judged, atol=1e-3)


@pytest.fixture(scope="module")
def tuned(small_digits):
    """A fine-tuning that wins: the data, the model, the outcome, and what was seen on the way."""
    data, model, told, epochs = training_data(small_digits, 160, 120), norm_model(4), [], []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    stage = dataclasses.replace(STRONG, learning_rates=(2e-3, 1e-2))
    model, outcome = run(
        data,
        PROBE,
        stage,
        model=model,
        callbacks=[watch],
        on_model=lambda stage, model: told.append((stage, values(model))),
    )
    return data, model, outcome, told, epochs


def test_fine_tuning_that_surely_wins_replaces_the_probe(tuned, small_digits):
    data, model, outcome, told, _ = tuned
    assert outcome.chosen in ("fine_tune", "blend")
    found = outcome.selection["fine_tune_against_probe"]
    assert found["replaces_probe"] is True and found["difference"] > found["standard_error"] > 0
    assert found["fine_tuned"] - found["probe"] == pytest.approx(found["difference"], abs=1e-9)
    assert accuracy(outcome.held_probabilities, data.labels[data.held]) == pytest.approx(found["fine_tuned"])
    # Never seen by either: what comes out is better than the probe it started from.
    images, labels = (part[280:] for part in small_digits)
    untouched = norm_model(4)
    head = probe_on(data, untouched, data.rows, data.held)[1].head(data.all_rows)
    untouched.get_layer("logits").set_weights([head.kernel, head.bias])
    gain = accuracy(model(images).numpy(), labels) - accuracy(untouched(images).numpy(), labels)
    assert gain > 0.1
    # Told twice, each time with the better model in place.
    assert [stage for stage, _ in told] == ["probe", "fine_tune"]
    assert moved(told[0][1], untouched) <= {"logits/kernel", "logits/bias"}
    assert moved(told[1][1], model) == set()


def test_what_won_is_fitted_again_on_everything(tuned):
    _, _, outcome, _, epochs = tuned
    assert outcome.selection["refit"] == "train and validation part"
    assert "mirror" not in outcome.selection and outcome.cache["views"] == 1  # augment="none"
    assert {entry["stage"] for entry in outcome.history} == {"tune", "tune (refit)"}
    refit = [entry for entry in outcome.history if entry["stage"] == "tune (refit)"]
    assert all("val_loss" not in entry for entry in refit)  # there is nothing left to hold out
    assert outcome.selection["tune"]["learning_rate"] in (2e-3, 1e-2)
    # Callbacks see one run of epochs, and the history has the same.
    assert epochs == list(range(len(epochs))) == [entry["epoch"] for entry in outcome.history]


def test_the_share_of_the_blend_has_the_least_log_loss(tuned):
    data, _, outcome, _, _ = tuned
    losses = outcome.selection["blend"]["log_loss"]
    share = str(outcome.selection["blend"]["share"])
    assert losses[share] == min(losses.values())
    told = np.log(outcome.held_probabilities)[np.arange(120), data.labels[data.held]]
    assert -told.mean() == pytest.approx(losses[share], rel=1e-4)


@pytest.mark.slow
def test_the_held_out_probabilities_are_what_the_chosen_weights_gave_before_the_refit(data, monkeypatch):
    monkeypatch.setattr("tfxfer.train.tuning.Tuner._refit", lambda self, *arguments: None)
    model, outcome = run(data, PROBE, STRONG)
    assert outcome.chosen in ("fine_tune", "blend")
    np.testing.assert_allclose(model.predict(data.parts[1], verbose=0), outcome.held_probabilities, atol=1e-4)


@pytest.mark.parametrize(
    ("depth", "state", "num"),
    [
        (2, "affine", 10 + 2),
        pytest.param(1, "frozen", 5 + 8, marks=pytest.mark.slow),
        pytest.param(0, "train", 0, marks=pytest.mark.slow),
    ],
)
def test_what_is_frozen_is_proven_and_what_trains_is_not_claimed(data, depth, state, num):
    stage = dataclasses.replace(STRONG, freeze_depth=depth, batch_norm=state, epochs=1)
    model = norm_model(4)
    before = values(model)
    model, outcome = run(data, stage, model=model)
    audit = outcome.audit
    assert outcome.chosen == "fine_tune"
    assert (audit["freeze_depth"], audit["num_variables"], audit["batch_norm"]) == (depth, num, state)
    assert audit["frozen_blocks"] == ["a_conv", "b_conv", "c_conv"][:depth]
    digests = digest_frozen(freeze(model, depth, batch_norm=state))
    assert len(digests) == num and not set(digests) & moved(before, model)


def test_few_images_are_judged_in_folds_and_all_of_them(small_digits, monkeypatch):
    monkeypatch.setattr(stages_module, "TUNING_FOLDS", 2)
    data = training_data(small_digits, 60, 30, may_pool=True)
    seen = []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(epoch))
    _, outcome = run(data, PROBE, STRONG, callbacks=[watch])
    assert outcome.selection["probe"]["judged_on"].endswith("folds")
    np.testing.assert_array_equal(np.sort(outcome.held), np.arange(90))
    expected = accuracy(outcome.held_probabilities, data.labels[outcome.held])
    found = outcome.selection["fine_tune_against_probe"]
    assert expected == pytest.approx(found["fine_tuned" if found["replaces_probe"] else "probe"])
    assert [entry["epoch"] for entry in outcome.history] == seen == list(range(len(seen)))


def test_a_validation_part_of_the_user_s_own_is_never_pooled(small_digits):
    _, outcome = run(training_data(small_digits, 60, 30, may_pool=False), PROBE)
    assert outcome.selection["probe"]["judged_on"] == "validation part"
    np.testing.assert_array_equal(outcome.held, np.arange(60, 90))


def test_many_images_are_judged_on_the_validation_part(small_digits, monkeypatch):
    monkeypatch.setattr(stages_module, "CROSS_FIT_IMAGES", 80)
    _, outcome = run(training_data(small_digits, 60, 30, may_pool=True), PROBE)
    assert outcome.selection["probe"]["judged_on"] == "validation part"


def test_a_time_limit_that_is_over_leaves_the_probe(data):
    import time

    model, outcome = run(data, PROBE, STRONG, clock=Clock(1.0, started=time.monotonic() - 2))
    assert outcome.out_of_time and outcome.chosen == "probe" and outcome.history == []
    _, probe = probe_on(data, model, data.rows, data.held)
    check_model_is(model, data, outcome, probe.head(data.all_rows))
    assert outcome.audit["bit_identical"] is True


def test_a_time_limit_stops_between_epochs_and_keeps_what_is_surely_better(data):
    clock = Clock(1e9)

    def expire(epoch, logs):
        if epoch == 8:
            clock.limit_seconds = 1e-9

    watch = keras.callbacks.LambdaCallback(on_epoch_end=expire)
    model, outcome = run(data, PROBE, STRONG, clock=clock, callbacks=[watch])
    assert outcome.out_of_time and not outcome.interrupted
    assert 9 <= len(outcome.history) <= 10
    assert outcome.chosen in ("fine_tune", "blend")
    np.testing.assert_allclose(model.predict(data.parts[1], verbose=0), outcome.held_probabilities, atol=1e-4)
    assert outcome.audit["bit_identical"] is True


class AtRefit(Progress):
    """Runs something when fitting again on everything begins."""

    def __init__(self, then):
        self.then, self.began = then, False

    def phase(self, name, total=None):
        if "refit" in name:
            self.began = True
            self.then()


def check_without_refit(model, data, outcome, may_pool):
    """What is kept, and what is told of it, where the models of held-out runs are all there is."""
    if not may_pool:
        assert outcome.chosen in ("fine_tune", "blend")
        np.testing.assert_allclose(model.predict(data.parts[1], verbose=0), outcome.held_probabilities, atol=1e-4)
        return
    _, probe = probe_on(data, model, data.all_rows)  # models of folds know two thirds of the images each
    check_model_is(model, data, outcome, probe.head(data.all_rows))
    found = outcome.selection["fine_tune_against_probe"]
    assert found["replaces_probe"]
    assert accuracy(outcome.held_probabilities, data.labels[outcome.held]) == pytest.approx(found["probe"])


def test_a_refit_that_the_user_ends_is_kept(data):
    class EndsRefit(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = "val_loss" not in logs

    _, outcome = run(data, PROBE, STRONG, callbacks=[EndsRefit()])
    assert sum(entry["stage"] == "tune (refit)" for entry in outcome.history) == 1
    assert outcome.selection["refit"] == "train and validation part" and not outcome.out_of_time


@pytest.mark.parametrize("probes", [(), (PROBE,)])
def test_a_rate_that_breaks_everything_is_told_and_changes_nothing(data, probes):
    class Breaks(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.set_weights([value * 1e30 for value in self.model.get_weights()])

    stage = dataclasses.replace(STRONG, batch_norm="train", epochs=1)
    model = norm_model(4)
    start = model.get_weights()
    try:
        model, outcome = run(data, *probes, stage, model=model, callbacks=[Breaks()])
    except CheckError as error:  # without a probe the model is fitted again, which then says what happened
        assert not probes and "was not a number" in str(error)
    else:
        assert outcome.selection["tune"]["rates"] == {"0.01": None} and outcome.chosen == "probe"
        json.dumps(outcome.selection, allow_nan=False)
    for before, after in zip(start[:-2], model.get_weights()[:-2], strict=True):
        np.testing.assert_array_equal(before, after)
    assert all(np.isfinite(value).all() for value in model.get_weights()[-2:])


@pytest.mark.parametrize("may_pool", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_where_time_does_not_allow_to_fit_again_what_is_told_is_what_is_kept(small_digits, may_pool):
    data = training_data(small_digits, 160, 120, may_pool=may_pool)
    clock = Clock(1e9)
    progress = AtRefit(lambda: setattr(clock, "limit_seconds", 1e-9))
    model, outcome = run(data, PROBE, STRONG, clock=clock, progress=progress)
    assert progress.began and outcome.selection["refit"].startswith("left out")
    check_without_refit(model, data, outcome, may_pool)


def test_ctrl_c_while_fine_tuning_keeps_the_probe(data):
    told = []
    model, outcome = run(
        data, PROBE, STRONG, callbacks=[raising_at(3)], on_model=lambda stage, model: told.append(stage)
    )
    assert outcome.interrupted
    _, probe = probe_on(data, model, data.rows, data.held)
    check_model_is(model, data, outcome, probe.head(data.all_rows))
    assert told == ["probe"]
    assert outcome.audit["bit_identical"] is True


@pytest.mark.parametrize("may_pool", [False, True])
def test_ctrl_c_while_fitting_again_keeps_what_held_out_images_had_chosen(small_digits, may_pool, monkeypatch):
    monkeypatch.setattr(stages_module, "TUNING_FOLDS", 2)
    data = training_data(small_digits, 160, 120, may_pool=may_pool)
    progress, told = AtRefit(lambda: None), []

    def stop(epoch, logs):
        if progress.began:
            raise KeyboardInterrupt

    watch = keras.callbacks.LambdaCallback(on_epoch_end=stop)
    model, outcome = run(
        data, PROBE, STRONG, callbacks=[watch], progress=progress, on_model=lambda stage, model: told.append(stage)
    )
    assert outcome.interrupted and progress.began
    assert told == (["probe"] if may_pool else ["probe", "fine_tune"])
    check_without_refit(model, data, outcome, may_pool)
    assert outcome.audit["bit_identical"] is True


def test_ctrl_c_between_probe_and_fine_tuning_keeps_the_probe(data, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages_module, "join_views", stop)
    _, outcome = run(data, PROBE, STRONG, augment="mirror")
    assert outcome.interrupted and outcome.chosen == "probe"
    assert outcome.audit["bit_identical"] is True


def test_other_errors_are_not_swallowed(data):
    with pytest.raises(ZeroDivisionError):
        run(data, PROBE, IDLE, callbacks=[raising_at(0, ZeroDivisionError)])


def test_a_rate_that_blows_up_leaves_the_probe(data):
    wild = dataclasses.replace(STRONG, learning_rates=(9.9,), warmup_share=0.0, epochs=2)
    model = norm_model(4)
    layer = model.get_layer("norm_backbone").get_layer("c_conv")
    layer.set_weights([layer.get_weights()[0] * 1e15])
    model, outcome = run(data, PROBE, wild, model=model)
    assert all(np.isfinite(value).all() for value in values(model).values())
    assert np.isfinite(outcome.held_probabilities).all()


def test_adapted_statistics_get_a_probe_of_their_own(data):
    stage = dataclasses.replace(IDLE, batch_norm="adapt")
    model = norm_model(4)
    before = values(model)
    model, outcome = run(data, PROBE, stage, model=model)
    statistics = {f"{name}_bn/moving_{part}" for name in "bc" for part in ("mean", "variance")}
    assert moved(before, model) == statistics | {"logits/kernel", "logits/bias"}
    features, probe = probe_on(data, model, data.rows, data.held)
    check_model_is(model, data, outcome, probe.head(data.all_rows))
    judged = np.exp(log_softmax(probe.head(data.rows).logits(features[data.held])))
    np.testing.assert_allclose(outcome.held_probabilities, judged, atol=1e-3)
    assert outcome.audit["bit_identical"] is True and outcome.audit["batch_norm"] == "adapt"


@pytest.mark.parametrize("other", ["frozen", "affine"])
def test_statistics_are_adapted_in_the_blocks_of_the_stages_that_ask_for_it(data, other):
    """Once, before the probe; the other stages begin with them, and their own blocks are left as they were."""
    first = dataclasses.replace(IDLE, name="more", freeze_depth=0, batch_norm=other)
    second = dataclasses.replace(IDLE, name="top", batch_norm="adapt")
    model, expected = norm_model(4), norm_model(4)
    before = values(model)
    model, outcome = run(data, PROBE, first, second, model=model)
    assert outcome.audit["bit_identical"] is True and outcome.chosen == "probe"
    statistics = {f"{name}_bn/moving_{part}" for name in "bc" for part in ("mean", "variance")}
    assert moved(before, model) == statistics | {"logits/kernel", "logits/bias"}
    freeze(expected, 1, batch_norm="adapt")
    adapt_batch_norm(expected, np.concatenate(data.parts)[data.rows].astype("float32"))
    for path in sorted(statistics):
        np.testing.assert_allclose(values(model)[path], values(expected)[path], atol=1e-3, err_msg=path)
    _, probe = probe_on(data, expected, data.rows, data.held)
    check_model_is(model, data, outcome, probe.head(data.all_rows))


@pytest.mark.parametrize(
    ("stage", "recipe"),
    [
        (dataclasses.replace(IDLE, regularizer="l2_sp", freeze_depth="all"), {}),
        (dataclasses.replace(IDLE, regularizer="lwf", freeze_depth=3), {}),
        (dataclasses.replace(IDLE, regularizer="l2_sp", freeze_depth="all"), {"by_table": True}),
    ],
)
def test_a_regularizer_of_the_head_alone_is_refused_before_anything_is_computed(data, monkeypatch, stage, recipe):
    def never(*arguments, **options):
        pytest.fail("something was computed")

    monkeypatch.setattr(stages_module, "Engines", never)
    plan = Plan("small", Recipe("own", (PROBE, stage), **recipe), image_size=SIZE_PX)
    with pytest.raises(InputError, match=r"'tune' trains the head alone, so regularizer .* would do nothing"):
        run_stages(norm_model(4), plan, (PROBE, stage), data, auto_depth=1)


@pytest.mark.slow
def test_stages_follow_each_other_at_depths_and_states_of_their_own(data):
    first = dataclasses.replace(STRONG, name="top", freeze_depth=2, batch_norm="affine", epochs=2)
    second = dataclasses.replace(STRONG, name="more", freeze_depth="a_conv", batch_norm="frozen")
    model = norm_model(4)
    before = values(model)
    model, outcome = run(data, PROBE, first, second, model=model)
    assert outcome.chosen in ("fine_tune", "blend")
    head = {"logits/kernel", "logits/bias"}
    assert moved(before, model) == {"b_conv/kernel", "c_conv/kernel", "c_bn/gamma", "c_bn/beta"} | head
    assert [entry["stage"] for entry in outcome.history][:4] == ["top", "top", "more", "more"]
    assert outcome.audit["freeze_depth"] == 1


def test_a_skip_over_the_boundary_is_cut_where_two_tensors_cross(data):
    model = around(skip_backbone(), 4)
    before = values(model)
    stage = dataclasses.replace(STRONG, freeze_depth=2, epochs=3)
    model, outcome = run(data, PROBE, stage, model=model)
    assert outcome.cache["activation_shapes"] == [[SIZE_PX, SIZE_PX, 4]] * 2  # block_1's goes round block_2
    assert (outcome.audit["freeze_depth"], outcome.audit["frozen_blocks"]) == (2, ["block_1", "block_2"])
    assert not {path for path in moved(before, model) if path.startswith(("block_1", "block_2"))}
    assert {path for path in moved(before, model) if path.startswith("block_3")}


def test_without_a_probe_fine_tuning_is_all_there_is(data):
    _, outcome = run(data, dataclasses.replace(STRONG, learning_rates=(2e-3,), epochs=40))
    assert outcome.chosen == "fine_tune" and "fine_tune_against_probe" not in outcome.selection
    assert accuracy(outcome.held_probabilities, data.labels[data.held]) > 0.5


def test_mirrored_views_are_used_where_they_do_not_hurt(data):
    _, outcome = run(data, PROBE, IDLE, augment="auto")
    found = outcome.selection["mirror"]
    assert found["used"] == (found["log_loss_rise"] <= found["standard_error"])
    assert outcome.cache["views"] >= 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model_and_another_seed_another(data):
    stage = dataclasses.replace(STRONG, epochs=2)
    models = [run(data, PROBE, stage, model=norm_model(4, dropout=0.3), seed=seed)[0] for seed in (4, 4, 5)]
    one, two, other = (values(model) for model in models)
    for path, value in one.items():
        np.testing.assert_allclose(two[path], value, atol=1e-6, err_msg=path)
    assert any(np.abs(other[path] - value).max() > 1e-4 for path, value in one.items())


def test_the_recipes_by_name():
    assert [stage.solver for stage in get_recipe("auto").stages] == ["convex", "adamw"]
    assert get_recipe("full").stages[1].freeze_depth == 0
    assert [stage.solver for stage in get_recipe("probe").stages] == ["convex"]


def test_a_gap_in_the_middle_is_frozen_too_and_only_what_leads_is_computed_once(data):
    model = norm_model(4)
    before = values(model)
    stage = dataclasses.replace(STRONG, freeze_depth="re:^[ac]_", epochs=1)
    model, outcome = run(data, stage, model=model)
    assert outcome.audit["freeze_depth"] == 1 and outcome.audit["freezing"] == ["re:^[ac]_"]
    assert outcome.audit["bit_identical"] is True and outcome.audit["num_variables"] == 2 * 5 + 4
    assert {path for path in moved(before, model) if path.endswith("kernel")} == {"b_conv/kernel", "logits/kernel"}


def test_a_source_that_sees_no_difference_is_refused(data):
    model = norm_model(4)
    last = model.get_layer("norm_backbone").get_layer("c_bn")
    gamma, beta, mean, variance = last.get_weights()
    last.set_weights([gamma * 1e-9, np.abs(beta) + 1, mean, variance])
    with pytest.raises(InputError, match="gives the same features for every image, up to rounding"):
        run(data, PROBE, model=model)


def test_a_stage_with_everything_trains_and_freezes_what_it_says(data):
    model = norm_model(4)
    before = values(model)
    stage = dataclasses.replace(
        STRONG, layer_decay=0.7, average=0.8, mixup=0.2, cutmix=1.0, micro_batches=2, clip_norm=0.5
    )
    model, outcome = run(data, PROBE, stage, model=model)
    assert outcome.chosen in ("fine_tune", "blend")
    assert {"b_conv/kernel", "c_conv/kernel", "logits/kernel"} <= moved(before, model)
    assert "a_conv/kernel" not in moved(before, model) and outcome.audit["bit_identical"]
    gain = outcome.selection["fine_tune_against_probe"]
    assert gain["fine_tuned"] > gain["probe"] + 0.05


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("layer_decay", 0.0, r"layer_decay must lie in \(0, 1\], not 0.0"),
        ("layer_decay", 1.5, r"layer_decay must lie in"),
        ("average", 1.0, r"average must lie in \[0, 1\), not 1.0"),
        ("mixup", -0.1, r"mixup and cutmix must not be negative"),
        ("cutmix", -0.1, r"mixup and cutmix must not be negative"),
        ("clip_norm", -0.1, r"clip_norm must be at least 0"),
        ("schedule", "linear", r"schedule must be one of cosine, slanted, steps, not 'linear'"),
        ("decay_at", (0.6, 0.3), r"decay_at must be rising shares"),
        ("parameters", "bias", r"parameters must be one of all, affine, not 'bias'"),
        ("steps", -1, r"must not be negative"),
        ("micro_batches", 0, r"micro_batches must be at least 1"),
    ],
)
def test_values_of_a_stage_that_cannot_be_are_refused(key, value, says):
    with pytest.raises(InputError, match=says):
        Stage("tune", **{key: value})


def test_stages_that_share_a_name_are_not_taken_for_each_other_in_the_journal(data, tmp_path):
    """The second goes on from where the first ended, with a journal as without one."""
    stages = (PROBE, STRONG, STRONG)
    plan = Plan("small", Recipe("own", stages), augment="none", batch_size=32, image_size=SIZE_PX)
    ends = []
    for journal in (None, Journal(tmp_path / "checkpoints")):
        model = norm_model(4)
        outcome = run_stages(model, plan, stages, data, auto_depth=1, journal=journal)
        ends.append((model.get_weights(), outcome.history))
    assert ends[0][1] == ends[1][1]
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        np.testing.assert_array_equal(one, other)


# -- recipes -------------------------------------------------------------------------------


def test_the_affine_stage_proves_that_kernels_and_statistics_stay(data):
    model = norm_model(4)
    before = values(model)
    stage = dataclasses.replace(STRONG, freeze_depth=0, parameters="affine", batch_norm="affine")
    model, outcome = run(data, PROBE, stage, model=model)
    assert outcome.chosen != "probe"
    affine = {f"{name}_bn/{part}" for name in "abc" for part in ("gamma", "beta")}
    assert moved(before, model) == affine | {"logits/kernel", "logits/bias"}
    assert outcome.audit["bit_identical"] is True and outcome.audit["num_variables"] == 3 * 3
    assert outcome.audit["freeze_depth"] == 0 and outcome.cache["activation_shapes"] == [[SIZE_PX, SIZE_PX, 3]]


def test_stages_that_unfreeze_downwards_go_on_from_each_other(data):
    model = norm_model(4)
    before = values(model)
    stages = [dataclasses.replace(STRONG, name=f"from {depth}", freeze_depth=depth, epochs=3) for depth in (2, 1, 0)]
    model, outcome = run(data, PROBE, *stages, model=model)
    assert outcome.chosen != "probe" and {"a_conv/kernel", "b_conv/kernel", "c_conv/kernel"} <= moved(before, model)
    told = [entry["stage"] for entry in outcome.history]
    assert list(dict.fromkeys(told)) == ["from 2", "from 1", "from 0", "from 0 (refit)"]
    first, last = (next(e for e in outcome.history if e["stage"] == f"from {depth}") for depth in (2, 0))
    assert last["loss"] < first["loss"]  # begins where the others ended


def test_steps_and_rates_are_for_a_batch_of_reference(data):
    stage = dataclasses.replace(
        STRONG, solver="sgd", steps=10, reference_batch_size=64, learning_rates=(0.02,), schedule="steps", patience=0
    )
    _, outcome = run(data, PROBE, stage)
    # 160 images in batches of 32: five steps an epoch; ten of 64 images are twenty of 32.
    assert outcome.selection["tune"]["epochs"] == 4
    assert {entry["learning_rate"] for entry in outcome.history if entry["stage"] == "tune"} == {0.01}


def test_bit_takes_its_length_from_the_number_of_images(data):
    recipe = get_recipe("bit")
    short = dataclasses.replace(recipe.stages[1], reference_batch_size=0, batch_norm="frozen")
    plan = Plan("small", dataclasses.replace(recipe, stages=(PROBE, short)), augment="none", batch_size=160,
                features="last", image_size=SIZE_PX)  # fmt: skip
    outcome = run_stages(norm_model(4), plan, plan.recipe.stages, data, auto_depth=1, clock=Clock(0.001))
    assert outcome.chosen == "probe"  # out of time, as the clock says
    loop = stages_module._Loop(norm_model(4), plan, plan.recipe.stages, data, 1, Clock(), Progress(), ())
    assert (loop.tuned[0].steps, loop.tuned[0].decay_at) == (500, (0.4, 0.6, 0.8))
    assert loop.outcome.selection["by_size"] == {"bit": {"images": 160, "steps": 500, "mixup": 0.0}}


@pytest.mark.parametrize("source", [norm_model, lambda classes: around(skip_backbone(), classes)])
def test_stages_that_freeze_more_train_from_deeper_cuts_to_the_same_weights(data, source, monkeypatch):
    stages = [
        dataclasses.replace(
            STRONG, name=f"from {depth}", freeze_depth=depth, epochs=2, average=0.5, batch_norm="affine"
        )
        for depth in (3, 2, 1, 2)
    ]
    deep, outcome = run(data, *stages, model=source(4), augment="mirror")
    found = outcome.cache["deeper"]
    # The last stage freezes two blocks, but the second one has moved before it: it is cut behind the first.
    assert {name: facts["blocks"] for name, facts in found.items()} == {"from 3": 3, "from 2": 2}
    monkeypatch.setattr(trainers_module, "go_deeper", lambda *args: None)
    plain, expected = run(data, *stages, model=source(4), augment="mirror")
    assert "deeper" not in expected.cache and expected.chosen == outcome.chosen != "probe"
    for path, value in values(plain).items():
        np.testing.assert_allclose(values(deep)[path], value, atol=2e-3, err_msg=path)
    np.testing.assert_allclose(
        [entry["loss"] for entry in outcome.history], [entry["loss"] for entry in expected.history], rtol=1e-3
    )
