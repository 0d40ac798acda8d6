"""The main job: labelled images and a source in; a trained, scored, exported, verified and judged model out."""

import contextlib
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tomli_w

from tfxfer.errors import InputError, Interrupted, Terminated
from tfxfer.exporters import EXPORTERS
from tfxfer.exporters.certify import certify
from tfxfer.exporters.layout import SAMPLES_FILE
from tfxfer.exporters.samples import write_samples
from tfxfer.methods import METHODS
from tfxfer.metrics import SplitMismatchWarning
from tfxfer.model.blocks import backbone_of
from tfxfer.model.build import assemble
from tfxfer.model.freeze import frozen_units
from tfxfer.model.predict import predict_in_batches
from tfxfer.model.source_classes import keep_source_classes, source_classifier
from tfxfer.registry import lookup
from tfxfer.runtime.files import atomic_path, sha256_of_file, write_text
from tfxfer.runtime.process import seconds_since_start, versions
from tfxfer.runtime.progress import Progress
from tfxfer.sources.catalog import load_with_report
from tfxfer.specs import Plan, Source, Stage
from tfxfer.train.distribute import Devices, choose_devices
from tfxfer.train.forgetting import SourceHead
from tfxfer.train.freezing import auto_depth
from tfxfer.train.journal import SAVE_EVERY_SECONDS, Journal
from tfxfer.train.lock import HOLDER_FILE, LOCK_FILE, training_lock
from tfxfer.train.outcome import Outcome, TrainingData
from tfxfer.train.stages import run_stages
from tfxfer.train.training_data import training_data
from tfxfer.train.wire import WorkerLost
from tfxfer.workflow.continuing import Continuing, earlier_run
from tfxfer.workflow.judging import Judge
from tfxfer.workflow.planning import source_of
from tfxfer.workflow.rate_plot import write_rate_tests
from tfxfer.workflow.run import (
    CHECKPOINTS,
    CONFIG_FILE,
    MODEL_FILE,
    Run,
    begun_run,
    new_run_folder,
    write_history,
    write_info,
)
from tfxfer.workflow.run_scores import held_scores, mismatch, scores_of_test
from tfxfer.workflow.samples import samples_of
from tfxfer.workflow.start import read_data
from tfxfer.workflow.time_limit import ENDING_SECONDS, Speed, TimeLimit, other_seeds_seconds

FORMATS = ("saved_model", "onnx")


def train(
    data: Any,
    plan: Plan,
    *,
    model: keras.Model | None = None,
    card: Source | None = None,
    out: str | Path | None = None,
    split: str | Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    formats: Sequence[str] = FORMATS,
    progress: Progress | None = None,
    resume: bool = False,
    checkpoint_seconds: float = SAVE_EVERY_SECONDS,
    strategy: Any = "auto",
    started: float | None = None,
    within: bool = False,
) -> Run:
    """Run a plan on data; the public face is `tfxfer.fit`. A time limit counts from `started`, by default from now.

    With `within` the folder `out` is the caller's, who has other files in it.
    """
    name = Path(str(data)).name if isinstance(data, str | Path) else getattr(data, "name", "data")
    unfinished = begun_run(out, plan) if resume else None
    if unfinished is not None and unfinished.info["status"] == "complete":
        return unfinished
    folder = unfinished.path if unfinished else Path(out) if within and out else new_run_folder(out, name)
    kept = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with training_lock(folder):
            job = _Job(
                data, plan, folder, model, split, tuple(callbacks), tuple(formats), progress or Progress(), card,
                unfinished, checkpoint_seconds, choose_devices(strategy), started,
            )  # fmt: skip
            return job.run()
    finally:
        if not kept and not any(folder.iterdir()):
            folder.rmdir()  # nothing was trained: the name is free again


class _Job:
    def __init__(
        self, data, plan: Plan, folder: Path, model, split, callbacks, formats, progress: Progress, card,
        unfinished: Run | None, checkpoint_seconds: float, devices: Devices, started: float | None,
    ):  # fmt: skip
        self.plan, self.folder, self.progress = plan, folder, progress
        self.callbacks, self.formats = callbacks, formats
        self.devices = devices
        self.card: Source = card or source_of(plan)
        self.stages: tuple[Stage, ...] = lookup(METHODS, plan.method, "method")(plan.recipe)
        self.seconds: dict[str, float] = {}
        self.limit = TimeLimit(plan.time_limit_seconds, started, progress)
        self._seed_seconds = 0.0
        self.given_model = model
        self.unfinished = unfinished
        self.journal = Journal(folder / CHECKPOINTS, every_seconds=checkpoint_seconds)
        self.info: dict[str, Any] = {}
        if callbacks and all(stage.is_probe for stage in self.stages):
            raise InputError("Without fine-tuning there are no epochs, so callbacks would do nothing; drop them.")
        if model is not None and plan.num_seeds > 1:
            raise InputError("num_seeds above 1 builds the model anew for each seed; give the source's name instead.")
        for name in formats:
            lookup(EXPORTERS, name, "export format")
        with self._timed("read_data"):
            earlier = earlier_run(plan)
            self.dataset = read_data(data, plan, split, self.progress, earlier)
        self.continuing: Continuing | None = None
        if earlier is not None:
            self.continuing = Continuing(earlier, self.dataset, plan, own_model=model is not None)
            self.dataset = self.continuing.dataset
        for part in ("train", "val", "test"):
            self.dataset.part(part)  # where one is missing, say so before anything is computed
        if unfinished is not None and unfinished.info["data"]["fingerprint"] != self.dataset.fingerprint:
            raise InputError(
                f"The images are no longer those that {folder} was begun with (fingerprint "
                f"{self.dataset.fingerprint[:12]}, not {unfinished.info['data']['fingerprint'][:12]}): what was "
                "measured on the old ones does not hold; bring them back, or train anew into another --out."
            )

        digest = self.card.weights.get("sha256", "")
        if unfinished is not None and unfinished.info["source"]["sha256"] != digest:
            raise InputError(
                f"{self.card.name} is no longer what {folder} was begun with (SHA-256 {digest[:12]}, not "
                f"{unfinished.info['source']['sha256'][:12]}); bring it back, or train anew into another --out."
            )

    def run(self) -> Run:
        try:
            with self.journal.ends_on_sigterm():
                return self._run()
        except BaseException as error:
            if not (self.folder / MODEL_FILE).exists():
                if self.unfinished is None and not isinstance(error, Terminated | WorkerLost):
                    _empty(self.folder)  # nothing was trained: the name is free again
            elif isinstance(error, KeyboardInterrupt):
                self._write("interrupted")
                raise Interrupted(
                    f"Interrupted; the best model so far is {self.folder / MODEL_FILE}; go on with --resume."
                ) from None
            raise
        finally:
            if (self.folder / MODEL_FILE).exists() and not (self.folder / "exports").exists():
                # So that `tfxfer export` can make up for it.
                write_samples(self.folder / SAMPLES_FILE, samples_of(self.dataset, self.plan))

    def _run(self) -> Run:
        model = self._build()
        training = training_data(
            self.dataset, self.plan, **(self.continuing.taken_over(model) if self.continuing else {})
        )
        write_text(self.folder / CONFIG_FILE, tomli_w.dumps(self.plan.to_dict()))
        self.dataset.write_split(self.folder / "split.csv")
        if self.continuing:
            self.continuing.write_earlier(self.folder)
        self._describe()
        self._write("begun")
        judge = Judge(self.card, self.plan, training, self.dataset, self.progress, self.limit)
        outcome = self._train(model, judge, self.plan, self._save, self.journal)
        model = outcome.model
        self._save(model, "final")
        self._record(outcome)
        write_history(self.folder / "history.csv", outcome.history)
        self._score_held(training, outcome)
        if outcome.interrupted:
            raise KeyboardInterrupt
        probabilities = self._score_test(model)
        self.limit.release("saving", "scoring")
        if self.continuing:
            with self._timed("compare_with_earlier"):
                self.info["continued"] |= self.continuing.compare(probabilities, self.plan)
        self._write("exporting")  # a failed export must not cost what was measured
        if self.formats:
            self._export(model, probabilities)
        self.limit.release("export")
        self._write("judging")
        if self.plan.baseline == "none":
            self.info["baseline"] = {"verdict": "not asked", "reason": "--no-baseline"}
        else:
            self._judge(judge, outcome, probabilities)
        self._write("complete")
        self.journal.clear()
        return Run(self.folder, self.info, self.plan.trust)

    # -- steps ------------------------------------------------------------------------------------------------------

    def _build(self, plan: Plan | None = None) -> keras.Model:
        plan = plan or self.plan
        if self.given_model is not None and plan is self.plan:
            model = _checked(self.given_model, self.dataset.num_classes)
        else:
            self.progress.phase(f"loading {self.card.name}")
            keras.utils.set_random_seed(plan.seed)
            with self._timed("build_model"):
                model = self._from_source(plan)
        for stage in self.stages:  # a wrong depth is refused before anything is computed
            if stage.freeze_depth != "auto":
                frozen_units(model, stage.freeze_depth)
        return model

    def _from_source(self, plan: Plan) -> keras.Model:
        backbone, report = load_with_report(self.card, image_size=plan.image_size)
        if report is not None:
            self.info["load_report"] = report.to_dict()
            if not report.complete:
                self.progress.note(str(report))
        model = assemble(backbone, self.card, self.dataset, dropout=plan.dropout)
        if self.continuing and self.continuing.continues:
            keep_source_classes(model, self.card, self.dataset.class_names)
        return model

    def _train(self, model, judge: Judge, plan: Plan, save, journal: Journal) -> Outcome:
        began = time.monotonic()

        def before_tuning(outcome: Outcome) -> None:
            if self.limit.given:
                self._keep_back(judge, plan, journal, outcome, began)

        with self._timed("train"):
            outcome = run_stages(
                model, plan, self.stages, judge.training, auto_depth=auto_depth(self.card), clock=self.limit.clock,
                progress=self.progress, callbacks=self.callbacks, on_model=lambda stage, model: save(model, stage),
                before_tuning=before_tuning, journal=journal, source_head=self._source_head(model),
                devices=self.devices,
            )  # fmt: skip
        self.limit.left_out |= outcome.left_out
        return outcome

    def _keep_back(self, judge: Judge, plan: Plan, journal: Journal, outcome: Outcome, began: float) -> None:
        """Under a time limit: what follows training is predicted, and the baselines come first, so that it is known."""
        limit, num_test, first = self.limit, len(judge.test), plan.seed == self.plan.seed
        speed = Speed(outcome.graph_seconds, outcome.images_per_second)
        limit.keep_back("ending", ENDING_SECONDS)
        limit.keep_back("scoring", speed.predict_seconds(num_test))
        if first:
            limit.keep_back("saving", 2 * self.seconds.get("save_model", 0.0))
            limit.keep_back("export", speed.export_seconds(len(self.formats), num_test))
        if plan.baseline == "none":
            return
        with self._timed("baseline"):
            solving = self.seconds.get("build_model", speed.graph_seconds) + outcome.seconds.get("probe", 0.0)
            judge.ahead(plan.seed, journal, speed, solving)
        self._seed_seconds = time.monotonic() - began + speed.predict_seconds(num_test)
        others = self.plan.seed + self.plan.num_seeds - 1 - plan.seed
        limit.keep_back("other seeds", other_seeds_seconds(limit.clock.remaining(), others, self._seed_seconds))
        if plan.baseline == "scratch":  # it may take as long as fine-tuning
            limit.keep_back("from scratch", limit.clock.remaining() / 2)

    def _source_head(self, model: keras.Model) -> SourceHead | None:
        """The source's own output, where a stage needs it."""
        needs = next((stage for stage in self.stages if stage.needs_source_head), None)
        if needs is None:
            return None
        try:
            return SourceHead(*source_classifier(self.card, backbone_of(model)))
        except InputError as error:
            raise InputError(
                f"Regularizer {needs.regularizer!r} of stage {needs.name!r} needs the source's old output, and "
                f"{self.card.name!r} has none on its features: {error} Give 'l2_sp', which needs none, or drop it."
            ) from None

    def _save(self, model, stage: str) -> None:
        with self._timed("save_model"), atomic_path(self.folder / MODEL_FILE) as temporary:
            model.save(temporary)
        ready = self.info.setdefault("timings", {}).setdefault("model_ready_after_process_start", {})
        ready[stage] = round(seconds_since_start(), 2)
        self.info["model"] = {"file": MODEL_FILE, "sha256": sha256_of_file(self.folder / MODEL_FILE)}
        self._write("training")
        self.progress.note(f"saved {self.folder / MODEL_FILE} ({stage})")

    def _describe(self) -> None:
        card = self.card
        self.info |= {
            "source": {
                "name": card.name, "kind": card.kind, "sha256": card.weights.get("sha256", ""), "licence": card.licence,
                "title": card.title, "paper": card.paper, "url": card.url, "fine_tune_depth": card.fine_tune_depth,
            },
            "data": self.dataset.summary(),
            "plan": self.plan.to_dict(),
            "devices": self.devices.describe(),
            "versions": versions(),
            "timings": {"data_read_after_process_start": round(seconds_since_start(), 2)},
        }  # fmt: skip
        if self.continuing:
            self.info["continued"] = self.continuing.describe()

    def _record(self, outcome: Outcome) -> None:
        self.info |= {
            "chosen": outcome.chosen,
            "selection": outcome.selection,
            "devices": self.devices.describe(),
            "freeze_audit": outcome.audit,
            "cache": outcome.cache,
            "resumed": self.journal.resumed,
            "out_of_time": outcome.out_of_time,
        }
        if outcome.rate_tests:
            write_rate_tests(self.folder, outcome.rate_tests)
        self.seconds |= {f"train.{phase}": seconds for phase, seconds in outcome.seconds.items()}

    def _score_held(self, training: TrainingData, outcome: Outcome) -> None:
        if outcome.held_probabilities is not None:
            self.info["metrics"] = {"validation": held_scores(self.dataset, training, outcome, self.plan.seed)}

    def _score_test(self, model) -> np.ndarray:
        self.progress.phase("scoring the test part")
        with self._timed("score_test"):
            probabilities = predict_in_batches(model, self.dataset.pixel_rows("test", self.plan.image_size))
            scores = scores_of_test(self.dataset, probabilities, self.plan.seed)
        metrics = self.info.setdefault("metrics", {})
        metrics["test"] = scores
        warning = mismatch(metrics.get("validation"), scores, self.plan.metric)
        if warning:
            self.info.setdefault("warnings", []).append(warning)
            warnings.warn(warning, SplitMismatchWarning, stacklevel=2)
        return probabilities

    def _export(self, model, probabilities: np.ndarray) -> None:
        test = self.dataset.part("test")
        pixels = self.dataset.pixel_rows("test", self.plan.image_size)
        samples = samples_of(self.dataset, self.plan)
        self.progress.phase("exporting and verifying")
        with self._timed("export_and_verify"):
            certificates = certify(
                model, self.folder / "exports", formats=self.formats, class_names=self.dataset.class_names,
                metadata={
                    "source": self.card.name, "source_licence": self.card.licence,
                    "data_fingerprint": self.dataset.fingerprint,
                },
                samples=samples.images, labels=samples.labels, other_size_samples=samples.real_others,
                test_images=pixels, test_labels=test.labels, test_probabilities=probabilities,
            )  # fmt: skip
        self.info["certificates"] = [certificate.to_dict() for certificate in certificates]

    def _judge(self, judge: Judge, outcome: Outcome, probabilities: np.ndarray) -> None:
        ours, theirs = [probabilities], []
        end = self.plan.seed + self.plan.num_seeds
        for seed in range(self.plan.seed, end):
            if seed != self.plan.seed:
                self.limit.release("other seeds")
                if not self.limit.fits(f"{end - seed} of {self.plan.num_seeds} seeds", self._seed_seconds):
                    break
                ours.append(self._trained_again(judge, judge.plan_of(seed)))
            with self._timed("baseline"):
                theirs.append(judge.baselines(seed, outcome))
        self.info["baseline"] = judge.compared(np.stack(ours), theirs)

    def _trained_again(self, judge: Judge, plan: Plan) -> np.ndarray:
        """What the model of another seed says of the test images."""
        model = self._build(plan)
        self.limit.again()
        journal = self.journal.child(f"seed-{plan.seed}")
        again = self._train(model, judge, plan, lambda model, stage: None, journal)
        if again.interrupted:
            raise KeyboardInterrupt
        found = predict_in_batches(again.model, judge.pixels)
        self.limit.release("scoring")
        return found

    def _write(self, status: str) -> None:
        timings = self.info.setdefault("timings", {})
        timings["seconds"] = {phase: round(seconds, 2) for phase, seconds in self.seconds.items()}
        timings["process_start_to_now"] = round(seconds_since_start(), 2)
        if self.limit.given:
            self.info["time_limit"] = self.limit.facts()
        self.info["status"] = status
        write_info(self.folder, self.info)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in (LOCK_FILE, HOLDER_FILE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _checked(model: keras.Model, num_classes: int) -> keras.Model:
    if model.output_shape[-1] != num_classes:
        raise InputError(
            f"The model has {model.output_shape[-1]} outputs, the data {num_classes} classes; build it with the data."
        )
    return model
