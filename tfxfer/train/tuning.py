"""Fine-tuning from the probe: the rate by measurement, the blend, the comparison with the probe, the refit."""

from collections.abc import Callable, Sequence

import keras
import numpy as np

from tfxfer.errors import CheckError
from tfxfer.features.cut import Cut, cut_model
from tfxfer.features.extract import Extracted
from tfxfer.features.solvers import LinearHead, best_temperature, log_softmax
from tfxfer.methods.fine_tune import interpolate
from tfxfer.methods.optimizers import blockwise_factors
from tfxfer.methods.probe import Probe
from tfxfer.metrics import metric_value, paired_difference
from tfxfer.model.freeze import Depth, freeze
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Stage
from tfxfer.train.clock import Clock, StopOnTime
from tfxfer.train.journal import Journal
from tfxfer.train.loop import NotFinite, SuffixTrainer, Trained
from tfxfer.train.outcome import Outcome, TrainingData

MIN_STEPS = 100
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
        clock, progress, callbacks, on_model, journal: As `run_stages` takes them.
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
    ):
        self.model, self.cut, self.extracted, self.data, self.plan = model, cut, extracted, data, plan
        self.stages, self.freezing, self.probe, self.splits, self.outcome = stages, freezing, probe, splits, outcome
        self.clock, self.progress, self.callbacks, self.on_model = clock, progress, tuple(callbacks), on_model
        self.journal = journal
        self._num_units = 0
        self.judged = np.concatenate([held for _, held in splits])
        self._temperature = 1.0

    def tune(self) -> None:
        """Fine-tune, and leave in the model what is surely better: the probe, the fine-tuned weights, or a blend."""
        cut, splits = self.cut, self.splits
        origin = cut.suffix.get_weights()
        kept = _with_head(origin, self.probe.head(self.data.all_rows), 1.0) if self.probe else origin
        best = kept
        try:
            starts = [self._start(origin, rows) for rows, _ in splits]
            rounds, ends = [], list(starts)
            for stage, depth in zip(self.stages, self.freezing, strict=True):
                trainer = self._trainer(stage, depth)
                chosen, runs = self._measure(trainer, stage, ends)
                rounds.append({"trainer": trainer, **chosen})
                ends = [run.weights for run in runs]
            share = self._choose(trainer, splits, starts, ends)
            if share is None:
                return
            if len(splits) == 1:
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

    def _trainer(self, stage: Stage, depth: Depth) -> SuffixTrainer:
        freeze(self.model, depth, batch_norm=stage.batch_norm)
        same = self.cut if len(self.stages) == 1 else cut_model(self.model, self.cut.depth)
        assert same is not None  # it could be cut there before
        return SuffixTrainer(
            same.suffix, self.extracted, self.data.labels, self.data.weights, stage, self.plan.batch_size,
            factors=blockwise_factors(self.model, stage.layer_decay) if stage.layer_decay < 1 else None,
        )  # fmt: skip

    def _measure(self, trainer, stage, starts) -> tuple[dict, list[Trained]]:
        """Train once on each split, at the rate that was best on the first."""
        epochs = self._epochs(stage, len(self.splits[0][0]))
        runs = [self._best_rate(trainer, stage, starts[0], epochs)]
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
            "loss": float(np.mean([run.loss for run in runs])),
        }
        speed = max(run.seconds_per_image for run in runs)
        return {"stage": stage, "rate": rate, "epochs": epochs, "used": used, "seconds_per_image": speed}, runs

    def _best_rate(self, trainer, stage, start, epochs: int) -> Trained:
        """Whole runs on the first split, from the highest rate down, until one is no better than the one before.

        Short runs would not tell: high rates lose at first and win in the end.
        """
        best: Trained | None = None
        losses = {}
        for rate in sorted(stage.learning_rates, reverse=True):
            self.progress.phase(f"{stage.name}, learning rate {rate:g}")
            run = self._run(trainer, stage, 0, start, rate, epochs, self.callbacks)
            self._log(stage.name, run)
            losses[f"{rate:g}"] = run.loss
            if best is not None and np.isfinite(best.loss) and not run.loss < best.loss:
                break
            best = run
            if self.clock.expired():
                break
        self.outcome.selection[stage.name] = {"rates": losses}
        assert best is not None  # a stage has at least one rate
        return best

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
        watch = [StopOnTime(self.clock), _Epochs(self.progress, first, stop_after or epochs)]

        def work(open_unit):
            try:
                return trainer.run(
                    rows, rate, epochs=epochs, stop_after=stop_after, first_epoch=first, watch=watch,
                    callbacks=callbacks, unit=open_unit, **options,
                ).state()  # fmt: skip
            except NotFinite as error:
                raise CheckError(self._not_finite(error, rate)) from None

        with self.outcome.timed(phase):
            return Trained.of_state(*self.journal.run(unit, work))

    def _not_finite(self, error: NotFinite, rate: float) -> str:
        names = [self.data.names[row] for row in error.rows] if self.data.names else [f"image {r}" for r in error.rows]
        told = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        cure = (
            "the source gives numbers that are none for some of them"
            if error.where == "input"
            else f"give a smaller learning rate than {rate:g} (--lr), or look at these images"
        )
        return (
            f"The {error.where} of training was not a number at step {error.step}, in the batch of {told}; training "
            f"stopped there and what was best before is kept: {cure}."
        )

    def _epochs(self, stage: Stage, count: int) -> int:
        """At least MIN_STEPS steps: six epochs of a hundred images would be 24 steps, too few to move anything."""
        steps = -(-count // self.plan.batch_size)
        return max(stage.epochs, -(-MIN_STEPS // steps)) if stage.min_steps else stage.epochs

    def _choose(self, trainer, splits, starts, ends) -> float | None:
        """The share of the blend, by held-out log loss; None where it is not surely better than the probe."""
        data, scores = self.data, {}
        labels, weights = data.labels[self.judged], data.weights[self.judged]
        for share in BLEND_SHARES if self.probe else (1.0,):
            parts = []
            for (_, held), start, end in zip(splits, starts, ends, strict=True):
                trainer.suffix.set_weights(interpolate(start, end, share))
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
            gain = paired_difference(
                tuned,
                self.outcome.held_probabilities,
                labels,
                metric=self.plan.metric,
                groups=groups,
                seed=self.plan.seed,
            )
            wins = gain["difference"] > gain["standard_error"]
            self.outcome.selection["fine_tune_against_probe"] = {
                "metric": self.plan.metric,
                "probe": metric_value(self.plan.metric, labels, self.outcome.held_probabilities),
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
        start, goes_on = self._start(origin, rows), len(self.splits) == 1
        end = ends[0] if goes_on else start
        for chosen, depth in list(zip(rounds, self.freezing, strict=True))[-1 if goes_on else 0 :]:
            stage, rate, epochs, stop_after = chosen["stage"], chosen["rate"], chosen["epochs"], chosen["used"]
            if goes_on:
                rate, epochs, stop_after = rate / 3, max(2, round(stop_after / 3)), None
            self.progress.phase(f"{stage.name}, refit on train and validation part")
            run = None
            if self.clock.remaining() > 1.2 * (stop_after or epochs) * len(rows) * chosen["seconds_per_image"]:
                # With one stage the freeze state is still its own, and so is the compiled step.
                trainer = chosen["trainer"] if len(rounds) == 1 else self._trainer(stage, depth)
                run = self._trained(
                    f"{stage.name}, refit", "refit", trainer, end, rows, rate,
                    epochs=epochs, stop_after=stop_after, seed=self.plan.seed + 1, callbacks=self.callbacks,
                )  # fmt: skip
            if run is None or len(run.history) < (stop_after or epochs):
                self.outcome.selection["refit"] = "left out: the time limit did not allow it"
                return None
            self._log(f"{stage.name} (refit)", run)
            end = run.weights
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


class _Epochs(keras.callbacks.Callback):
    def __init__(self, progress: Progress, first: int, epochs: int):
        super().__init__()
        self.progress, self.first, self.epochs = progress, first, epochs

    def on_epoch_end(self, epoch, logs=None):
        self.progress.update(epoch - self.first + 1, self.epochs)
