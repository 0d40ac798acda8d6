"""Regularizers in the training step, against the formulas of their papers worked in NumPy."""

import dataclasses

import keras
import numpy as np
import pytest
from small_networks import norm_model, pictures
from stopping import Stop, stop_after_saves

from tfxfer.errors import InputError
from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.methods.optimizers import blockwise_factors
from tfxfer.model.freeze import freeze
from tfxfer.specs import Stage
from tfxfer.train.batches import EpochBatches
from tfxfer.train.forgetting import SourceHead, make_regularizer
from tfxfer.train.journal import Journal
from tfxfer.train.loop import SuffixTrainer, Trained

IMAGES, LABELS = pictures(22), np.arange(22) % 3
WEIGHTS = np.random.default_rng(0).uniform(0.5, 2, 22).astype(np.float32)
ROWS = np.arange(16)
HEAD = SourceHead(*(np.random.default_rng(3).normal(size=s).astype(np.float32) for s in ((5, 7), (7,))))
STAGE = Stage("tune", epochs=2, learning_rates=(3e-3,), warmup_share=0.0, batch_norm="affine", label_smoothing=0.0)
KINDS = ("l2_sp", "lwf", "co_tuning")


def ready(stage, depth=1, source=None):
    model = freeze(norm_model(), depth, batch_norm=stage.batch_norm)
    cut = cut_model(model, depth)
    extracted = extract(FrozenPrefix(cut, 8), (IMAGES,), ("plain", "mirror"))
    weights = {id(variable): variable.numpy() for variable in cut.suffix.weights} if source is None else source(model)
    regularizer = make_regularizer(stage, model, weights, HEAD, extracted, LABELS)
    factors = blockwise_factors(model, stage.layer_decay) if stage.layer_decay < 1 else None
    return model, SuffixTrainer(
        cut.suffix, extracted, LABELS, WEIGHTS, stage, 8, factors=factors, regularizer=regularizer
    )


def log_softmax(logits):
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def first_batch(trainer, **options):
    recorder = trainer.regularizer.recorder(ROWS) if trainer.regularizer else None
    batches = EpochBatches(
        trainer.extracted.activations, 2, trainer.targets, WEIGHTS, ROWS, 8, 7, recorder=recorder, **options
    )
    batch = next(iter(batches.epoch(0)))
    return batch, batches.order(0)[1][:8]


def source_logits_of(features):
    return features.astype(np.float64) @ HEAD.kernel + HEAD.bias


def losses_by_hand(kind, strength, trainer, batch, views):
    """The sum over the images, before the step."""
    logits = trainer.suffix(batch.activations, training=False).numpy().astype(np.float64)
    each = -(batch.targets * log_softmax(logits)).sum(1)
    features = trainer.extracted.features
    now = source_logits_of(features[views, batch.rows])  # nothing has moved yet
    if kind == "lwf":  # equations 2 to 4, T = 2
        soft = np.exp(now) ** (1 / 2)
        soft /= soft.sum(1, keepdims=True)
        each += strength * -(soft * np.log(soft)).sum(1)
    if kind == "co_tuning":  # -sum_s p(s | t) log p_s, with p(s | t) the mean over the images of class t
        shares = np.exp(log_softmax(source_logits_of(features[0, ROWS])))
        of_class = np.stack([shares[LABELS[ROWS] == label].mean(0) for label in range(3)])
        each += strength * -((batch.targets @ of_class) * log_softmax(now)).sum(1)
    return (each * batch.weights).sum()


@pytest.mark.parametrize("kind", ["lwf", "co_tuning"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_loss_of_a_step_is_the_formula(kind, micro_batches):
    stage = dataclasses.replace(STAGE, regularizer=kind, regularizer_strength=0.7, micro_batches=micro_batches)
    _, trainer = ready(stage)
    trainer._restart(0)
    batch, views = first_batch(trainer)
    expected = losses_by_hand(kind, 0.7, trainer, batch, views)
    assert set(views) == {0, 1}, "both views have their own record"
    found = trainer.step(batch)
    assert found.sums[0] == pytest.approx(expected, rel=1e-4)


def test_co_tuning_of_mixed_images_has_the_mixed_rows():
    stage = dataclasses.replace(STAGE, regularizer="co_tuning", mixup=1.0)
    _, trainer = ready(stage)
    batch, _ = first_batch(trainer, mixup=1.0)
    assert ((batch.targets > 0).sum(1) == 2).any()
    np.testing.assert_allclose(batch.recorded, batch.targets @ trainer.regularizer.relationship(ROWS), rtol=1e-6)


def test_l2_sp_pulls_to_the_source_wherever_the_stage_began():
    def other(model):
        return {id(variable): variable.numpy() + 0.25 for variable in model.weights}

    stage = dataclasses.replace(STAGE, regularizer="l2_sp", regularizer_strength=0.3)
    model, trainer = ready(stage, source=other)
    trainer._restart(0)
    batch, views = first_batch(trainer)
    plain = losses_by_hand("", 0, trainer, batch, views)
    moving = [v for v in model.trainable_variables if not v.path.startswith("logits")]
    assert {v.path for v in moving} == {f"{n}_{part}" for n in "bc" for part in ("conv/kernel", "bn/gamma", "bn/beta")}
    away = sum(0.25**2 * v.numpy().size for v in moving)
    head = sum(float((v.numpy() ** 2).sum()) for v in model.get_layer("logits").weights)
    # alpha / 2 ||w - w0||^2 + beta / 2 ||head||^2, added to the mean over the eight images of the batch
    assert trainer.step(batch).sums[0] == pytest.approx(plain + 8 * (0.3 / 2 * away + 0.01 / 2 * head), rel=1e-4)


def test_l2_sp_takes_the_place_of_weight_decay():
    for strength, expected in ((0.3, 0.0), (0.0, 0.05)):
        stage = dataclasses.replace(STAGE, weight_decay=0.05, regularizer="l2_sp", regularizer_strength=strength)
        assert ready(stage)[1].step.optimizer.weight_decay == expected


@pytest.mark.parametrize("kind", KINDS)
def test_no_strength_is_none(kind):
    plain = ready(STAGE)[1].run(ROWS, 3e-3, seed=4)
    idle = ready(dataclasses.replace(STAGE, regularizer=kind, regularizer_strength=0.0))[1].run(ROWS, 3e-3, seed=4)
    pulled = ready(dataclasses.replace(STAGE, regularizer=kind, regularizer_strength=5.0))[1].run(ROWS, 3e-3, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(plain.weights, idle.weights, strict=True))
    assert len(pulled.weights) == len(plain.weights)  # the old head is not kept
    assert max(np.abs(a - b).max() for a, b in zip(plain.weights, pulled.weights, strict=True)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_strong_one_forgets_less(kind):
    """Weights stay nearer to the source's, and its old output says more of what it said."""
    start = ready(STAGE)[1].start
    ends = {}
    for strength in (0.0, 30.0):
        stage = dataclasses.replace(STAGE, epochs=20, regularizer=kind, regularizer_strength=strength)
        _, trainer = ready(stage)
        ends[strength] = trainer.run(ROWS, 3e-3, seed=4).weights
    if kind == "l2_sp":
        free, held = (
            sum(((a - b) ** 2).sum() for a, b in zip(end[:-2], start[:-2], strict=True)) for end in ends.values()
        )
        assert held < 0.5 * free
        return
    trainer.suffix.set_weights(ends[30.0])
    recorder = trainer.regularizer.recorder(ROWS)
    wanted = recorder(np.zeros(16, int), ROWS, np.eye(3)[LABELS[ROWS]])
    wanted = np.exp(log_softmax(wanted / 2)) if kind == "lwf" else wanted
    present = trainer.trained(trainer.extracted.activations[0, ROWS], training=False)[1].numpy()
    told = np.exp(log_softmax(present / 2)) if kind == "lwf" else np.exp(log_softmax(present))
    free = ready(dataclasses.replace(STAGE, regularizer=kind))[1]  # the old head on weights that were let go
    free.suffix.set_weights(ends[0.0])
    free.regularizer.start()
    let_go = free.trained(free.extracted.activations[0, ROWS], training=False)[1].numpy()
    let_go = np.exp(log_softmax(let_go / 2)) if kind == "lwf" else np.exp(log_softmax(let_go))
    assert np.abs(told - wanted).mean() < np.abs(let_go - wanted).mean()


@pytest.mark.parametrize("kind", [pytest.param("l2_sp", marks=pytest.mark.slow), "lwf", "co_tuning"])
def test_a_resumed_run_is_the_unstopped_one_bit_for_bit(tmp_path, kind):
    stage = dataclasses.replace(STAGE, epochs=3, regularizer=kind, layer_decay=0.8)
    whole = ready(stage)[1].run(ROWS, 3e-3, seed=7, held=np.arange(16, 22))

    def stopping(unit):
        stop_after_saves(unit, 3)
        return ready(stage)[1].run(ROWS, 3e-3, seed=7, held=np.arange(16, 22), unit=unit).state()

    with pytest.raises(Stop):
        Journal(tmp_path, every_seconds=0.0).run("tune", stopping)
    keras.utils.set_random_seed(99)
    _, trainer = ready(stage)
    trainer.run(ROWS, 1e-2, epochs=1, seed=1)  # another run before leaves nothing behind
    state = Journal(tmp_path).run(
        "tune", lambda unit: trainer.run(ROWS, 3e-3, seed=7, held=np.arange(16, 22), unit=unit).state()
    )
    found = Trained.of_state(*state)
    assert all(np.array_equal(a, b) for a, b in zip(whole.weights, found.weights, strict=True))
    assert whole.history == found.history


def test_the_relationship_leaves_out_classes_that_a_fold_lacks():
    _, trainer = ready(dataclasses.replace(STAGE, regularizer="co_tuning"))
    rows = np.flatnonzero(LABELS != 1)
    found = trainer.regularizer.relationship(rows)
    assert not found[1].any() and found[[0, 2]].sum(1) == pytest.approx([1, 1], rel=1e-5)


def test_what_would_do_nothing_is_refused():
    with pytest.raises(InputError, match="trains the head alone, so regularizer 'l2_sp' would do nothing"):
        ready(dataclasses.replace(STAGE, regularizer="l2_sp"), depth=3)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"regularizer": "l2sp"}, "regularizer must be one of l2_sp, lwf, co_tuning"),
        ({"regularizer_strength": 0.5}, "beside a regularizer"),
        ({"regularizer": "lwf", "regularizer_strength": -1.0}, "at least 0"),
        ({"regularizer": "lwf", "regularizer_strength": "much"}, "must be a number"),
        ({"regularizer": "lwf", "mixup": 0.2}, "has none for mixed ones"),
        ({"regularizer": "lwf", "solver": "convex", "epochs": 0}, "a probe moves no weights"),
    ],
)
def test_stages_that_cannot_be_are_refused(values, says):
    with pytest.raises(InputError, match=says):
        Stage.from_dict({"name": "tune", **values})


def test_the_strength_is_the_paper_s_unless_given():
    assert [Stage("x", regularizer=kind).strength for kind in ("", *KINDS)] == [0.0, 0.1, 1.0, 2.3]
    assert Stage("x", regularizer="lwf", regularizer_strength=0.5).strength == 0.5
