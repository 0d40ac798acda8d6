"""The trainers of a recipe's stages: where each is cut, what it is pulled to, what it is computed in."""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np

from tfxfer.errors import CheckError
from tfxfer.features.cut import Cut, cut_model
from tfxfer.features.deeper import go_deeper
from tfxfer.features.extract import Extracted
from tfxfer.methods.optimizers import blockwise_factors
from tfxfer.model.freeze import Depth, freeze, leading_blocks
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Stage
from tfxfer.train.clock import Clock
from tfxfer.train.distribute import Devices
from tfxfer.train.forgetting import SourceHead, make_regularizer
from tfxfer.train.journal import Journal
from tfxfer.train.loop import NotFinite, SuffixTrainer
from tfxfer.train.outcome import Outcome, TrainingData
from tfxfer.train.precision import choose_precision

# What these may take of the time that is left: both only make training quicker.
DEEPER_SHARE, PRECISION_SHARE = 0.2, 0.1
STEP_PASSES = 3  # a training step in passes forward


class StageTrainers:
    """Makes the trainer of each stage.

    Args:
        model, cut, extracted, data, plan, stages, freezing, outcome, clock, progress, journal, devices, source_head: As
            `Tuner` takes them.
    """

    def __init__(
        self,
        model: keras.Model,
        cut: Cut,
        extracted: Extracted,
        data: TrainingData,
        plan: Plan,
        stages: Sequence[Stage],
        freezing: Sequence[Depth],
        outcome: Outcome,
        *,
        clock: Clock,
        progress: Progress,
        journal: Journal,
        devices: Devices,
        source_head: SourceHead | None,
    ):
        self.model, self.cut, self.extracted, self.data, self.plan = model, cut, extracted, data, plan
        self.stages, self.freezing, self.outcome = stages, freezing, outcome
        self.clock, self.progress, self.journal = clock, progress, journal
        self.devices, self.source_head = devices, source_head
        weights = cut.suffix.weights if any(stage.regularizer == "l2_sp" for stage in stages) else ()
        self._source_weights = {id(variable): variable.numpy() for variable in weights}
        self._deeper: dict[int, tuple[Cut, Extracted] | None] = {}
        self._too_dear: dict[int, str] = {}  # depths at which the time limit did not allow a cut, and why

    def make(self, index: int) -> SuffixTrainer:
        """The trainer of a stage; what the model freezes is then as this stage has it."""
        stage = self.stages[index]
        freeze(self.model, self.freezing[index], batch_norm=stage.batch_norm, parameters=stage.parameters)
        regularizer = make_regularizer(
            stage, self.model, self._source_weights, self.source_head, self.extracted, self.data.labels
        )
        cut, extracted = self._cut_for(index)
        return SuffixTrainer(
            cut.suffix, extracted, self.data.labels, self.data.weights, stage, self.plan.batch_size,
            factors=blockwise_factors(self.model, stage.layer_decay) if stage.layer_decay < 1 else None,
            regularizer=regularizer,
            devices=self.devices, kept=self.cut.suffix.weights,
        )  # fmt: skip

    def _cut_for(self, index: int) -> tuple[Cut, Extracted]:
        """Where a stage is cut: behind what neither it nor a stage before it trains."""
        if len(self.stages) == 1:
            return self.cut, self.extracted
        depth = min(leading_blocks(self.model, depth) for depth in self.freezing[: index + 1])
        same = cut_model(self.model, self.cut.depth)
        assert same is not None  # it could be cut there before
        name = self.stages[index].name
        if depth not in self._deeper:
            self.progress.phase(f"{name}, what crosses behind {depth} blocks")
            self._deeper[depth] = None
            if self._affords(depth):
                with self.outcome.timed("features"):
                    self._deeper[depth] = go_deeper(self.model, same, depth, self.extracted)
        found = self._deeper[depth]
        if depth in self._too_dear:
            self.outcome.cache.setdefault("not_deeper", {})[name] = self._too_dear[depth]
        if found is None:
            return same, self.extracted
        shapes = [list(shape) for shape in found[1].activations.shapes]
        self.outcome.cache.setdefault("deeper", {})[name] = {"blocks": depth, "shapes": shapes}
        cut = cut_model(self.model, depth)  # anew: flags of layers count when it is made
        assert cut is not None
        return cut, found[1]

    def _affords(self, depth: int) -> bool:
        """Whether to compute what crosses there takes no more than its share of the time left."""
        if not self.clock.limited or depth <= self.cut.depth or self.extracted.fresh_features is not None:
            return True

        def decide():
            num_images = len(self.data.labels) * len(self.extracted.views)
            seconds, left = self._seconds(num_graphs=1, num_images=num_images), max(self.clock.remaining(), 0.0)
            told = f"what crosses behind {depth} blocks takes about {seconds:.1f} s, and {left:.1f} s are left"
            return {}, {"fits": seconds <= DEEPER_SHARE * left, "told": told}

        _, facts = self.journal.memo(f"whether to cut behind {depth} blocks", decide)
        if not facts["fits"]:
            self._too_dear[depth] = facts["told"]
            self.progress.note(f"trained from behind {self.cut.depth} blocks: {facts['told']}")
        return facts["fits"]

    def _seconds(self, *, num_graphs: int, num_images: int) -> float:
        """Of tracing so many graphs of the network, and of so many images through it once."""
        return num_graphs * self.outcome.graph_seconds + num_images / max(self.outcome.images_per_second, 1e-9)

    def in_precision(
        self, trainer: SuffixTrainer, start: list[np.ndarray], rows: np.ndarray, num_epochs: int
    ) -> SuffixTrainer:
        """The trainer in what all stages are computed in: what was asked for, or what is quicker here."""
        asked = self.plan.precision
        made = {"float32": trainer}

        def other(precision: str) -> SuffixTrainer:
            if precision not in made:
                self.devices = dataclasses.replace(self.devices, precision=precision)
                made[precision] = self.make(0)
                made[precision].start = start
            return made[precision]

        def too_dear(num_steps: int) -> str:
            if not self.clock.limited:
                return ""
            # Of both precisions, a graph of the step forward and backward.
            num_images = 2 * num_steps * self.plan.batch_size * STEP_PASSES
            seconds = self._seconds(num_graphs=2 * STEP_PASSES, num_images=num_images)
            left = max(self.clock.remaining(), 0.0)
            if seconds <= PRECISION_SHARE * left:
                return ""
            return f"{left:.1f} s are left, too few to measure another, which takes about {seconds:.1f} s"

        def measure():
            steps = num_epochs * -(-len(rows) // self.plan.batch_size)
            try:
                found = choose_precision(
                    self.model, trainer, other, rows, steps, seed=self.plan.seed, too_dear=too_dear
                )
            except NotFinite as error:
                raise CheckError(error.told(self.data.names, max(self.stages[0].learning_rates))) from None
            return {}, dataclasses.asdict(found)

        trainer.start = start
        if asked == "auto":
            with self.outcome.timed("choose_precision"):
                _, facts = self.journal.memo("precision", measure)
        else:
            facts = {"used": asked, "why": "asked for"}
        self.outcome.selection["precision"] = facts
        chosen = other(facts["used"])
        self.devices = dataclasses.replace(self.devices, precision=facts["used"])
        chosen.show_optimizer()
        return chosen
