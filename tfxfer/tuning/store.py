"""Trials of a search on disk: what a killed search has finished is there afterwards, and other workers see it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.runtime.files import atomic_path, write_json
from tfxfer.specs import Plan
from tfxfer.tuning.shared import Passes
from tfxfer.tuning.trials import Trial


@dataclasses.dataclass(frozen=True, eq=False)
class Finished:
    """A trial that has ended.

    Attributes:
        trial_id: KerasTuner's.
        values: Its hyperparameters.
        plan: That they stand for.
        failed: Why it gave nothing, or "".
        history: Of its last stage, a dict an epoch.
        stopped_at: The epoch after which it could not win any more; None where it went on to its end.
        freeze_depth: Leading blocks that were frozen.
        num_trainable: Parameters that trained.
        seconds: All of it.
        passes: Through frozen blocks.
        held_probabilities: (n, K) of the validation part, at the best epoch by loss; None where it failed.
    """

    trial_id: str
    values: Mapping[str, Any]
    plan: Plan
    failed: str = ""
    history: tuple[Mapping[str, float], ...] = ()
    stopped_at: int | None = None
    freeze_depth: int = 0
    num_trainable: int = 0
    seconds: float = 0.0
    passes: Passes = dataclasses.field(default_factory=Passes)
    held_probabilities: np.ndarray | None = None

    @classmethod
    def of_trial(
        cls, trial_id: str, values: Mapping[str, Any], plan: Plan, trial: Trial, stopped_at: int | None = None
    ) -> "Finished":
        """What a trial gave, under KerasTuner's number."""
        return cls(
            trial_id, dict(values), plan, history=tuple(trial.history), stopped_at=stopped_at,
            freeze_depth=trial.freeze_depth, num_trainable=trial.num_trainable, seconds=trial.seconds,
            passes=trial.passes, held_probabilities=trial.held_probabilities,
        )  # fmt: skip

    def best(self, name: str, direction: str = "max") -> float:
        """The best value of an epoch; NaN where it failed."""
        values = [epoch[name] for epoch in self.history if name in epoch]
        return float((max if direction == "max" else min)(values)) if values else float("nan")


class TrialStore:
    """A folder of finished trials.

    Args:
        folder: Made where it is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, found: Finished) -> None:
        """Keep a trial; the second file is what makes it count."""
        facts = {
            field.name: getattr(found, field.name)
            for field in dataclasses.fields(found)
            if field.name not in ("held_probabilities", "plan", "passes")
        }
        if found.held_probabilities is not None:
            with atomic_path(self.folder / f"{found.trial_id}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, found.held_probabilities)
        told = {**facts, "values": dict(found.values), "history": [dict(epoch) for epoch in found.history]}
        told |= {"plan": found.plan.to_dict(), "passes": dataclasses.asdict(found.passes)}
        write_json(self.folder / f"{found.trial_id}.json", told)

    def read(self, trial_id: str) -> Finished | None:
        """A trial that is there."""
        file = self.folder / f"{trial_id}.json"
        if not file.is_file():
            return None
        facts = json.loads(file.read_text(encoding="utf-8"))
        held = file.with_suffix(".npy")
        facts |= {"plan": Plan.from_dict(facts["plan"]), "passes": Passes(**facts["passes"])}
        return Finished(
            **{**facts, "history": tuple(facts["history"])},
            held_probabilities=np.load(held) if held.is_file() else None,
        )

    def read_all(self) -> list[Finished]:
        """All that are there, by their number."""
        return [found for file in sorted(self.folder.glob("*.json")) if (found := self.read(file.stem)) is not None]
