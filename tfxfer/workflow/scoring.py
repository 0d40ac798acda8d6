"""Evaluate and predict; with a run that has an ONNX artifact neither imports TensorFlow."""

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.data import load_test_data
from tfxfer.errors import CheckError, InputError
from tfxfer.exporters.verify import TOLERANCE
from tfxfer.exporters.verify import verify as verify_exports
from tfxfer.metrics import score
from tfxfer.runtime.images import IMAGE_SUFFIXES, ImageError, decode_image
from tfxfer.runtime.progress import Progress
from tfxfer.sources.catalog import class_names_of, get_source
from tfxfer.specs import Certificate
from tfxfer.workflow.run import MODEL_FILE, RUN_FILE, Run, as_run, load_run, predict_with_keras


class SeenImagesWarning(UserWarning):
    """Images that a model is scored on were among those it was trained or chosen on."""


def trained_on(run: Run) -> set[str]:
    """The SHA-256 of the images in a run's train and validation part, by its split.csv."""
    path = run.path / "split.csv"
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {row["sha256"] for row in csv.DictReader(file) if row["part"] != "test"}


def evaluate(
    run: Run | str | Path, data: Any, *, group_by: str | None = None, progress: Progress | None = None
) -> dict:
    """Score a run on labelled images: the test part of a folder that has one, else all of it.

    Args:
        run: A run or its folder.
        data: What `load_data` takes; classes must be among the run's.
        group_by: Regular expression on paths, for intervals by group.
        progress: Told about decoding.

    Returns:
        What `tfxfer.metrics.score` returns, `quarantined`, and `num_images_trained_on`.

    Warns:
        SeenImagesWarning: Where images were in the run's own train or validation part.
    """
    run = as_run(run)
    size = run.info["plan"]["image_size"]
    progress = progress or Progress()
    progress.phase("reading images")
    found = load_test_data(data, run.class_names, group_by=group_by, image_size=size, on_progress=progress.update)
    test = found.part("test")
    progress.phase("predicting")
    probabilities = run.predict(found.pixel_rows("test", size))
    scores = score(
        test.labels, probabilities, run.class_names, groups=test.groups, weights=test.weights,
        seed=run.info["plan"]["seed"],
    )  # fmt: skip
    known = trained_on(run)
    seen = sum(sha256 in known for sha256 in test.sha256)
    if seen:
        warnings.warn(
            f"{seen} of these {len(test)} images were in the run's own train or validation part: too good a score.",
            SeenImagesWarning,
            stacklevel=2,
        )
    return {
        **scores,
        "num_images_trained_on": seen,
        "quarantined": [{"path": path, "reason": reason} for path, reason in found.quarantined],
    }


def verify(path: Path | str, *, tolerance: float = TOLERANCE) -> list[Certificate]:
    """Prove again that a run is what was certified; `tfxfer.exporters.verify.verify`, and model.keras by its digest.

    Args:
        path: A run folder, or an exports folder.
        tolerance: Largest absolute difference of a probability, default 1e-4.

    Returns:
        A fresh certificate for each artifact, all passed.

    Raises:
        InputError: Where there is no certificate to verify.
        CheckError: Where a file was changed, or an artifact does not compute what the model computed.
    """
    path = Path(path)
    if (path / RUN_FILE).is_file():
        run = load_run(path)
        if "model" in run.info:
            if not (path / MODEL_FILE).is_file():
                raise CheckError(f"{path / MODEL_FILE} is missing; copy it there again.")
            run.check_model()
    return verify_exports(path, tolerance=tolerance)


def predict(run: Run | str | Path, images: np.ndarray | Sequence, *, top_k: int | None = None) -> Any:
    """Predict with a run; see `Run.predict`."""
    return as_run(run).predict(images, top_k)


def predict_with_source(source: str, images: Sequence, *, top_k: int = 5) -> list[list[tuple[str, float]]]:
    """What a source's original output sees in images.

    Args:
        source: Name of a source.
        images: Paths, bytes, or arrays (H, W, C) uint8.
        top_k: Classes an image.

    Returns:
        For each image the likeliest (class name, probability); "class 0" where the source has no names.

    Raises:
        InputError: Where it is not known that the source has classes of its own.
    """
    card = get_source(source)
    if card.num_classes < 2:
        raise InputError(
            f"{source!r} says of no old output that tells classes apart, so there is nothing to predict; train on your "
            "classes first (tfxfer train DATA --source ...), and predict with the run."
        )
    from tfxfer.model.build import build_original

    table = predict_with_keras(build_original(card), card.image_size_px, images)
    names = class_names_of(card) or [f"class {index}" for index in range(table.shape[1])]
    return [[(names[k], float(row[k])) for k in np.argsort(-row, kind="stable")[:top_k]] for row in table]


def predict_files(paths: Sequence[Path], *, source: str | None = None, top_k: int = 1) -> dict[str, list[dict]]:
    """Predict on image files and folders of them, for the command line.

    Args:
        paths: A run's folder first, unless `source` is given; then images and folders, searched for images.
        source: Name of a source whose original output is used.
        top_k: Classes an image.

    Returns:
        `predictions`: path and classes (name, probability) each; `refused`: path and reason each.

    Raises:
        InputError: Where there is nothing to predict on.
    """
    if source:
        files, size = image_files(paths), get_source(source).image_size_px
    else:
        run = load_run(paths[0])
        files, size = image_files(paths[1:]), run.info["plan"]["image_size"]
    pixels, kept, refused = [], [], []
    for file in files:
        try:
            pixels.append(decode_image(file, size))
            kept.append(file)
        except ImageError as error:
            refused.append({"path": str(file), "reason": error.reason})
    found = predict_with_source(source, pixels, top_k=top_k) if source else run.predict(pixels, top_k)
    return {
        "predictions": [
            {"path": str(file), "classes": [{"name": name, "probability": p} for name, p in best]}
            for file, best in zip(kept, found, strict=True)
        ],
        "refused": refused,
    }


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Image files, and those in folders however deep, in order.

    Raises:
        InputError: Where a path is missing, or there is no image.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise InputError(f"No images in {path}; give image files or a folder that holds some.")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"There is no file {path}.")
    if not files:
        raise InputError("Nothing to predict on; give image files or folders behind the run.")
    return files
