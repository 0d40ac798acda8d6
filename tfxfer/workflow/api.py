"""The public verbs that need Keras: fit and export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfxfer.errors import InputError
from tfxfer.exporters.certify import certify
from tfxfer.exporters.layout import SAMPLES_FILE, exported_formats
from tfxfer.exporters.samples import read_samples
from tfxfer.runtime.progress import Progress
from tfxfer.sources.catalog import list_sources
from tfxfer.specs import Certificate, Recipe
from tfxfer.workflow.planning import make_plan
from tfxfer.workflow.run import Run, as_run
from tfxfer.workflow.training import FORMATS, train


def fit(
    model_or_source: keras.Model | str | None = None,
    data: Any = None,
    recipe: str | Recipe | None = None,
    *,
    method: str | None = None,
    freeze_depth: int | str | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    batch_norm: str | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    augment: str | None = None,
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
    formats: Sequence[str] = FORMATS,
    config: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Transfer a source to labelled images: train, choose, score, export, verify, and compare with baselines.

    Args:
        model_or_source: A model of `build_model`, or the name of a source; EfficientNet-Lite0 by default.
        data: A `Dataset`, or whatever `load_data` takes.
        recipe: "auto" (probe, then the last blocks from the probe's solution), "probe", "full", or a `Recipe`.
        method: "fine_tune" (all stages; the default) or "probe" (convex stages only).
        freeze_depth: Leading blocks frozen while fine-tuning: a count, a block's name, or "all".
        epochs: Of fine-tuning; by default six, more where images are few.
        learning_rate: Peak; by default the best of three, measured.
        batch_norm: "frozen" (default), "affine", "adapt" or "train".
        callbacks: Keras callbacks for the fine-tuning epochs, which are numbered through.
        augment: "auto" (default), "mirror" or "none".
        metric: Selected for: "accuracy" (default), "macro_f1" or "balanced_accuracy".
        batch_size: Images a step, default 32.
        image_size: Side in pixels; the source's own by default.
        dropout: Before the head while fine-tuning, default 0.2.
        seed: Of split, shuffle, dropout and bootstrap, default 0.
        val_fraction: Split off for validation where the data brings none, default 0.2.
        group_by: Regular expression on paths; what it captures names a group that never crosses parts.
        near_duplicates: Which images stay together: "on" (default), "turned" (also turned, mirrored and shifted
            copies, such as augmented data), or "off".
        split: A split.csv to reuse.
        time_limit: Seconds of training, kept between epochs.
        baseline: "quick" (default), "scratch" or "none".
        num_seeds: Repetitions of both sides of the baseline comparison, default 1.
        formats: Exports; () for none.
        config: A run's config.toml to start from; arguments win over it.
        out: The run's folder; `runs/NAME-N` by default.
        progress: Told about phases; silent by default.

    Returns:
        The run, complete on disk.

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
    model = model_or_source if isinstance(model_or_source, keras.Model) else None
    source = model_or_source
    if model is not None:
        source = _source_of(model)
        image_size = _image_size_of(model, image_size)
    plan = make_plan(
        config, source=source, recipe=recipe, method=method, freeze_depth=freeze_depth, epochs=epochs,
        learning_rate=learning_rate, batch_norm=batch_norm, augment=augment, metric=metric, batch_size=batch_size,
        image_size=image_size, dropout=dropout, seed=seed, val_fraction=val_fraction, group_by=group_by,
        near_duplicates=near_duplicates,
        time_limit_seconds=time_limit, baseline=baseline, num_seeds=num_seeds,
    )  # fmt: skip
    return train(data, plan, model=model, out=out, split=split, callbacks=callbacks, formats=formats, progress=progress)


def export(
    run_or_model: Run | str | Path | keras.Model,
    out: str | Path | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    samples: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    metadata: dict[str, str] | None = None,
) -> list[Certificate]:
    """Export a run or a Keras model, reopen every artifact in its own runtime, and certify that it computes the same.

    Args:
        run_or_model: A run, its folder, or a model of `build_model`, trained by whatever means.
        out: The exports folder; a run's own by default.
        formats: "saved_model", "onnx". Formats that a run's exports folder has already are exported anew beside them.
        samples: (n, S, S, 3) uint8 real images of the model's own size, needed for a model; a run has its own.
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
    return certificates


def _kept_samples(run: Run) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    for path in (run.path / "exports" / SAMPLES_FILE, run.path / SAMPLES_FILE):
        if path.is_file():
            kept = read_samples(path)[0]
            return kept.images, kept.labels, kept.others[:-1]  # the last is made up, and made again
    raise InputError(f"{run.path} keeps no samples to verify with ({SAMPLES_FILE} is missing); give `samples`.")


def _source_of(model: keras.Model) -> str:
    names = [card.name for card in list_sources()]
    if model.name not in names:
        raise InputError(f"The model {model.name!r} was not made by build_model from a source; give one that was.")
    return model.name


def _image_size_of(model: keras.Model, image_size: int | None) -> int:
    own = model.get_layer("adapt_image").size_px
    if image_size not in (None, own):
        raise InputError(f"image_size {image_size} was given, but the model was built for {own}; drop one of the two.")
    return own
