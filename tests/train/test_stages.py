import dataclasses

import keras
import numpy as np
import pytest
from PIL import Image
from small_networks import SIZE_PX, around, moved, norm_model, skip_backbone, values

from tfxfer.errors import InputError
from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.features.solvers import log_softmax
from tfxfer.methods.probe import fit_probe
from tfxfer.metrics import metric_value
from tfxfer.model.freeze import digest_frozen, freeze
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Recipe, Stage
from tfxfer.train import stages as stages_module
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


def run(data, *stages, model=None, callbacks=(), clock=None, progress=None, on_model=lambda stage: None, **plan):
    model = model or norm_model(4)
    plan = {"augment": "none", "batch_size": 32, "image_size": SIZE_PX} | plan
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
    return features[0], fit_probe(
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
        data, PROBE, stage, model=model, callbacks=[watch], on_model=lambda stage: told.append((stage, values(model)))
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
    model, outcome = run(data, PROBE, STRONG, callbacks=[raising_at(3)], on_model=told.append)
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
    model, outcome = run(data, PROBE, STRONG, callbacks=[watch], progress=progress, on_model=told.append)
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


def test_a_skip_over_the_boundary_costs_speed_and_not_correctness(data):
    model = around(skip_backbone(), 4)
    before = values(model)
    stage = dataclasses.replace(STRONG, freeze_depth=2, epochs=3)
    model, outcome = run(data, PROBE, stage, model=model)
    assert outcome.cache["activation_shape"] == [SIZE_PX, SIZE_PX, 4]  # cut behind the first block
    assert (outcome.audit["freeze_depth"], outcome.audit["frozen_blocks"]) == (2, ["block_1", "block_2"])
    assert not {path for path in moved(before, model) if path.startswith(("first", "second"))}


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
        ("clip_norm", 0.0, r"clip_norm must be above 0"),
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
