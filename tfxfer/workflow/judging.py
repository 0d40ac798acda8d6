"""The verdict of a run: its baselines, seed by seed, and the comparison with the best of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfxfer.data import Dataset
from tfxfer.runtime.progress import Progress
from tfxfer.select.baseline import ON_PIXELS, RANDOM_FEATURES, judge_baselines, quick_baselines
from tfxfer.select.scratch import train_from_scratch
from tfxfer.specs import Plan, Source
from tfxfer.train.journal import Journal
from tfxfer.train.outcome import Outcome, TrainingData
from tfxfer.workflow.time_limit import PIXEL_SECONDS, Speed, TimeLimit

FROM_SCRATCH = "the same network from scratch"
Baselines = tuple[dict[str, np.ndarray], dict[str, Any]]


class Judge:
    """Computes the baselines of a run and compares its model with them.

    Args:
        card: The source, for its architecture.
        plan: Of the run.
        training: What training sees.
        dataset: With the test part.
        progress: Told about phases.
        limit: Of the run.
    """

    def __init__(
        self, card: Source, plan: Plan, training: TrainingData, dataset: Dataset, progress: Progress, limit: TimeLimit
    ):
        self.card, self.plan, self.training, self.progress, self.limit = card, plan, training, progress, limit
        self.test, self.pixels = dataset.part("test"), dataset.pixel_rows("test", plan.image_size)
        self._ahead: dict[int, dict[str, np.ndarray]] = {}
        self._speed: Speed | None = None

    def plan_of(self, seed: int) -> Plan:
        """The plan with another seed."""
        return dataclasses.replace(self.plan, seed=seed)

    def ahead(self, seed: int, journal: Journal, speed: Speed, solving_seconds: float) -> None:
        """The quick baselines before fine-tuning, so that what they take is known; those that fit.

        Args:
            seed: Of the baselines.
            journal: Keeps them.
            speed: Of the network.
            solving_seconds: What building the network and solving a head on its features took.
        """
        self._speed = speed
        images = len(self.training.labels)
        prices = {
            ON_PIXELS: PIXEL_SECONDS * images,
            RANDOM_FEATURES: speed.features_seconds(images + len(self.test)) + solving_seconds,
        }

        def compute():
            left_out: dict[str, str] = {}

            def wanted(name: str) -> bool:
                fits = self.limit.fits(_told(name), prices[name])
                if not fits:
                    left_out[_told(name)] = self.limit.left_out[_told(name)]
                return fits

            tables = quick_baselines(self.card, self.plan_of(seed), self.training, self.pixels, wanted=wanted)
            return tables, {"left_out": left_out}

        self.progress.phase("baselines")
        self._ahead[seed], facts = journal.memo(f"baselines, seed {seed}", compute)
        self.limit.left_out |= facts["left_out"]

    def baselines(self, seed: int, outcome: Outcome) -> Baselines:
        """Names to (M, K) probabilities on the test images, and facts about the one from scratch, where there is one.

        Args:
            seed: Of the baselines.
            outcome: Of training: how many epochs it took, and whether on mirrored images too.
        """
        plan = self.plan_of(seed)
        if seed in self._ahead:
            tables = self._ahead[seed]
        else:
            self.progress.phase("baselines")
            tables = quick_baselines(self.card, plan, self.training, self.pixels)
        if plan.baseline != "scratch":
            return tables, {}
        speed, held = self._speed, 0.0
        self.limit.release("from scratch")
        if speed is not None:
            self.limit.keep_back("scoring from scratch", speed.predict_seconds(len(self.test)))
            held = len(self.training.held) / speed.images_per_second
            if not self.limit.fits(_told(FROM_SCRATCH), speed.epoch_seconds(len(self.training.rows))):
                return tables, {}
        self.progress.phase(_told(FROM_SCRATCH))
        found = train_from_scratch(
            self.card, plan, self.training, self.pixels, transfer_epochs=len(outcome.history),
            mirror=outcome.selection.get("mirror", {}).get("used", plan.augment == "mirror"), progress=self.progress,
            rand=plan.augment == "rand",
            clock=self.limit.clock, held_seconds=held,
        )  # fmt: skip
        self.limit.release("scoring from scratch")
        facts = {"converged": found.converged, "epochs": found.epochs, "validation_log_loss": found.best_log_loss}
        return {**tables, FROM_SCRATCH: found.probabilities}, facts

    def compared(self, ours: np.ndarray, theirs: Sequence[Baselines]) -> dict[str, Any]:
        """What run.json says of the comparison.

        Args:
            ours: (S, M, K) probabilities of the model of each seed.
            theirs: What `baselines` gave for each.
        """
        tables, facts = zip(*theirs, strict=True)
        common = [name for name in tables[0] if all(name in table for table in tables)]  # time may end at any seed
        stacked = {name: np.stack([table[name] for table in tables]) for name in common}
        test = self.test
        found = judge_baselines(
            ours, stacked, test.labels, test.groups, test.weights, metric=self.plan.metric, seed=self.plan.seed
        )
        proven = all(fact.get("converged", True) for fact in facts)
        told = {"kind": self.plan.baseline, "num_seeds": len(theirs), **found, "proven": proven}
        if any(facts):
            told["scratch"] = list(facts)
        if not proven:
            told["note"] = "not proven: training from scratch had not converged when its steps or its time ran out"
        missing = [name for name in self.limit.left_out if name.startswith(_told(""))]
        if missing:
            told |= {"proven": False, "note": f"not proven: the time limit left out {', '.join(missing)}"}
        return told


def _told(name: str) -> str:
    return f"baseline: {name}"
