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

from tfxfer.data.audit import open_content
from tfxfer.errors import InputError, Interrupted
from tfxfer.exporters import EXPORTERS
from tfxfer.exporters.certify import certify
from tfxfer.exporters.layout import SAMPLES_FILE
from tfxfer.exporters.samples import Samples, make_samples, write_samples
from tfxfer.methods import METHODS
from tfxfer.metrics import SplitMismatchWarning, score, split_warning
from tfxfer.model.build import assemble
from tfxfer.model.freeze import frozen_units
from tfxfer.registry import lookup
from tfxfer.runtime.files import atomic_path, sha256_of_file, write_text
from tfxfer.runtime.images import resize_image
from tfxfer.runtime.process import seconds_since_start, versions
from tfxfer.runtime.progress import Progress
from tfxfer.select.baseline import judge_baselines, quick_baselines
from tfxfer.select.scratch import train_from_scratch
from tfxfer.sources.catalog import load_with_report
from tfxfer.specs import Plan, Source, Stage
from tfxfer.train.clock import Clock
from tfxfer.train.journal import SAVE_EVERY_SECONDS, Journal, Terminated
from tfxfer.train.lock import HOLDER_FILE, LOCK_FILE, training_lock
from tfxfer.train.outcome import Outcome, TrainingData
from tfxfer.train.stages import run_stages
from tfxfer.workflow.planning import auto_depth, source_of
from tfxfer.workflow.run import CHECKPOINTS, MODEL_FILE, Run, begun_run, new_run_folder, write_history, write_info
from tfxfer.workflow.start import read_data

NUM_SAMPLES = 64
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
) -> Run:
    """Run a plan on data; the public face is `tfxfer.fit`."""
    name = Path(str(data)).name if isinstance(data, str | Path) else getattr(data, "name", "data")
    unfinished = begun_run(out, plan) if resume else None
    if unfinished is not None and unfinished.info["status"] == "complete":
        return unfinished
    folder = unfinished.path if unfinished else new_run_folder(out, name)
    kept = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with training_lock(folder):
            job = _Job(
                data, plan, folder, model, split, tuple(callbacks), tuple(formats), progress or Progress(), card,
                unfinished, checkpoint_seconds,
            )  # fmt: skip
            return job.run()
    finally:
        if not kept and not any(folder.iterdir()):
            folder.rmdir()  # nothing was trained: the name is free again


class _Job:
    def __init__(
        self, data, plan: Plan, folder: Path, model, split, callbacks, formats, progress: Progress, card,
        unfinished: Run | None, checkpoint_seconds: float,
    ):  # fmt: skip
        self.plan, self.folder, self.progress = plan, folder, progress
        self.callbacks, self.formats = callbacks, formats
        self.card: Source = card or source_of(plan)
        self.stages: tuple[Stage, ...] = lookup(METHODS, plan.method, "method")(plan.recipe)
        self.seconds: dict[str, float] = {}
        self.clock = Clock(plan.time_limit_seconds)
        self.given_model = model
        self.unfinished = unfinished
        self.journal = Journal(folder / CHECKPOINTS, every_seconds=checkpoint_seconds)
        self.info: dict[str, Any] = {}
        if callbacks and all(stage.solver == "convex" for stage in self.stages):
            raise InputError("Without fine-tuning there are no epochs, so callbacks would do nothing; drop them.")
        if model is not None and plan.num_seeds > 1:
            raise InputError("num_seeds above 1 builds the model anew for each seed; give the source's name instead.")
        for name in formats:
            lookup(EXPORTERS, name, "export format")
        with self._timed("read_data"):
            self.dataset = read_data(data, plan, split, self.progress)
        for part in ("train", "val", "test"):
            self.dataset.part(part)  # where one is missing, say so before anything is computed
        if unfinished is not None and unfinished.info["data"]["fingerprint"] != self.dataset.fingerprint:
            raise InputError(
                f"The images are no longer those that {folder} was begun with (fingerprint "
                f"{self.dataset.fingerprint[:12]}, not {unfinished.info['data']['fingerprint'][:12]}): what was "
                "measured on the old ones does not hold; bring them back, or train anew into another --out."
            )

    def run(self) -> Run:
        try:
            with self.journal.ends_on_sigterm():
                return self._run()
        except BaseException as error:
            if not (self.folder / MODEL_FILE).exists():
                if self.unfinished is None and not isinstance(error, Terminated):
                    _empty(self.folder)  # nothing was trained: the name is free again
            elif isinstance(error, KeyboardInterrupt):
                self._write("interrupted")
                raise Interrupted(f"Interrupted; the best model so far is {self.folder / MODEL_FILE}.") from None
            raise
        finally:
            if (self.folder / MODEL_FILE).exists() and not (self.folder / "exports").exists():
                write_samples(self.folder / SAMPLES_FILE, self._samples())  # so that `tfxfer export` can make up for it

    def _run(self) -> Run:
        model = self._build()
        training = self._training_data()
        write_text(self.folder / "config.toml", tomli_w.dumps(self.plan.to_dict()))
        self.dataset.write_split(self.folder / "split.csv")
        self._describe()
        self._write("begun")
        outcome = self._train(model, training, self.plan, self._save, self.journal)
        self._save(model, "final")
        self._record(outcome)
        write_history(self.folder / "history.csv", outcome.history)
        self._score_held(training, outcome)
        if outcome.interrupted:
            raise KeyboardInterrupt
        probabilities = self._score_test(model)
        self._write("exporting")  # a failed export must not cost what was measured
        if self.formats:
            self._export(model, probabilities)
        self._write("judging")
        if self.plan.baseline == "none":
            self.info["baseline"] = {"verdict": "not asked", "reason": "--no-baseline"}
        else:
            self._judge(training, outcome, probabilities)
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
        return assemble(backbone, self.card, self.dataset, dropout=plan.dropout)

    def _training_data(self) -> TrainingData:
        train, val = self.dataset.part("train"), self.dataset.part("val")
        labels = np.concatenate([train.labels, val.labels])
        weights = [np.ones(len(part)) if part.weights is None else part.weights for part in (train, val)]
        weight = np.concatenate(weights).astype(np.float64)
        of_class = np.bincount(labels, weights=weight, minlength=self.dataset.num_classes)
        if not of_class.all():
            name = self.dataset.class_names[int(np.argmin(of_class))]
            raise InputError(
                f"All images of class {name!r} have weight 0; give it some weight, or leave the class out."
            )
        if self.plan.metric != "accuracy":  # the balanced metrics count classes, not images
            weight = weight / of_class[labels]
        return TrainingData(
            parts=tuple(self.dataset.pixels(name, self.plan.image_size) for name in ("train", "val")),
            labels=labels,
            weights=weight * len(weight) / weight.sum(),
            groups=(*train.groups, *val.groups),
            rows=np.arange(len(train)),
            held=np.arange(len(train), len(labels)),
            num_classes=self.dataset.num_classes,
            may_pool="val" in self.dataset.split.get("fractions", {}),
            names=(*train.ids, *val.ids),
        )

    def _train(self, model, training: TrainingData, plan: Plan, save, journal: Journal) -> Outcome:
        with self._timed("train"):
            return run_stages(
                model, plan, self.stages, training, auto_depth=auto_depth(self.card), clock=self.clock,
                progress=self.progress, callbacks=self.callbacks, on_model=lambda stage: save(model, stage),
                journal=journal,
            )  # fmt: skip

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
                "title": card.title, "paper": card.paper, "url": card.url,
            },
            "data": self.dataset.summary(),
            "plan": self.plan.to_dict(),
            "versions": versions(),
            "timings": {"data_read_after_process_start": round(seconds_since_start(), 2)},
        }  # fmt: skip

    def _record(self, outcome: Outcome) -> None:
        self.info |= {
            "chosen": outcome.chosen,
            "selection": outcome.selection,
            "freeze_audit": outcome.audit,
            "cache": outcome.cache,
            "resumed": self.journal.resumed,
            "out_of_time": outcome.out_of_time,
        }
        self.seconds |= {f"train.{phase}": seconds for phase, seconds in outcome.seconds.items()}

    def _score_held(self, training: TrainingData, outcome: Outcome) -> None:
        if outcome.held_probabilities is None:
            return
        held = outcome.held
        parts = [self.dataset.part(name) for name in ("train", "val")]
        weighted = all(part.weights is not None for part in parts)
        weights = np.concatenate([part.weights for part in parts])[held] if weighted else None
        self.info["metrics"] = {
            "validation": {
                "judged_on": "validation part" if len(held) == len(training.held) else "folds of train and validation",
                "note": "By models that did not train on these images, but chosen on them: optimistic.",
                **score(
                    training.labels[held], outcome.held_probabilities, self.dataset.class_names,
                    groups=[training.groups[row] for row in held], weights=weights, seed=self.plan.seed,
                ),
            }
        }  # fmt: skip

    def _score_test(self, model) -> np.ndarray:
        test = self.dataset.part("test")
        self.progress.phase("scoring the test part")
        with self._timed("score_test"):
            pixels = self.dataset.pixels("test", self.plan.image_size)
            probabilities = model.predict(pixels, batch_size=64, verbose=0)
            scores = score(
                test.labels, probabilities, self.dataset.class_names, groups=test.groups, weights=test.weights,
                seed=self.plan.seed,
            )  # fmt: skip
        metrics = self.info.setdefault("metrics", {})
        metrics["test"] = scores
        warning = split_warning(metrics["validation"], scores, self.plan.metric) if "validation" in metrics else None
        if warning:
            self.info.setdefault("warnings", []).append(warning)
            warnings.warn(warning, SplitMismatchWarning, stacklevel=2)
        return probabilities

    def _samples(self) -> Samples:
        test = self.dataset.part("test")
        rows = np.random.default_rng(self.plan.seed).permutation(len(test))[:NUM_SAMPLES]
        pixels = self.dataset.pixels("test", self.plan.image_size)[rows]
        return make_samples(pixels, test.labels[rows], _other_sizes(test, rows, self.plan.image_size))

    def _export(self, model, probabilities: np.ndarray) -> None:
        test = self.dataset.part("test")
        pixels = self.dataset.pixels("test", self.plan.image_size)
        samples = self._samples()
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

    def _judge(self, training: TrainingData, outcome: Outcome, probabilities: np.ndarray) -> None:
        test = self.dataset.part("test")
        pixels = self.dataset.pixels("test", self.plan.image_size)
        ours, theirs, facts = [probabilities], [], []
        for seed in range(self.plan.seed, self.plan.seed + self.plan.num_seeds):
            plan = _with_seed(self.plan, seed)
            if seed != self.plan.seed:
                model = self._build(plan)
                self.clock = Clock(plan.time_limit_seconds)
                kept = self.folder / CHECKPOINTS / f"seed-{seed}"
                journal = Journal(kept, every_seconds=self.journal.every_seconds)
                if self._train(model, training, plan, lambda model, stage: None, journal).interrupted:
                    raise KeyboardInterrupt
                ours.append(model.predict(pixels, batch_size=64, verbose=0))
            tables, fact = self._baselines(training, outcome, plan, pixels)
            theirs.append(tables)
            facts.append(fact)
        stacked = {name: np.stack([tables[name] for tables in theirs]) for name in theirs[0]}
        found = judge_baselines(
            np.stack(ours),
            stacked,
            test.labels,
            test.groups,
            test.weights,
            metric=self.plan.metric,
            seed=self.plan.seed,
        )
        proven = all(fact.get("converged", True) for fact in facts)
        self.info["baseline"] = {
            "kind": self.plan.baseline,
            "num_seeds": self.plan.num_seeds,
            **found,
            "proven": proven,
        }
        if any(facts):
            self.info["baseline"]["scratch"] = facts
        if not proven:
            self.info["baseline"]["note"] = "not proven: training from scratch had not converged when its steps ran out"

    def _baselines(self, training, outcome, plan, pixels) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self.progress.phase("baselines")
        with self._timed("baseline"):
            tables = quick_baselines(self.card, plan, training, pixels)
            if plan.baseline != "scratch":
                return tables, {}
            self.progress.phase("baseline: the same network from scratch")
            found = train_from_scratch(
                self.card, plan, training, pixels, transfer_epochs=len(outcome.history),
                mirror=outcome.selection.get("mirror", {}).get("used", plan.augment == "mirror"),
                progress=self.progress,
            )  # fmt: skip
        facts = {"converged": found.converged, "epochs": found.epochs, "validation_log_loss": found.best_log_loss}
        return {**tables, "the same network from scratch": found.probabilities}, facts

    def _write(self, status: str) -> None:
        timings = self.info.setdefault("timings", {})
        timings["seconds"] = {phase: round(seconds, 2) for phase, seconds in self.seconds.items()}
        timings["process_start_to_now"] = round(seconds_since_start(), 2)
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


def _with_seed(plan: Plan, seed: int) -> Plan:
    return Plan.from_dict({**plan.to_dict(), "seed": seed})


def _other_sizes(test, rows, size_px: int) -> list[np.ndarray]:
    """A few test images in sizes that are not the model's: the files as they are, or made smaller and larger."""
    found = []
    for index, row in enumerate(rows[:4]):
        image = np.asarray(open_content(test.contents[row])[1])
        if image.shape[:2] == (size_px, size_px):
            image = resize_image(image, size_px + (index - 1) * max(size_px // 5, 1))
        found.append(np.ascontiguousarray(image[:1024, :1024]))
    return found
