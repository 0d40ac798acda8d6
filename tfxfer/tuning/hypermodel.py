"""A `keras_tuner.HyperModel` of transfer: trials that share what is frozen."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import keras_tuner
import tensorflow as tf

from tfxfer.data import Dataset, load_data
from tfxfer.errors import InputError
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze, frozen_units
from tfxfer.runtime.progress import Progress
from tfxfer.sources.catalog import get_source
from tfxfer.specs import Plan, Source
from tfxfer.train.freezing import auto_depth
from tfxfer.train.loop import NotFinite
from tfxfer.train.recipes import get_recipe
from tfxfer.train.training_data import training_data
from tfxfer.tuning.callbacks import MedianRecord, MedianStopping
from tfxfer.tuning.shared import Passes, SharedFeatures
from tfxfer.tuning.space import Space, default_space, with_stage
from tfxfer.tuning.trials import Trial, history_of, run_trial, stages_of


class SpaceError(InputError, keras_tuner.errors.FatalError):
    """A space gave no plan that can be trained: KerasTuner ends its search then, where it would try the next trial."""


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A trial that has ended, for tables.

    Attributes:
        values: Its hyperparameters.
        plan: That they stand for.
        trial: What it gave; None where it failed.
        failed: Why, where it did.
        stopped_at: The epoch after which it could not win any more; None where it went on to its end.
    """

    values: Mapping[str, Any]
    plan: Plan
    trial: Trial | None
    failed: str = ""
    stopped_at: int | None = None


class TransferHyperModel(keras_tuner.HyperModel):
    """Transfer of a source to your classes, for any tuner of KerasTuner.

    Trials share what frozen blocks compute: the first that freezes so many blocks runs the images through them once,
    all others start from there, and a head starts from the solution on the same features. The numbers that an
    `objective` can name are those of the validation part: "val_loss", "val_accuracy", "val_macro_f1",
    "val_balanced_accuracy", "val_log_loss". A trial that is behind the median of the others is stopped.

    Args:
        source: Name or card of a source, or a list of them to choose among.
        head: `Classes(names)`, a number of classes, class names, or a Dataset whose classes are taken.
        space: A function from `keras_tuner.HyperParameters` to a `Plan`; `tfxfer.tuning.space.default_space` by
            default. Each fine-tuning stage of the plan must have one learning rate.
        image_size: Of the default space, in px; the first source's own by default.
        batch_size: Of the default space.
        seed: Of the default space; of shuffle, dropout, folds.
        monitor: What trials are compared by while they run; "" lets all of them go on to their end.
        progress: Told about frozen features.
        name, tunable: As KerasTuner has them.

    Attributes:
        records: A `Record` for each trial of this process.

    Raises:
        InputError: Where a source is unknown, or the space gives no plan that can be trained.

    Example:
        >>> import keras_tuner, tfxfer  # doctest: +SKIP
        >>> data = tfxfer.load_data("photos/", image_size=224)  # doctest: +SKIP
        >>> hypermodel = tfxfer.TransferHyperModel("mobilenet_v2_imagenet", data)  # doctest: +SKIP
        >>> tuner = keras_tuner.Hyperband(hypermodel, "val_accuracy", max_epochs=12)  # doctest: +SKIP
        >>> tuner.search(data)  # doctest: +SKIP
        >>> model = tuner.get_best_models()[0]  # doctest: +SKIP
    """

    def __init__(
        self, source: str | Source | Sequence[str | Source], head: Any, *, space: Space | None = None,
        image_size: int | None = None, batch_size: int = 32, seed: int = 0, monitor: str = "val_accuracy",
        progress: Progress | None = None, name: str | None = None, tunable: bool = True,
    ):  # fmt: skip
        super().__init__(name=name, tunable=tunable)
        given = [source] if isinstance(source, str | Source) else list(source)
        cards = [get_source(one) if isinstance(one, str) else one for one in given]
        if not cards:
            raise InputError("A search needs at least one source.")
        self.head, self.monitor = head, monitor
        self.cards = {card.name: card for card in cards}
        if space is None:
            space = default_space(default_plan(cards[0], image_size, batch_size=batch_size, seed=seed), cards)
        self.space = space
        self.records: list[Record] = []
        self._progress = progress or Progress()
        self._shared: dict[tuple[str, int, str], SharedFeatures] = {}
        self._medians: dict[int, MedianRecord] = {}
        self._executions: dict[tuple, int] = {}
        self._told = ""
        self._arrays: tuple[Any, Any, Dataset] | None = None

    @property
    def passes(self) -> Passes:
        """Through frozen blocks, by all trials of this process."""
        total = Passes()
        for shared in self._shared.values():
            total += shared.passes
        return total

    def plan_of(self, hp: keras_tuner.HyperParameters) -> Plan:
        """The plan that the space gives.

        Raises:
            SpaceError: Where it is none that can be trained.
        """
        try:
            plan = self.space(hp)
        except InputError as error:
            raise SpaceError(f"The space gave no plan: {error}") from None
        if not isinstance(plan, Plan):
            raise SpaceError(f"The space must return a tfxfer.Plan, not {type(plan).__name__}.")
        return plan

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """A model of the plan, frozen as its last stage says and compiled."""
        return self.build_plan(self.plan_of(hp))

    def build_plan(self, plan: Plan) -> keras.Model:
        """The same of a plan.

        Raises:
            SpaceError: Where it cannot be trained.
        """
        try:
            model, stage = self._model(plan), stages_of(plan)[-1]
            depth = auto_depth(self.card_of(plan)) if stage.freeze_depth == "auto" else stage.freeze_depth
            frozen_units(model, depth)
            freeze(model, depth, batch_norm="frozen" if stage.batch_norm == "auto" else stage.batch_norm)
        except InputError as error:
            raise SpaceError(f"The space gave a plan that cannot be trained: {error}") from None
        optimizer = keras.optimizers.AdamW(stage.learning_rates[0], weight_decay=stage.weight_decay)
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    def fit(
        self, hp: keras_tuner.HyperParameters, model: keras.Model, data: Any, y: Any = None, *,
        validation_data: Any = None, epochs: int | None = None, initial_epoch: int = 0,
        callbacks: Sequence[keras.callbacks.Callback] = (), verbose: Any = None,
    ) -> keras.callbacks.History:  # fmt: skip
        """Train a trial; what `tuner.search(data)` and `tuner.search(x, y, validation_data=...)` call.

        Args:
            hp: Of the trial.
            model: Of `build`.
            data: Of `tfxfer.load_data`, with a train and a validation part; the test part is not looked at. Or images
                (N, H, W, C), with `y` (N,) class numbers and `validation_data` a pair of the same.
            epochs, initial_epoch: Of the last stage, as Hyperband gives them; the plan's by default.
            callbacks: See the last stage.
            verbose: As Keras takes it; trials show nothing.

        Raises:
            keras_tuner.errors.FailedTrialError: Where its loss is no number, or memory does not suffice.
        """
        plan, data = self._of_execution(hp), self._dataset(data, y, validation_data)
        median = MedianStopping(self._median(epochs)) if self.monitor else None
        try:
            trial = run_trial(
                model, plan, self.shared(plan, data), auto_depth(self.card_of(plan)), epochs=epochs,
                initial_epoch=initial_epoch, callbacks=[*callbacks, *([median] if median else [])],
            )  # fmt: skip
        except InputError as error:
            raise SpaceError(str(error)) from None
        except NotFinite as error:
            raise self._failed(hp, plan, f"its {error}, is not a number") from None
        except (MemoryError, tf.errors.ResourceExhaustedError) as error:
            raise self._failed(hp, plan, f"memory did not suffice ({type(error).__name__})") from None
        self.records.append(Record(dict(hp.values), plan, trial, stopped_at=median.stopped_at if median else None))
        return history_of(trial.history)

    def shared(self, plan: Plan, data: Dataset) -> SharedFeatures:
        """What trials of this source at this size share on this data."""
        key = (plan.source, plan.image_size, data.fingerprint)
        if key not in self._shared:
            self._shared[key] = SharedFeatures(
                self._model(plan), training_data(data, plan), seed=plan.seed, on_progress=self._tell
            )
        return self._shared[key]

    def _dataset(self, data: Any, y: Any, validation_data: Any) -> Dataset:
        """What is trained on; of the same arrays the same object, since every trial brings them."""
        if isinstance(data, Dataset) and y is None and validation_data is None:
            return data
        if y is None or validation_data is None:
            raise SpaceError(
                "Give tuner.search a Dataset of tfxfer.load_data(...), or images and labels with validation_data, not "
                f"a {type(data).__name__}: trials share what frozen blocks compute of these images."
            )
        if self._arrays is None or self._arrays[0] is not data or self._arrays[1] is not y:
            parts = {"train": (data, y), "val": tuple(validation_data)}
            self._arrays = data, y, load_data(parts, test_fraction=0.0, near_duplicates=False)
        return self._arrays[2]

    def _model(self, plan: Plan) -> keras.Model:
        return build_model(
            self.card_of(plan), self.head, image_size=plan.image_size, dropout=plan.dropout, seed=plan.seed
        )

    def card_of(self, plan: Plan) -> Source:
        """The card of its source."""
        if plan.source not in self.cards:  # a space of the user's own may name any
            self.cards[plan.source] = get_source(plan.source)
        return self.cards[plan.source]

    def _of_execution(self, hp: keras_tuner.HyperParameters) -> Plan:
        """The plan with a seed of its own, where a trial is executed several times."""
        plan, key = self.plan_of(hp), tuple(sorted(hp.values.items()))
        number = self._executions[key] = self._executions.get(key, -1) + 1
        return dataclasses.replace(plan, seed=plan.seed + number)

    def _median(self, epochs: int | None) -> MedianRecord:
        """Trials are compared with those of the same length: their schedules differ."""
        direction = "min" if self.monitor.endswith("loss") else "max"
        return self._medians.setdefault(epochs or 0, MedianRecord(self.monitor, direction))

    def _failed(self, hp, plan: Plan, why: str) -> Exception:
        self.records.append(Record(dict(hp.values), plan, None, failed=why))
        return keras_tuner.errors.FailedTrialError(f"The trial failed: {why}.")

    def _tell(self, what: str, done: int, total: int) -> None:
        if not done or self._told != what:
            self._told = what
            self._progress.phase(what, total)
        self._progress.update(done)


def default_plan(card: Source, image_size: int | None = None, *, batch_size: int = 32, seed: int = 0) -> Plan:
    """What the default space varies: a probe, then all of the network from it."""
    recipe = with_stage(get_recipe("full"), {"learning_rates": (1e-3,)}, {})
    return Plan(
        card.name, recipe, image_size=image_size or card.image_size_px, batch_size=batch_size, seed=seed, augment="none"
    )
