"""One trial of a search: a plan, trained from shared features, judged on the validation part."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from tfxfer.errors import InputError
from tfxfer.methods import METHODS
from tfxfer.registry import lookup
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Stage
from tfxfer.train.clock import Clock
from tfxfer.train.distribute import Devices
from tfxfer.train.freezing import Freezing
from tfxfer.train.journal import Journal
from tfxfer.train.lengths import epochs_of, scale_of
from tfxfer.train.loop import SuffixTrainer, Trained
from tfxfer.train.outcome import Outcome
from tfxfer.train.trainers import StageTrainers
from tfxfer.tuning.callbacks import OnWholeModel
from tfxfer.tuning.shared import Passes, SharedFeatures

VIEWS = {"none": ("plain",), "auto": ("plain",), "mirror": ("plain", "mirror")}


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """What a trial gave.

    Attributes:
        history: Of the last stage, a dict an epoch, with the names that Keras uses.
        held_probabilities: (n, K) of the validation part, at the best epoch by validation loss.
        weights: Of the blocks behind the cut and the head, at that epoch.
        freeze_depth: Leading blocks that were frozen.
        num_trainable: Parameters that trained.
        seconds: All of it, what was computed of shared features among it.
        passes: Through frozen blocks.
    """

    history: list[dict[str, float]]
    held_probabilities: np.ndarray
    weights: list[np.ndarray]
    freeze_depth: int
    num_trainable: int
    seconds: float
    passes: Passes


def run_trial(
    model: keras.Model,
    plan: Plan,
    shared: SharedFeatures,
    auto_depth: int | float,
    *,
    epochs: int | None = None,
    initial_epoch: int = 0,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Trial:
    """Train a model by the stages of a plan.

    Args:
        model: Of `build_model`; trained in place. With `initial_epoch` it goes on from its weights, else its head
            starts from the probe of the same features.
        plan: Stages with one learning rate each, augmentation, batch size, seed.
        shared: Features of this source at this image size.
        auto_depth: What freeze depth "auto" means for the source.
        epochs: Of the last stage, the number of its last epoch as Keras counts; the stage's own by default.
        initial_epoch: That it goes on from: earlier stages are left out, and the rate is warmed up and falls to zero
            once more, since KerasTuner keeps weights and no optimizer.
        callbacks: See the last stage, and the whole model.

    Raises:
        InputError: Where the plan cannot be a trial.
        NotFinite: Where the loss is no number, at the first rate already.
    """
    began, before = time.perf_counter(), dataclasses.replace(shared.passes)
    stages = stages_of(plan)
    tuned = [stage for stage in stages if not stage.is_probe]
    freezing = Freezing(model, tuned, auto_depth)
    cut = freezing.cut()
    views = VIEWS[plan.augment]
    extracted = shared.at(cut.depth, views)
    if not initial_epoch and stages[0].is_probe:
        head = shared.probe(views, stages[0].solver).head(shared.data.rows)
        model.get_layer("logits").set_weights([head.kernel, head.bias])
    trainers = StageTrainers(
        model, cut, extracted, shared.data, plan, tuned, freezing.depths, Outcome(), clock=Clock(), progress=Progress(),
        journal=Journal(), devices=Devices(), source_head=None,
    )  # fmt: skip
    start = cut.suffix.get_weights()
    for index, stage in enumerate(tuned):
        last = index == len(tuned) - 1
        if initial_epoch and not last:
            continue
        trainer = trainers.make(index)
        trainer.start = start
        watch = [OnWholeModel(callbacks, model)] if last and callbacks else []
        found = _trained(trainer, stage, plan, shared, watch, epochs if last else None, initial_epoch if last else 0)
        start = found.weights
        shared.count(cut.depth, len(found.history) * (len(shared.data.rows) + len(shared.data.held)))
    assert found.held_log_probabilities is not None
    return Trial(
        history=found.history, held_probabilities=np.exp(found.held_log_probabilities), weights=found.weights,
        freeze_depth=freezing.num_leading,
        num_trainable=sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
        seconds=time.perf_counter() - began, passes=shared.passes - before,
    )  # fmt: skip


def _trained(
    trainer: SuffixTrainer, stage: Stage, plan: Plan, shared: SharedFeatures, watch: list, epochs: int | None,
    initial_epoch: int,
) -> Trained:  # fmt: skip
    length = epochs_of(stage, len(shared.data.rows), plan.batch_size) if epochs is None else epochs - initial_epoch
    if length < 1:
        raise InputError(f"A trial must train at least one epoch, not from {initial_epoch} to {epochs}.")
    return trainer.run(
        shared.data.rows, stage.learning_rates[0] * scale_of(stage, plan.batch_size), held=shared.data.held,
        epochs=length, first_epoch=initial_epoch, seed=plan.seed, watch=watch,
    )  # fmt: skip


def stages_of(plan: Plan) -> tuple[Stage, ...]:
    """The stages of a plan that can be a trial: everything in it is said, nothing is left to measurements."""
    stages = lookup(METHODS, plan.method, "method")(plan.recipe)
    tuned = [stage for stage in stages if not stage.is_probe]
    if not tuned:
        raise InputError("A trial trains, and the recipe of this plan only solves a head; give it a fine-tuning stage.")
    for stage in tuned:
        if stage.find_rate or len(stage.learning_rates) > 1:
            raise InputError(
                f"Stage {stage.name!r} of a trial must have one learning rate, not {list(stage.learning_rates)}: the "
                "search chooses, so write learning_rates=(hp.Float(...),)."
            )
        if stage.needs_source_head:
            raise InputError(f"Stage {stage.name!r}: a trial has no regularizer {stage.regularizer!r}; take 'l2_sp'.")
        if stage.batch_norm == "adapt":
            raise InputError(
                f"Stage {stage.name!r}: batch_norm 'adapt' changes what frozen blocks are followed by, so trials could "
                "share no probe; take 'frozen', 'affine' or 'train'."
            )
    if plan.augment not in VIEWS:
        raise InputError(f"A trial has augment 'none' or 'mirror', not {plan.augment!r}.")
    return stages


def history_of(epochs: Sequence[Mapping[str, float]]) -> keras.callbacks.History:
    """A Keras `History`, of which KerasTuner takes the best epoch by whatever its objective is."""
    history = keras.callbacks.History()
    names = [name for name in epochs[0] if name not in ("epoch", "learning_rate")]
    history.history = {name: [epoch.get(name, float("nan")) for epoch in epochs] for name in names}
    history.epoch = [int(epoch["epoch"]) for epoch in epochs]
    return history
