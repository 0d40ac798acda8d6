"""Trials that share what is frozen, chosen among on the validation part."""

import csv
import dataclasses
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras_tuner
import numpy as np

from tfxfer.data import Dataset
from tfxfer.errors import InputError
from tfxfer.metrics import score
from tfxfer.registry import lookup
from tfxfer.report.plots import Point, write_depth_plot
from tfxfer.runtime.files import write_json, write_text
from tfxfer.runtime.progress import Progress
from tfxfer.select.winner import Choice, choose_cheapest, corrected_score
from tfxfer.specs import Plan, Source
from tfxfer.train.freezing import auto_depth
from tfxfer.train.lengths import epochs_of
from tfxfer.train.loop import NotFinite
from tfxfer.tuning.hypermodel import TransferHyperModel, default_plan
from tfxfer.tuning.shared import Passes
from tfxfer.tuning.space import KEYS, Space, default_space, describe, with_stage
from tfxfer.tuning.store import Finished, TrialStore
from tfxfer.tuning.trials import run_trial
from tfxfer.tuning.tuners import TUNERS, make_tuner
from tfxfer.workflow.planning import source_of

SEARCH_FOLDER, CSV_FILE, PLOT_FILE, BEGUN_FILE = "search", "search.csv", "search.png", "begun.json"
WAIT_SECONDS = 600.0  # of a worker, for the chief to begin
TRIAL_SHARE = 0.6  # of a time limit; the rest is for finalists, the last training, export


@dataclasses.dataclass(frozen=True)
class Options:
    """How a search goes about it.

    Attributes:
        tuner: An entry of `TUNERS`.
        trials: At most so many.
        epochs: Of a trial's last stage, and of Hyperband's longest; 0: as many as the recipe says.
        finalists: Of the trials that are equal within a standard error so many are trained again; 0: none.
        repeats: Times that each of them is trained with another seed, at least 1.
        stop_early: Whether a trial behind the median of the others is stopped.
    """

    tuner: str = "hyperband"
    trials: int = 20
    epochs: int = 0
    finalists: int = 3
    repeats: int = 2
    stop_early: bool = True

    def __post_init__(self) -> None:
        lookup(TUNERS, self.tuner, "tuner")
        for name, least in (("trials", 1), ("epochs", 0), ("finalists", 0), ("repeats", 1)):
            if getattr(self, name) < least:
                raise InputError(f"The search's {name} must be at least {least}, not {getattr(self, name)}.")


class Searcher:
    """A search in a run's folder; what it has finished is found again.

    Args:
        dataset: With all three parts; of the test part nothing is looked at here.
        plan: What is not searched, and the image size.
        cards: Sources.
        folder: Of the run.
        options: How.
        space: Instead of the default one.
        keys: Of the default one.
        resume: Go on with a search that is there.
        progress: Told about trials.
        started: `time.monotonic()` that a time limit counts from.
        tries: Has the trials run by other processes.
        helps: Whether another process began the search.
    """

    def __init__(
        self, dataset: Dataset, plan: Plan, cards: Sequence[Source], folder: Path, options: Options, *,
        space: Space | None = None, keys: Sequence[str] = KEYS, resume: bool = False,
        progress: Progress | None = None, started: float | None = None, tries: Callable[[], None] | None = None,
        helps: bool = False,
    ):  # fmt: skip
        self.dataset, self.plan, self.folder, self.options = dataset, plan, folder, options
        self.progress, self.started = progress or Progress(), started if started is not None else time.monotonic()
        self.monitor = f"val_{plan.metric}"
        base = dataclasses.replace(plan, recipe=self._recipe(plan), augment="none", time_limit_seconds=0.0)
        self.space = space or default_space(base, cards, keys=keys)
        self.hypermodel = TransferHyperModel(
            cards, dataset, space=self.space, seed=plan.seed, monitor=self.monitor if options.stop_early else "",
            progress=self.progress,
        )  # fmt: skip
        self.max_epochs = options.epochs or self._epochs(base)
        self.store = TrialStore(folder / SEARCH_FOLDER / "trials")
        self._tries = tries
        self._begin(resume, helps)

    # -- the way ----------------------------------------------------------------------------------------------------

    def run(self) -> tuple[Plan, dict[str, Any]]:
        """Search; the plan of the winner, and what run.json says of the search.

        Raises:
            InputError: Where no trial gave anything.
        """
        began = time.monotonic()
        before = len(self.store.read_all())
        (self._tries or self.try_all)()
        trying = time.monotonic() - began
        trials = [found for found in self.store.read_all() if not _is_repeat(found)]
        good = [found for found in trials if not found.failed]
        if not good:
            why = f": {trials[-1].failed}" if trials else ""
            raise InputError(f"None of {len(trials)} trials gave a model{why}.")
        choice, candidates, tables = self._choose(good)
        winner = candidates[choice.chosen]
        self._write_table(trials)
        told = self._describe(trials, good, winner, choice, candidates, tables)
        told |= {"resumed_trials": before, "seconds": round(time.monotonic() - began, 2)}
        told["trial_seconds"] = round(trying, 2)
        self._plot(good, winner)
        return self._final_plan(winner), told

    def try_all(self) -> None:
        """Run all trials that are left."""
        epochs = {} if self.options.tuner == "hyperband" else {"epochs": self.max_epochs}
        self._tuner().search(self.dataset, verbose=0, **epochs)

    def _tuner(self) -> keras_tuner.Tuner:
        return make_tuner(
            self.options.tuner, self.hypermodel, keras_tuner.Objective(self.monitor, "max"),
            self.folder / SEARCH_FOLDER, trials=self.options.trials, max_epochs=self.max_epochs, seed=self.plan.seed,
            may_begin=self._may_begin, told=self._tell,
        )  # fmt: skip

    def _may_begin(self, num_begun: int) -> bool:
        """Whether the trials' share of a time limit allows one more; the first is always tried."""
        if not self._limit() or not num_begun:
            return True
        left = TRIAL_SHARE * self._limit() - (time.monotonic() - self.started)
        slowest = max((found.seconds for found in self.store.read_all()), default=0.0)
        if left > slowest:
            return True
        self.progress.note(f"no further trial: {max(left, 0.0):.1f} s are left for them, and one took {slowest:.1f} s")
        return False

    def _choose(self, good: Sequence[Finished]) -> tuple[Choice, list[Finished], list[np.ndarray]]:
        """The winner: the best of each depth, those that are equal trained again, then the cheapest of the equal."""
        part = self.dataset.part("val")

        def cheapest(candidates: Sequence[Finished], tables: Sequence[np.ndarray]) -> Choice:
            costs = [found.num_trainable for found in candidates]
            return choose_cheapest(
                part.labels, tables, costs, metric=self.plan.metric, groups=part.groups, seed=self.plan.seed
            )

        candidates = self._best_of_depths(good)
        tables: list[np.ndarray] = [_table(found) for found in candidates]
        first = cheapest(candidates, tables)
        wanted = list(dict.fromkeys((first.best, *first.equal)))[: self.options.finalists]
        if len(wanted) < 2:
            return first, candidates, tables
        candidates = [candidates[index] for index in wanted]
        tables = [self._repeated(found) for found in candidates]
        return cheapest(candidates, tables), candidates, tables

    def _best_of_depths(self, good: Sequence[Finished]) -> list[Finished]:
        best: dict[tuple[str, int], Finished] = {}
        for found in good:
            key = (found.plan.source, found.freeze_depth)
            if key not in best or found.best(self.monitor) > best[key].best(self.monitor):
                best[key] = found
        return list(best.values())

    def _repeated(self, finalist: Finished) -> np.ndarray:
        """(S, n, K): by trainings with other seeds, all of the whole length."""
        tables = []
        for number in range(1, self.options.repeats + 1):
            name = f"{finalist.trial_id}-again-{number}"
            found = self.store.read(name)
            if found is None:
                found = self._again(finalist, name, self.plan.seed + number)
                self.store.write(found)
                self._tell(found)
            if not found.failed:
                tables.append(_table(found))
        return np.stack(tables or [_table(finalist)])

    def _again(self, finalist: Finished, name: str, seed: int) -> Finished:
        plan = dataclasses.replace(finalist.plan, seed=seed)
        model = self.hypermodel.build_plan(plan)
        shared = self.hypermodel.shared(plan, self.dataset)
        values = {**finalist.values, "tuner/initial_epoch": 0}
        try:
            done = run_trial(model, plan, shared, auto_depth(self.hypermodel.card_of(plan)), epochs=self.max_epochs)
        except NotFinite as error:
            return Finished(name, values, plan, failed=f"its {error}, is not a number")
        return Finished.of_trial(name, values, plan, done)

    def _final_plan(self, winner: Finished) -> Plan:
        """As the trial was, for as many epochs."""
        recipe = with_stage(winner.plan.recipe, {"epochs": self.max_epochs, "min_steps": False, "steps": 0}, {})
        return dataclasses.replace(
            winner.plan, recipe=dataclasses.replace(recipe, name="search"), seed=self.plan.seed,
            baseline=self.plan.baseline, num_seeds=self.plan.num_seeds, metric=self.plan.metric,
            time_limit_seconds=self.plan.time_limit_seconds,
        )  # fmt: skip

    # -- what is told -------------------------------------------------------------------------------------------------

    def _describe(self, trials, good, winner: Finished, choice: Choice, candidates, tables) -> dict[str, Any]:
        part = self.dataset.part("val")
        corrected = corrected_score(
            part.labels, [_table(found) for found in good], metric=self.plan.metric, groups=part.groups,
            seed=self.plan.seed,
        )  # fmt: skip
        passes = sum((found.passes for found in self.store.read_all()), Passes())
        return {
            "tuner": self.options.tuner, "trials": len(trials), "failed": len(trials) - len(good),
            "stopped_early": sum(found.stopped_at is not None for found in good),
            "metric": self.plan.metric, "winner": winner.trial_id, "values": describe(dict(winner.values)),
            "score": corrected,
            "equal": [
                {
                    "trial": candidates[index].trial_id, "freeze_depth": candidates[index].freeze_depth,
                    "source": candidates[index].plan.source, "num_trainable": candidates[index].num_trainable,
                    "below_best": choice.differences[index], "standard_error": choice.standard_errors[index],
                    "trainings": len(tables[index]) if np.ndim(tables[index]) == 3 else 1,
                }
                for index in choice.equal
            ],
            "passes": {
                "without_sharing": passes.wanted, "computed": passes.computed,
                "seconds_without_sharing": round(passes.wanted_seconds, 2), "seconds": round(passes.seconds, 2),
                "saved_seconds": round(passes.saved_seconds, 2),
            },
        }  # fmt: skip

    def _tell(self, found: Finished) -> None:
        """A row of the table of trials."""
        values = ", ".join(f"{key} {_short(value)}" for key, value in describe(dict(found.values)).items())
        if found.failed:
            self.progress.row(f"trial {found.trial_id} failed: {found.failed}; {values}")
            return
        best = max(one.best(self.monitor) for one in self.store.read_all() if not one.failed)
        stopped = f", stopped at epoch {found.stopped_at + 1}" if found.stopped_at is not None else ""
        self.progress.row(
            f"trial {found.trial_id:<4} {self.plan.metric} {found.best(self.monitor):.3f}  best {best:.3f} "
            f"{found.seconds:6.1f} s {found.passes.saved_seconds:6.1f} s saved  {values}{stopped}"
        )

    def _write_table(self, trials: Sequence[Finished]) -> None:
        rows = [
            {
                "trial": found.trial_id, "status": "failed" if found.failed else "done",
                self.monitor: found.best(self.monitor), "val_loss": found.best("val_loss", "min"),
                "epochs": len(found.history), "stopped_at": found.stopped_at, "source": found.plan.source,
                "freeze_depth": found.freeze_depth, "num_trainable": found.num_trainable,
                "seconds": round(found.seconds, 2), "saved_seconds": round(found.passes.saved_seconds, 2),
                **{key: value for key, value in describe(dict(found.values)).items() if key != "freeze_depth"},
                "why_failed": found.failed,
            }
            for found in trials
        ]  # fmt: skip
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / CSV_FILE, text.getvalue())

    def _plot(self, good: Sequence[Finished], winner: Finished) -> None:
        part, points = self.dataset.part("val"), []
        sources = {found.plan.source for found in good}
        for found in self._best_of_depths(good):
            own = score(part.labels, _table(found), self.dataset.class_names, groups=part.groups)[self.plan.metric]
            label = found.plan.source if len(sources) > 1 else ""
            points.append(Point(found.freeze_depth, own["value"], own["low"], own["high"], label))
        dots = [(float(found.freeze_depth), found.best(self.monitor)) for found in good]
        write_depth_plot(
            self.folder / PLOT_FILE, points, others=dots, chosen=winner.freeze_depth, metric=self.plan.metric
        )

    # -- beginnings ---------------------------------------------------------------------------------------------------

    def _begin(self, resume: bool, helps: bool) -> None:
        """Note what is searched, or see that it is what was searched before."""
        hp = keras_tuner.HyperParameters()
        self.hypermodel.plan_of(hp)
        wanted = {
            "data": self.dataset.fingerprint, "space": hp.get_config()["space"], "tuner": self.options.tuner,
            "trials": self.options.trials, "epochs": self.max_epochs, "metric": self.plan.metric,
            "seed": self.plan.seed, "image_size": self.plan.image_size,
            "sources": {name: card.weights.get("sha256", "") for name, card in self.hypermodel.cards.items()},
        }  # fmt: skip
        wanted = json.loads(json.dumps(wanted))
        file = self.folder / SEARCH_FOLDER / BEGUN_FILE
        until = time.monotonic() + (WAIT_SECONDS if helps else 0.0)
        while not file.is_file() and time.monotonic() < until:  # a worker may be there before the chief
            time.sleep(0.5)
        if not file.is_file():
            if helps:
                raise InputError(f"No chief has begun a search in {self.folder} within {WAIT_SECONDS:g} s.")
            if resume:
                raise InputError(f"{self.folder} is no search that was begun; drop --resume to begin one.")
            write_json(file, wanted)
            return
        begun = json.loads(file.read_text(encoding="utf-8"))
        other = [key for key in wanted if begun.get(key) != wanted[key]]
        if other:
            told = ", ".join(f"{key} {_short(begun.get(key))}, not {_short(wanted[key])}" for key in other)
            raise InputError(
                f"The search in {self.folder} was begun with {told}; resume it as it was, or give another --out."
            )
        if not resume and not helps:
            raise InputError(f"{self.folder} is already a search; go on with it by --resume, or give another --out.")

    def _recipe(self, plan: Plan):
        """The plan's own stages at one rate; those of the default space where a table or the data's size decides."""
        if plan.recipe.by_table or plan.recipe.by_size:
            return default_plan(source_of(plan)).recipe
        return with_stage(plan.recipe, {"learning_rates": (1e-3,)}, {})

    def _epochs(self, plan: Plan) -> int:
        stage = [stage for stage in plan.recipe.stages if not stage.is_probe][-1]
        return epochs_of(stage, len(self.dataset.part("train")), plan.batch_size)

    def _limit(self) -> float:
        return self.plan.time_limit_seconds


def _table(found: Finished) -> np.ndarray:
    assert found.held_probabilities is not None
    return found.held_probabilities


def _is_repeat(found: Finished) -> bool:
    return "-again-" in found.trial_id


def _short(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
