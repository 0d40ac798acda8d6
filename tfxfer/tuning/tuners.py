"""KerasTuner's tuners by name, with what a search keeps around each trial."""

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras_tuner

from tfxfer.errors import InputError
from tfxfer.registry import lookup
from tfxfer.runtime.files import atomic_path
from tfxfer.tuning.hypermodel import TransferHyperModel
from tfxfer.tuning.store import Finished, TrialStore
from tfxfer.tuning.trials import history_of

TUNERS: dict[str, type[keras_tuner.Tuner]] = {
    "random": keras_tuner.RandomSearch,
    "bayesian": keras_tuner.BayesianOptimization,
    "grid": keras_tuner.GridSearch,
    "hyperband": keras_tuner.Hyperband,
}
FACTOR = 3  # Hyperband's: of so many trials the best goes on, so many times as long
STATE_FILES = ("oracle.json", "tuner0.json")


class _Watched:
    """What is mixed into a tuner: finished trials are kept, and none of them is computed twice."""

    store: TrialStore
    told: Callable[[Finished], None]
    hypermodel: TransferHyperModel

    def run_trial(self, trial: Any, *arguments: Any, **options: Any) -> Any:
        """A trial, or what is there of it: a kill may have come before KerasTuner noted its end."""
        known = self.store.read(trial.trial_id)
        if known is None:
            return super().run_trial(trial, *arguments, **options)  # type: ignore[misc]
        if known.failed:
            raise keras_tuner.errors.FailedTrialError(f"The trial failed: {known.failed}.")
        return [history_of(known.history)]

    def on_trial_end(self, trial: Any) -> None:
        if self.store.read(trial.trial_id) is None:
            found = self._finished(trial)
            self.store.write(found)
            self.told(found)
        super().on_trial_end(trial)  # type: ignore[misc]
        keep_state(Path(self.project_dir))  # type: ignore[attr-defined]

    def _finished(self, trial: Any) -> Finished:
        records = self.hypermodel.records
        record = records[-1] if records and dict(records[-1].values) == dict(trial.hyperparameters.values) else None
        plan = record.plan if record else self.hypermodel.plan_of(trial.hyperparameters)
        if record is None or record.trial is None:
            lines = (trial.message or "").strip().splitlines()
            why = record.failed if record else (lines[-1] if lines else "it gave no result")
            return Finished(trial.trial_id, dict(trial.hyperparameters.values), plan, failed=why)
        return Finished.of_trial(trial.trial_id, record.values, plan, record.trial, record.stopped_at)


def make_tuner(
    name: str,
    hypermodel: TransferHyperModel,
    objective: keras_tuner.Objective,
    folder: Path,
    *,
    trials: int,
    max_epochs: int,
    seed: int,
    may_begin: Callable[[int], bool] = lambda num_begun: True,
    told: Callable[[Finished], None] = lambda finished: None,
) -> keras_tuner.Tuner:
    """A tuner whose trials are kept in a folder; where it has some, it goes on with them.

    Args:
        name: An entry of `TUNERS`.
        hypermodel: What it searches.
        objective: What it searches for.
        folder: Of the search.
        trials: At most so many; of Hyperband, whose own plan says how many, that is the end.
        max_epochs: Of Hyperband's longest trials.
        seed: Of the choices.
        may_begin: Asked, with the number of trials that have begun, before each.
        told: Of each trial that ends.

    Raises:
        InputError: Where the name is unknown, or nothing is to be tried.
    """
    if trials < 1:
        raise InputError(f"A search needs at least one trial, not {trials}.")
    base = lookup(TUNERS, name, "tuner")
    options: dict[str, Any] = {"max_trials": trials}
    if name == "hyperband":
        options = {"max_epochs": max_epochs, "factor": FACTOR, "hyperband_iterations": iterations(trials, max_epochs)}
    own = {"store": TrialStore(folder / "trials"), "told": staticmethod(told)}
    watched: Any = type(base.__name__, (_Watched, base), own)
    restore_state(folder)
    with contextlib.redirect_stdout(sys.stderr):  # it tells of reloading
        tuner = watched(
            hypermodel, objective, directory=folder.parent, project_name=folder.name, seed=seed,
            max_consecutive_failed_trials=trials + 1, **options,
        )  # fmt: skip
    if isinstance(tuner.oracle, keras_tuner.Oracle):  # else the chief has it
        _limit(tuner.oracle, lambda begun: begun < trials and may_begin(begun))
    return tuner


def _limit(oracle: keras_tuner.Oracle, may_begin: Callable[[int], bool]) -> None:
    """Let an oracle end the search, as it does when its own trials are used up: so workers hear of it as well."""
    own = oracle.populate_space

    def populate_space(trial_id: str) -> dict[str, Any]:
        return own(trial_id) if may_begin(len(oracle.trials)) else {"status": "STOPPED"}

    oracle.populate_space = populate_space


def iterations(trials: int, max_epochs: int) -> int:
    """Rounds of Hyperband that come to at least so many trials.

    Example:
        >>> iterations(20, 9), iterations(40, 9)
        (1, 2)
    """
    brackets = int(math.log(max_epochs, FACTOR) + 1e-9) + 1
    ends = math.ceil(1 + math.log(max_epochs, FACTOR))
    each = sum(
        math.ceil(ends / (bracket + 1) * FACTOR ** (bracket - turn))
        for bracket in range(brackets)
        for turn in range(bracket + 1)
    )
    return max(1, math.ceil(trials / each))


def keep_state(folder: Path) -> None:
    """Copy KerasTuner's state, which it writes in place: a kill in the middle leaves half a file."""
    for name in STATE_FILES:
        if (folder / name).is_file():
            with atomic_path(folder / "kept" / name) as temporary:
                shutil.copyfile(folder / name, temporary)


def restore_state(folder: Path) -> None:
    """Put back the copies of what is no JSON any more."""
    for name in STATE_FILES:
        file, kept = folder / name, folder / "kept" / name
        if file.is_file() and kept.is_file() and not _is_json(file):
            with atomic_path(file) as temporary:
                shutil.copyfile(kept, temporary)
    for file in folder.glob("trial_*/trial.json"):
        if not _is_json(file):
            file.unlink()  # of a trial that had not ended


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return True
