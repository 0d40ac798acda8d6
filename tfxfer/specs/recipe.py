"""One step of a recipe, and the recipe."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from tfxfer.specs.base import Spec, need

BATCH_NORM_STATES = ("frozen", "affine", "adapt", "train")
PROBE_SOLVERS = ("convex", "ridge", "prototype")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "slanted", "steps")  # functions of these names stand in `tfxfer.methods.schedule`
PARAMETERS = ("all", "affine")
# With the strength of their papers.
REGULARIZERS = {"l2_sp": 0.1, "lwf": 1.0, "co_tuning": 2.3}


@dataclasses.dataclass(frozen=True)
class Stage(Spec):
    """One step of a recipe.

    Attributes:
        name: For logs and tables.
        solver: A head on frozen features, to its optimum: "convex" (regularised logistic regression), "ridge"
            (regression of one-hot labels) or "prototype" (class means). Or a training, step by step, by "adamw" or
            "sgd" (momentum 0.9).
        freeze_depth: Leading blocks frozen: a count, a share strictly between 0 and 1, a block name (inclusive), "all",
            or "auto" (the card's); or "re:PATTERN", any blocks and layers with such names.
        epochs: Passes over the training part, at least 1; 0 where a head is solved.
        learning_rates: Peak rates measured from the highest down until one is no better; one value is used as it is.
        find_rate: A range test finds the rate, instead of `learning_rates`.
        warmup_share: Share of the steps that the rate climbs.
        schedule: Of the rate afterwards: "cosine" (to zero), "slanted" (in a straight line to 1/32, where it began), or
            "steps" (a tenth of it from each of `decay_at` on).
        decay_at: Shares of the steps, rising, in (0, 1).
        steps: The length in steps, rounded up to whole epochs; 0: `epochs` says it.
        reference_batch_size: What `learning_rates` and `steps` are meant for; with batches of another size the rate
            goes in proportion and the steps against it, so that as many images are seen. 0: for any size.
        patience: Epochs without a better held-out loss after which a run stops; 0: it goes on to its end. The weights
            of the best epoch are kept in any case.
        weight_decay: Decoupled; kernels only.
        label_smoothing: In [0, 1).
        batch_norm: State of BatchNorm in trained blocks: "frozen", "affine", "adapt" or "train"; "auto": "frozen",
            unless the recipe's table says another. "adapt" comes once, before the probe and all stages.
        parameters: What trains in trained blocks: "all", or "affine": bias, and gamma and beta of normalisations.
        min_steps: Give small data more epochs, so that a stage has at least 100 steps.
        layer_decay: In (0, 1]; each block learns at this share of the rate of the one behind it, the head at the whole.
        average: In [0, 1); above 0 the weights kept are a moving average with this decay.
        mixup, cutmix: The alpha of their Beta distribution, 0 for none; of both, each batch gets one. Where blocks are
            frozen, what crosses the boundary is mixed, not pixels.
        regularizer: Against forgetting what the source knows: "l2_sp" (weights are drawn to the source's, the head to
            zero, and there is no weight decay), "lwf" (the source's own output keeps what it said of the images) or
            "co_tuning" (it learns the source's classes that go with each class); "" for none.
        regularizer_strength: What it is multiplied by, at least 0; by default the paper's: 0.1, 1 and 2.3.
        clip_norm: Gradients are scaled down to this norm; 0: never.
        micro_batches: A batch is computed in so many parts, which takes as much less memory.
    """

    what: ClassVar[str] = "stage"
    name: str
    solver: str = "adamw"
    freeze_depth: int | float | str = "auto"
    epochs: int = 6
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    find_rate: bool = False
    warmup_share: float = 0.2
    schedule: str = "cosine"
    decay_at: tuple[float, ...] = (0.3, 0.6, 0.9)
    steps: int = 0
    reference_batch_size: int = 0
    patience: int = 4
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    batch_norm: str = "frozen"
    parameters: str = "all"
    min_steps: bool = True
    layer_decay: float = 1.0
    average: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    regularizer: str = ""
    regularizer_strength: float | None = None
    clip_norm: float = 1.0
    micro_batches: int = 1

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        solvers = (*PROBE_SOLVERS, *OPTIMIZERS)
        need(self.solver in solvers, f"{where}: solver must be one of {', '.join(solvers)}, not {self.solver!r}.")
        need(self.epochs >= (not self.is_probe), f"{where}: epochs must be at least 1, not {self.epochs}.")
        rates = ", ".join(map(str, self.learning_rates)) or "none"
        need(
            bool(self.learning_rates) and all(0 < rate < 10 for rate in self.learning_rates),
            f"{where}: learning rates must lie between 0 and 10, not {rates}.",
        )
        need(0 <= self.warmup_share < 1, f"{where}: warmup_share must lie in [0, 1).")
        need(0 <= self.label_smoothing < 1, f"{where}: label_smoothing must lie in [0, 1).")
        need(self.weight_decay >= 0, f"{where}: weight_decay must not be negative.")
        need(0 < self.layer_decay <= 1, f"{where}: layer_decay must lie in (0, 1], not {self.layer_decay}.")
        need(0 <= self.average < 1, f"{where}: average must lie in [0, 1), not {self.average}.")
        need(min(self.mixup, self.cutmix) >= 0, f"{where}: mixup and cutmix must not be negative.")
        self._check_regularizer(where)
        need(self.clip_norm >= 0, f"{where}: clip_norm must be at least 0, not {self.clip_norm}.")
        need(self.micro_batches >= 1, f"{where}: micro_batches must be at least 1, not {self.micro_batches}.")
        need(
            self.layer_decay == 1 or self.solver != "sgd",
            f"{where}: layer_decay is for solver 'adamw'; drop it, or change the solver.",
        )
        need(
            self.schedule in SCHEDULES,
            f"{where}: schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}.",
        )
        need(
            list(self.decay_at) == sorted(self.decay_at) and all(0 < share < 1 for share in self.decay_at),
            f"{where}: decay_at must be rising shares between 0 and 1, not {list(self.decay_at)}.",
        )
        need(
            min(self.steps, self.reference_batch_size, self.patience) >= 0,
            f"{where}: steps, reference_batch_size and patience must not be negative.",
        )
        need(
            self.parameters in PARAMETERS,
            f"{where}: parameters must be one of {', '.join(PARAMETERS)}, not {self.parameters!r}.",
        )
        need(
            self.batch_norm in (*BATCH_NORM_STATES, "auto"),
            f"{where}: batch_norm must be one of {', '.join(BATCH_NORM_STATES)}, not {self.batch_norm!r}.",
        )

    def _check_regularizer(self, where: str) -> None:
        name, strength = self.regularizer, self.regularizer_strength
        need(
            name in ("", *REGULARIZERS),
            f"{where}: regularizer must be one of {', '.join(REGULARIZERS)}, or empty for none, not {name!r}.",
        )
        need(
            strength is None or (bool(name) and isinstance(strength, int | float) and 0 <= strength < float("inf")),
            f"{where}: regularizer_strength must be a number of at least 0, and beside a regularizer.",
        )
        need(not (name and self.is_probe), f"{where}: a probe moves no weights, so a regularizer would do nothing.")
        need(
            name != "lwf" or not (self.mixup or self.cutmix),
            f"{where}: regularizer 'lwf' keeps the source's output for each image, and has none for mixed ones; drop "
            "mixup and cutmix, or give 'co_tuning' or 'l2_sp'.",
        )

    @property
    def strength(self) -> float:
        """Of the regularizer; 0 where there is none."""
        if self.regularizer_strength is None:
            return REGULARIZERS.get(self.regularizer, 0.0)
        return self.regularizer_strength

    @property
    def needs_source_head(self) -> bool:
        """Whether the source's own output takes part."""
        return self.regularizer in ("lwf", "co_tuning") and self.strength > 0

    @property
    def is_probe(self) -> bool:
        """Whether it solves a head on frozen features, and trains nothing step by step."""
        return self.solver in PROBE_SOLVERS


@dataclasses.dataclass(frozen=True)
class Recipe(Spec):
    """A name and its stages, in order.

    Attributes:
        name: For tables.
        stages: A probe first or none, then any number of others.
        by_table: Whether the table in `tfxfer.train.auto` says, by the data, which probe there is and what of the one
            fine-tuning stage; what in that stage is not as the recipe "auto" has it is asked for, and wins.
        by_size: Whether `tfxfer.train.bit` says, by the number of images, how many steps there are, where the rate
            falls, and whether images are mixed; and by their size which image size is the default.
    """

    what: ClassVar[str] = "recipe"
    name: str
    stages: tuple[Stage, ...]
    by_table: bool = False
    by_size: bool = False

    def __post_init__(self) -> None:
        need(isinstance(self.stages, list | tuple), f"recipe {self.name!r}: stages must be a list of tables.")
        stages = tuple(Stage.from_dict(stage) if isinstance(stage, Mapping) else stage for stage in self.stages)
        object.__setattr__(self, "stages", stages)
        need(bool(stages), f"recipe {self.name!r} has no stage.")
        need(all(isinstance(s, Stage) for s in stages), f"recipe {self.name!r}: each stage must be a table.")
        need(
            not any(stage.is_probe for stage in stages[1:]),
            f"recipe {self.name!r}: a stage that solves a head can only be the first.",
        )
        need(
            not self.by_table or [stage.is_probe for stage in stages] == [True, False],
            f"recipe {self.name!r}: by_table needs a probe and one fine-tuning stage.",
        )
