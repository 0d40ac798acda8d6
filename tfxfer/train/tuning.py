"""Fine-tuning from the probe: the rate by measurement, the blend, the comparison with the probe, the refit."""

import time
from collections.abc import Callable, Sequence

import keras
import numpy as np

from tfxfer.errors import CheckError
from tfxfer.features.cut import Cut
from tfxfer.features.extract import Extracted
from tfxfer.features.solvers import LinearHead, best_temperature, log_softmax
from tfxfer.methods.fine_tune import interpolate
from tfxfer.methods.probe import Probe
from tfxfer.metrics import metric_value, paired_difference
from tfxfer.model.freeze import Depth
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Stage
from tfxfer.train.budget import Pace, StagePlan, Work, planned_rates
from tfxfer.train.clock import Clock, StopOnTime
from tfxfer.train.distribute import Devices
from tfxfer.train.forgetting import SourceHead
from tfxfer.train.journal import Journal
from tfxfer.train.lengths import epochs_of, scale_of
from tfxfer.train.loop import NotFinite, SuffixTrainer, Trained
from tfxfer.train.measure import measured_plan
from tfxfer.train.outcome import Outcome, TrainingData
from tfxfer.train.rates import LOWEST, NUM_STEPS, RateTest, measure_rates
from tfxfer.train.trainers import StageTrainers

BLEND_SHARES = (0.25, 0.5, 0.75, 1.0)


class OutOfTime(Exception):
    """The time limit came before all folds were trained."""


class Tuner:
    """Runs the fine-tuning stages of a recipe and decides on held-out images what is kept.

    Args:
        model: Its freeze state and the weights of the suffix are set.
        cut: Of the model, at the shallowest stage's depth or before it.
        extracted: What crosses the cut, for all images.
        data: Labels, weights, groups, parts.
        plan: Metric, batch size, seed.
        stages, freezing: The stages, and what each freezes as `freeze` takes it.
        probe: The convex stage's, or None.
        splits: Pairs (train rows, held-out rows) that decisions are made on.
        outcome: Decisions, history and seconds are written into it.
        clock, progress, callbacks, on_model, journal, devices, source_head: As `run_stages` takes them.
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
        probe: Probe | None,
        splits: list[tuple[np.ndarray, np.ndarray]],
        outcome: Outcome,
        *,
        clock: Clock,
        progress: Progress,
        callbacks: Sequence[keras.callbacks.Callback],
        on_model: Callable[[str], None],
        journal: Journal,
        devices: Devices,
        source_head: SourceHead | None = None,
    ):
        self.model, self.cut, self.extracted, self.data, self.plan = model, cut, extracted, data, plan
        self.stages, self.freezing, self.probe, self.splits, self.outcome = stages, freezing, probe, splits, outcome
        self.clock, self.progress, self.callbacks, self.on_model = clock, progress, tuple(callbacks), on_model
        self.journal = journal
        self.trainers = StageTrainers(
            model, cut, extracted, data, plan, stages, freezing, outcome,
            clock=clock, progress=progress, journal=journal, devices=devices, source_head=source_head,
        )  # fmt: skip
        self._num_units = 0
        self.judged = np.concatenate([held for _, held in splits])
        self._temperature = 1.0
        # Models of folds were trained to decide only; one that was judged on the validation part goes on.
        self._goes_on = len(splits) == 1
        self._refit_seconds = 0.0
        self._watch = StopOnTime(clock)

    def tune(self) -> None:
        """Fine-tune, and leave in the model what is surely better: the probe, the fine-tuned weights, or a blend."""
        cut = self.cut
        origin = cut.suffix.get_weights()
        kept = _with_head(origin, self.probe.head(self.data.all_rows), 1.0) if self.probe else origin
        best = kept
        try:
            starts = [self._start(origin, rows) for rows, _ in self.splits]
            rounds, ends = [], list(starts)
            for index, stage in enumerate(self.stages):
                trainer = self.trainers.make(index)
                if index == 0:
                    trainer = self.trainers.in_precision(trainer, starts[0], self.splits[0][0], self._epochs(stage))
                plan, pace = self._planned(trainer, index)
                if plan.left_out:
                    break
                chosen, runs = self._measure(trainer, stage, ends, plan)
                rounds.append({"trainer": trainer, "index": index, "plan": plan, "pace": pace, **chosen})
                ends = [run.weights for run in runs]
            if not rounds:
                return
            share = self._choose(rounds[-1]["trainer"], self.splits, starts[: len(ends)], ends)
            if share is None:
                return
            if self._goes_on:
                best = self._kept(self._cooled(interpolate(starts[0], ends[0], share)), share)
            refitted = self._refit(origin, rounds, ends, share)
            if refitted is not None:
                best = self._kept(refitted, share)
        except OutOfTime:  # folds that were not trained cannot be judged
            self.outcome.selection["fine_tune_against_probe"] = "left out: the time limit did not allow all folds"
        finally:
            cut.suffix.set_weights(best)
            if best is not kept:
                self.on_model("fine_tune")

    def _kept(self, weights, share: float) -> list[np.ndarray]:
        """Note that these weights replace the probe; models of folds that end without a refit replace nothing."""
        self.outcome.chosen = "fine_tune" if share == 1.0 else "blend"
        self.outcome.held, self.outcome.held_probabilities = self.judged, self._tuned
        return weights

    def _planned(self, trainer: SuffixTrainer, number: int) -> tuple[StagePlan, Pace]:
        """What of a stage fits into the time that is left, by what a step takes; all of it where there is no limit."""
        stage = self.stages[number]
        if not self.clock.limited:
            every = len(stage.learning_rates), len(self.splits)
            return StagePlan(self._epochs(stage), *every, True, 0.0, 0.0), Pace(0.0, 0.0)

        def measured():
            self.progress.phase(f"{stage.name}, measuring a step")
            works = [self._work(later) for later in self.stages[number:]]
            return {}, measured_plan(
                trainer, works, self.splits, self.clock,
                later_seconds=self._refit_seconds, compile_seconds=self.outcome.graph_seconds, seed=self.plan.seed,
            )  # fmt: skip

        _, facts = self.journal.memo(f"plan of stage {number + 1}, {stage.name}", measured)
        self.outcome.selection.setdefault("time_plan", []).append({"stage": stage.name, **facts})
        plan, pace, told = StagePlan(**facts["plan"]), Pace(**facts["pace"]), facts["told"]
        if plan.left_out:
            self.clock.stopped = True
            self.outcome.left_out[stage.name] = told
            self.progress.note(f"left out: {stage.name}, {told}")
            return plan, pace
        self.progress.note(f"{stage.name}: {told}")
        self._watch = StopOnTime(self.clock, pace.held_seconds * len(self.splits[0][1]))
        self._keep_folds(plan.num_folds)
        if not self._goes_on:
            self._refit_seconds += plan.refit_seconds
        return plan, pace

    def _work(self, stage: Stage) -> Work:
        return Work(
            epochs=self._epochs(stage), num_rates=1 if stage.find_rate else len(stage.learning_rates),
            num_test_steps=2 * NUM_STEPS if stage.find_rate else 0,  # each batch is also compared with the start
            folds=[(len(rows), len(held)) for rows, held in self.splits], num_all=len(self.data.all_rows),
            batch_size=self.plan.batch_size, goes_on=self._goes_on, recompiles=len(self.stages) > 1,
        )  # fmt: skip

    def _keep_folds(self, count: int) -> None:
        """Judge on the first folds only."""
        self.splits = self.splits[:count]
        self.judged = np.concatenate([held for _, held in self.splits])

    def _measure(self, trainer, stage, starts, plan: StagePlan) -> tuple[dict, list[Trained]]:
        """Train once on each split, at the rate that was best on the first."""
        epochs, began = plan.epochs, time.monotonic()
        runs = [self._best_rate(trainer, stage, starts[0], plan)]
        rate = runs[0].learning_rate
        for index in range(1, len(self.splits)):
            if self.clock.expired():
                raise OutOfTime
            self.progress.phase(f"{stage.name}, fold {index + 1} of {len(self.splits)}")
            runs.append(self._run(trainer, stage, index, starts[index], rate, epochs))
        used = int(np.median([run.epochs for run in runs]))
        self.outcome.selection[stage.name] |= {
            "learning_rate": rate,
            "epochs": epochs,
            "best_epoch": used,
            "loss": _told(float(np.mean([run.loss for run in runs]))),
        }
        if self.clock.limited:
            self.outcome.selection["time_plan"][-1]["seconds"] = time.monotonic() - began
        speed = max(run.seconds_per_image for run in runs)
        return {"stage": stage, "rate": rate, "epochs": epochs, "used": used, "seconds_per_image": speed}, runs

    def _best_rate(self, trainer, stage, start, plan: StagePlan) -> Trained:
        """Whole runs on the first split, from the highest rate down, until one is no better than the one before.

        Short runs would not tell: high rates lose at first and win in the end.
        """
        best: Trained | None = None
        losses = {}
        found = self._found_rate(trainer, stage, start) if stage.find_rate else None
        own = [rate * scale_of(stage, self.plan.batch_size) for rate in stage.learning_rates]
        for rate in planned_rates(own, plan.num_rates) if found is None else [found["rate"]]:
            self.progress.phase(f"{stage.name}, learning rate {rate:g}")
            run = self._run(trainer, stage, 0, start, rate, plan.epochs, self.callbacks)
            self._log(stage.name, run)
            losses[f"{rate:g}"] = _told(run.loss)
            if best is not None and np.isfinite(best.loss) and not run.loss < best.loss:
                break
            best = run
            if self.clock.expired():
                break
        self.outcome.selection[stage.name] = {"rates": losses, **({} if found is None else {"found": found})}
        assert best is not None  # a stage has at least one rate
        return best

    def _found_rate(self, trainer, stage, start) -> dict[str, float]:
        """The rate that a range test suggests, and how it came to it."""
        self.progress.phase(f"{stage.name}, learning-rate range test")
        trainer.start = start
        self._num_units += 1

        def measure():
            try:
                return measure_rates(trainer, self.splits[0][0], seed=self.plan.seed, stop=self.clock.expired)
            except NotFinite as error:
                raise CheckError(error.told(self.data.names, LOWEST)) from None

        with self.outcome.timed("find_rate"):
            arrays, _ = self.journal.memo(f"{self._num_units}, {stage.name}, range test", measure)
        test = RateTest(stage.name, **arrays)
        self.outcome.rate_tests.append(test)
        told = ", ".join(f"{name} {rate:.2g}" for name, rate in test.suggestions.items())
        self.progress.note(f"{stage.name}: range test over {len(test.rates)} steps, {told}")
        return test.suggestions

    def _run(self, trainer, stage, index: int, start, rate: float, epochs: int, callbacks=()) -> Trained:
        rows, held = self.splits[index]
        return self._trained(
            f"{stage.name}, fold {index}, rate {rate:g}", "fine_tune", trainer, start, rows, rate, held=held,
            epochs=epochs, seed=self.plan.seed, callbacks=callbacks,
        )  # fmt: skip

    def _trained(
        self, unit: str, phase: str, trainer, start, rows, rate, *, epochs, callbacks, stop_after=None, **options
    ) -> Trained:
        """One run, or what the journal has of it."""
        trainer.start = start
        # Numbered, since stages may share a name; a resumed run walks the same units in the same order.
        self._num_units += 1
        unit = f"{self._num_units}, {unit}"
        first = len(self.outcome.history)
        self._watch = StopOnTime(self.clock, self._watch.held_seconds if "held" in options else 0.0)
        watch = [self._watch, _Epochs(self.progress, first, stop_after or epochs)]

        def work(open_unit):
            try:
                return trainer.run(
                    rows, rate, epochs=epochs, stop_after=stop_after, first_epoch=first, watch=watch,
                    callbacks=callbacks, unit=open_unit, **options,
                ).state()  # fmt: skip
            except NotFinite as error:
                raise CheckError(error.told(self.data.names, rate)) from None

        with self.outcome.timed(phase):
            return Trained.of_state(*self.journal.run(unit, work))

    def _epochs(self, stage: Stage) -> int:
        return epochs_of(stage, len(self.splits[0][0]), self.plan.batch_size)

    def _choose(self, trainer, splits, starts, ends) -> float | None:
        """The share of the blend, by held-out log loss; None where it is not surely better than the probe."""
        self.clock.release("choosing")
        data, scores = self.data, {}
        labels, weights = data.labels[self.judged], data.weights[self.judged]
        for share in BLEND_SHARES if self.probe else (1.0,):
            parts = []
            for (_, held), start, end in zip(splits, starts, ends, strict=True):
                trainer.set_weights(interpolate(start, end, share))
                parts.append(trainer.log_probabilities(held))
            scores[share] = np.concatenate(parts)
        # Label smoothing leaves a model too unsure, a small set too sure; a temperature makes the shares comparable.
        found = {share: best_temperature(table, labels, weights) for share, table in scores.items()}
        share = min(found, key=lambda share: found[share][1])
        self._temperature = found[share][0]
        tuned = self._tuned = np.exp(log_softmax(scores[share] / self._temperature))
        self.outcome.selection["blend"] = {
            "log_loss": {str(key): loss for key, (_, loss) in found.items()},
            "share": share,
            "temperature": self._temperature,
        }
        if self.probe and self.outcome.held_probabilities is not None:
            groups = [data.groups[row] for row in self.judged]
            probed = self.outcome.held_probabilities[: len(self.judged)]  # of the folds that were trained
            gain = paired_difference(
                tuned,
                probed,
                labels,
                metric=self.plan.metric,
                groups=groups,
                seed=self.plan.seed,
            )
            wins = gain["difference"] > gain["standard_error"]
            self.outcome.selection["fine_tune_against_probe"] = {
                "metric": self.plan.metric,
                "probe": metric_value(self.plan.metric, labels, probed),
                "fine_tuned": metric_value(self.plan.metric, labels, tuned),
                **gain,
                "replaces_probe": bool(wins),
            }
            if not wins:
                return None
        return share

    def _refit(self, origin, rounds, ends, share: float) -> list[np.ndarray] | None:
        """The same decisions on train and validation part together; None where the time does not allow it.

        A model that was judged on the validation part goes on from where it is, at a third of the rate and for a
        third of the epochs; models of folds were trained to decide only, so all stages start again from the probe.
        """
        rows = self.data.all_rows
        start, goes_on = self._start(origin, rows), self._goes_on
        end, began = ends[0] if goes_on else start, time.monotonic()
        for chosen in rounds[-1 if goes_on else 0 :]:
            stage, rate, epochs, stop_after = chosen["stage"], chosen["rate"], chosen["epochs"], chosen["used"]
            if goes_on:
                rate, epochs, stop_after = rate / 3, max(2, round(stop_after / 3)), None
            self.progress.phase(f"{stage.name}, refit on train and validation part")
            steps = -(-len(rows) // self.plan.batch_size)
            epoch_seconds = max(len(rows) * chosen["seconds_per_image"], steps * chosen["pace"].step_seconds)
            run, seconds = None, (stop_after or epochs) * epoch_seconds
            if chosen["plan"].refit and self.clock.remaining() > seconds:
                # With one stage the freeze state is still its own, and so is the compiled step.
                trainer = chosen["trainer"] if len(rounds) == 1 else self.trainers.make(chosen["index"])
                run = self._trained(
                    f"{stage.name}, refit", "refit", trainer, end, rows, rate,
                    epochs=epochs, stop_after=stop_after, seed=self.plan.seed + 1, callbacks=self.callbacks,
                )  # fmt: skip
            if run is None or self._watch.stopped:
                self.outcome.selection["refit"] = "left out: the time limit did not allow it"
                self.outcome.left_out["the refit on train and validation part"] = "the time limit did not allow it"
                return None
            self._log(f"{stage.name} (refit)", run)
            end = run.weights
        if self.clock.limited:
            self.outcome.selection["time_plan"][-1]["refit_seconds"] = time.monotonic() - began
        self.outcome.selection["refit"] = "train and validation part"
        return self._cooled(interpolate(start, end, share))

    def _start(self, origin, rows) -> list[np.ndarray]:
        if not self.probe:
            return origin
        return _with_head(origin, self.probe.head(rows), self.probe.temperature)

    def _cooled(self, weights) -> list[np.ndarray]:
        return [*weights[:-2], weights[-2] / self._temperature, weights[-1] / self._temperature]

    def _log(self, stage: str, run: Trained) -> None:
        self.outcome.history += [{"stage": stage, **entry} for entry in run.history]


def _with_head(weights, head: LinearHead, temperature: float) -> list[np.ndarray]:
    return [*weights[:-2], head.kernel / temperature, head.bias / temperature]


def _told(loss: float) -> float | None:
    """For JSON, which has no infinity: None where a rate was so high that its loss was no number."""
    return loss if np.isfinite(loss) else None


class _Epochs(keras.callbacks.Callback):
    def __init__(self, progress: Progress, first: int, epochs: int):
        super().__init__()
        self.progress, self.first, self.epochs = progress, first, epochs

    def on_epoch_end(self, epoch, logs=None):
        self.progress.update(epoch - self.first + 1, self.epochs)
