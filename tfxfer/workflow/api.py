"""The public verbs that need Keras: fit and export."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfxfer.data import Dataset
from tfxfer.errors import CheckError, InputError
from tfxfer.exporters.certify import certify
from tfxfer.exporters.layout import SAMPLES_FILE, exported_formats
from tfxfer.exporters.samples import read_samples
from tfxfer.exporters.serving import servable
from tfxfer.runtime.images import decode_images
from tfxfer.runtime.progress import Lines, Progress
from tfxfer.sources.catalog import list_sources
from tfxfer.specs import Certificate, Recipe, Source
from tfxfer.train.distribute import Devices
from tfxfer.train.journal import SAVE_EVERY_SECONDS
from tfxfer.workflow.planning import make_plan
from tfxfer.workflow.run import Run, as_run, write_info
from tfxfer.workflow.samples import NUM_SAMPLES
from tfxfer.workflow.scoring import image_files
from tfxfer.workflow.together import together
from tfxfer.workflow.training import FORMATS, train


def fit(
    model_or_source: keras.Model | str | None = None,
    data: Any = None,
    recipe: str | Path | Recipe | None = None,
    *,
    method: str | None = None,
    probe: str | None = None,
    features: str | None = None,
    precision: str | None = None,
    freeze_depth: int | float | str | None = None,
    epochs: int | None = None,
    learning_rate: float | str | None = None,
    batch_norm: str | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    augment: str | None = None,
    views: int | None = None,
    metric: str | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    dropout: float | None = None,
    seed: int | None = None,
    val_fraction: float | None = None,
    group_by: str | None = None,
    near_duplicates: str | None = None,
    split: str | Path | None = None,
    time_limit: float | None = None,
    baseline: str | None = None,
    num_seeds: int | None = None,
    weights: str | Path | None = None,
    input_range: str | None = None,
    partial: bool | None = None,
    trust: Sequence[str] | None = None,
    drop_class: Sequence[str] | None = None,
    formats: Sequence[str] = FORMATS,
    config: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = SAVE_EVERY_SECONDS,
    strategy: Any = "auto",
    progress: Progress | None = None,
) -> Run:
    """Transfer a source to labelled images: train, choose, score, export, verify, and compare with baselines.

    Args:
        model_or_source: A model of `build_model`, or a source as `get_source` takes it; EfficientNet-Lite0 by default.
        data: A `Dataset`, or whatever `load_data` takes.
        recipe: "auto" (the default), "probe", "full", "gradual", "affine" or "bit", see the README; a TOML file with
            stages; or a `Recipe`.
        method: "fine_tune" (all stages; the default) or "probe" (the head on frozen features only).
        probe: How that head is solved: "convex" (logistic regression), "ridge" or "prototype".
        features: What that head reads: "last" (the last block), "multi" (several blocks, pooled), or "auto" (the
            default: several where held-out images say so).
        precision: What fine-tuning computes in: "auto" (the default: what is quicker by measurement), "float32",
            "bfloat16", or on GPUs "float16"; weights, scores and exports are float32.
        freeze_depth: Frozen while fine-tuning: leading blocks by count, share (0.7), name or "all"; or "re:PATTERN",
            any layers with such names.
        epochs: Of fine-tuning; by default six, more where images are few.
        learning_rate: Peak, by default the best of three, measured; or "find": a range test of 100 steps at growing
            rates suggests one for each stage (`lr_find.csv` and `lr_find.png` in the run).
        batch_norm: "frozen" (default), "affine", "adapt" or "train".
        callbacks: Keras callbacks for the fine-tuning epochs, which are numbered through.
        augment: "auto" (default: mirrored images too, unless the probe gets worse by them), "mirror", "rand"
            (RandAugment and mirrored) or "none".
        views: With "rand", where blocks are frozen: views of each image, the plain one counted, that are computed once
            and drawn from in each epoch, default 4. Where none is frozen, or making them anew is quicker, each epoch
            has new ones.
        metric: Selected for: "accuracy" (default), "macro_f1" or "balanced_accuracy".
        batch_size: Images a step, default 32.
        image_size: Side in pixels; by default that of `data` where it was loaded with one, else the source's own.
        dropout: Before the head while fine-tuning, default 0.2.
        seed: Of split, shuffle, dropout and bootstrap, default 0.
        val_fraction: Split off for validation where the data brings none, default 0.2.
        group_by: Regular expression on paths; what it captures names a group that never crosses parts.
        near_duplicates: Which images stay together: "on" (default), "turned" (also turned, mirrored and shifted
            copies, such as augmented data), or "off".
        split: A split.csv to reuse.
        time_limit: Seconds from this call to its end, of any number of seeds and of the baseline from scratch too.
            Steps are measured, and rates, folds, epochs and refit planned to fit; what does not is left out by name
            (`run.info["time_limit"]`). A probe, its score and its exports are made however short the time is.
        baseline: "quick" (default), "scratch" or "none".
        num_seeds: Repetitions of both sides of the baseline comparison, default 1.
        weights: File with the source's weights, where they are not its own.
        input_range: What the source wants pixels scaled to: "0..255", "0..1", "-1..1", "imagenet" or "caffe"; by
            default what is known of it.
        partial: Whether the source's weights may be loaded in part; run.json has the report.
        trust: Modules of your own code that custom objects in a model file may come from.
        drop_class: Classes to let go of the run that is continued: source "run:OLD" goes on with OLD, whose classes
            keep their numbers and whose images their parts; `run.info["continued"]` compares the two models.
        formats: Exports; () for none.
        config: A run's config.toml to start from; arguments win over it.
        out: The run's folder; `runs/NAME-N` by default.
        resume: Go on with the run in `out`, which was killed, interrupted or ran into an error; of a complete one
            nothing is done again. Everything else must be as it was.
        checkpoint_seconds: What a kill may cost: the state of training is saved that often.
        strategy: What takes the training steps: "none" (one device), "mirrored" (all GPUs of this machine),
            "multi_worker" (the machines of TF_CONFIG, each of which calls `fit`), "auto" (the default: what there is),
            or a `tf.distribute` strategy of the two kinds. `batch_size` is that of all devices together.
        progress: Told about phases; lines on stderr by default, `tfxfer.Progress()` for silence.

    Returns:
        The run, complete on disk. Of several machines the first one trains and writes it, with the help of the others,
        whose run has its path; their callbacks and data are not looked at.

    Raises:
        InputError: Where an argument or the data is wrong.
        CheckError: Where the freeze audit or an export fails.
        Interrupted: After Ctrl-C, with the best model kept.

    Example:
        >>> run = fit("efficientnet_lite0_imagenet", "photos/")  # doctest: +SKIP
        >>> run.metrics["test"]["accuracy"]  # doctest: +SKIP
        {'value': 0.86, 'low': 0.82, 'high': 0.9}

    Reference:
        Kumar et al. Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution. ICLR 2022.
    """
    if data is None:
        raise InputError("fit needs data: a folder, a CSV, a DataFrame, arrays, a tf.data.Dataset or a Dataset.")

    def here(devices: Devices) -> Run:
        model, card = (model_or_source if isinstance(model_or_source, keras.Model) else None), None
        source, size_px = model_or_source, image_size
        if model is not None:
            card = _card_of(model)
            source = card.name
            size_px = _image_size_of(model, size_px)
        if isinstance(data, Dataset) and size_px is None:
            size_px = data.image_size
        plan = make_plan(
            config, card, data=data, source=source, recipe=recipe, method=method,
            probe=probe, features=features, precision=precision, freeze_depth=freeze_depth,
            epochs=epochs, learning_rate=learning_rate,
            batch_norm=batch_norm, augment=augment, views=views,
            metric=metric, batch_size=batch_size, image_size=size_px,
            dropout=dropout, seed=seed, val_fraction=val_fraction, group_by=group_by, near_duplicates=near_duplicates,
            time_limit_seconds=time_limit, baseline=baseline, num_seeds=num_seeds, weights=None if weights is None else
            str(weights), input_range=input_range, partial=partial, trust=None if trust is None else tuple(trust),
            drop_class=None if drop_class is None else tuple(drop_class),
        )  # fmt: skip
        return train(
            data,
            plan,
            model=model,
            card=card,
            out=out,
            split=split,
            callbacks=callbacks,
            formats=formats,
            progress=progress or Lines(),
            resume=resume,
            checkpoint_seconds=checkpoint_seconds,
            strategy=devices,
        )

    return together(strategy, here, progress or Lines())


def export(
    run_or_model: Run | str | Path | keras.Model,
    out: str | Path | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    samples: np.ndarray | Sequence[str | Path] | str | Path | None = None,
    class_names: Sequence[str] | None = None,
    metadata: dict[str, str] | None = None,
) -> list[Certificate]:
    """Export a run or a Keras model, reopen every artifact in its own runtime, and certify that it computes the same.

    Args:
        run_or_model: A run, its folder, or a model of `build_model`, trained by whatever means.
        out: The exports folder; a run's own by default.
        formats: "saved_model", "onnx". Formats that a run's exports folder has already are exported anew beside them.
        samples: Real images to verify with: (n, S, S, 3) uint8 of the model's own size, needed for a model. A run has
            its own; for one that lost them also image files or folders of such.
        class_names: K names, for a model.
        metadata: Facts to carry along, for a model.

    Returns:
        A certificate a format.

    Raises:
        CheckError: Where an artifact does not compute what `predict` does; nothing is left then.
    """
    if isinstance(run_or_model, keras.Model):
        if out is None or samples is None:
            raise InputError(
                "To export a model give `out` and `samples`, real images (n, S, S, 3) uint8 to verify with."
            )
        samples = _read_samples(samples, servable(run_or_model)[1])
        names = class_names or [str(index) for index in range(run_or_model.output_shape[-1])]
        labels = np.zeros(len(samples), np.int64)
        return certify(
            run_or_model,
            out,
            formats=formats,
            class_names=names,
            metadata=metadata or {},
            samples=samples,
            labels=labels,
        )
    return _export_run(as_run(run_or_model), out, formats, samples, metadata or {})


def _export_run(run: Run, out, formats: Sequence[str], samples, metadata: dict[str, str]) -> list[Certificate]:
    own = run.path / "exports"
    others: tuple[np.ndarray, ...] = ()
    if samples is None:
        samples, labels, others = _kept_samples(run)
    else:
        samples = _read_samples(samples, run.info["plan"]["image_size"])
        labels = np.zeros(len(samples), np.int64)
    target = Path(out) if out else own
    present = exported_formats(own) if formats and target.resolve() == own.resolve() else ()
    certificates = certify(
        run.model, target, formats=[*formats, *(name for name in present if name not in formats)],
        class_names=run.class_names,
        metadata={
            "source": run.info["source"]["name"], "source_licence": run.info["source"]["licence"],
            "data_fingerprint": run.info["data"]["fingerprint"], **metadata,
        },
        samples=samples, labels=labels, other_size_samples=others,
    )  # fmt: skip
    if target.resolve() == own.resolve():
        (run.path / SAMPLES_FILE).unlink(missing_ok=True)  # exports/ has them now
        run.info["certificates"] = [certificate.to_dict() for certificate in certificates]
        write_info(run.path, run.info)
    return certificates


def _kept_samples(run: Run) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    for path in (run.path / "exports" / SAMPLES_FILE, run.path / SAMPLES_FILE):
        with contextlib.suppress(CheckError):  # a damaged one is as good as none
            kept = read_samples(path)[0]
            return kept.images, kept.labels, kept.real_others
    raise InputError(
        f"{run.path} keeps no samples to verify with ({SAMPLES_FILE} is missing or damaged); give real images: "
        "--samples FOLDER, or `samples` in Python."
    )


def _read_samples(samples: Any, size_px: int) -> np.ndarray:
    """(n, S, S, 3) uint8 of an array of them, or of up to 64 image files or those in a folder."""
    if isinstance(samples, np.ndarray):
        return samples
    paths = [samples] if isinstance(samples, str | Path) else list(samples)
    return decode_images(image_files([Path(path) for path in paths])[:NUM_SAMPLES], size_px)


def _card_of(model: keras.Model) -> Source:
    """The card of the source that a model was built from; once saved and loaded, only by its name."""
    card = getattr(model, "source_card", None) or next((c for c in list_sources() if c.name == model.name), None)
    if card is None:
        raise InputError(
            f"It is not known from which source the model {model.name!r} was built; give one that build_model returned."
        )
    return card


def _image_size_of(model: keras.Model, image_size: int | None) -> int:
    own = model.get_layer("adapt_image").size_px
    if image_size not in (None, own):
        raise InputError(f"image_size {image_size} was given, but the model was built for {own}; drop one of the two.")
    return own
