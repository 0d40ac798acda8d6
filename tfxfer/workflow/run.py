"""A run: the folder with everything about one training."""

import csv
import functools
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.data.values import as_images
from tfxfer.errors import CheckError, InputError
from tfxfer.runtime.files import atomic_path, sha256_of_file, write_json
from tfxfer.runtime.store import Rows
from tfxfer.sources.safety import check_finite, check_keras_archive
from tfxfer.specs import Plan
from tfxfer.train.lock import check_free

RUN_FILE = "run.json"
MODEL_FILE = "model.keras"
CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.toml"


class Run:
    """A finished (or interrupted) training on disk.

    Attributes:
        path: Its folder.
        info: What run.json holds.
        trusted: Modules of the user's own code that custom objects in model.keras may come from.

    Example:
        >>> run = load_run("runs/clothing-1")  # doctest: +SKIP
        >>> run.metrics["test"]["accuracy"]["value"]  # doctest: +SKIP
        0.86
    """

    def __init__(self, path: Path, info: dict[str, Any], trusted: Sequence[str] = ()):
        self.path = Path(path)
        self.info = info
        self.trusted = tuple(trusted)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the outputs."""
        return tuple(self.info["data"]["classes"])

    @property
    def metrics(self) -> dict[str, Any]:
        """`validation` and `test`, each as `tfxfer.metrics.score` returns it."""
        return self.info.get("metrics", {})

    @functools.cached_property
    def model(self) -> Any:
        """The trained `keras.Model`: images (N, H, W, C) in 0..255 to probabilities."""
        path = self.path / MODEL_FILE
        if not path.is_file():
            raise InputError(f"{self.path} has no {MODEL_FILE}; it is no finished run.")
        self.check_model()
        check_keras_archive(path, trusted=self.trusted)
        return _loaded(path, self.trusted, self.info.get("source", {}).get("kind", ""))

    def check_model(self) -> None:
        """Compare model.keras with its digest in run.json.

        Raises:
            CheckError: Where it is another file.
        """
        path = self.path / MODEL_FILE
        if sha256_of_file(path) != self.info.get("model", {}).get("sha256"):
            raise CheckError(f"{path} is not the model that the run recorded; train or copy it again.")

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict an epoch: stage, epoch, learning rate, losses, scores."""
        path = self.path / "history.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: _number(value) for key, value in row.items() if value != ""} for row in csv.DictReader(file)]

    @property
    def onnx_path(self) -> Path | None:
        """The ONNX artifact, where there is one."""
        path = self.path / "exports" / "model.onnx"
        return path if path.is_file() else None

    def predict(self, images: Rows | Sequence, top_k: int | None = None) -> Any:
        """Predict on paths or arrays, with the ONNX artifact where there is one (no TensorFlow is imported then).

        Args:
            images: (N, H, W, 3) uint8 or numbers in 0..255, or a list of paths, bytes and arrays (H, W, C) uint8.
            top_k: Return names instead of numbers.

        Returns:
            (N, K) float32 probabilities; with `top_k` a list for each image of (class name, probability).
        """
        if isinstance(images, np.ndarray) and images.dtype != np.uint8:
            images = np.stack(as_images(images))  # floats of another range are refused
        predict = self._predictor()
        probabilities = predict(images)
        if top_k is None:
            return probabilities
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        names = self.class_names
        return [[(names[k], float(row[k])) for k in best] for row, best in zip(probabilities, order, strict=True)]

    def _predictor(self) -> Any:
        if self.onnx_path:
            from tfxfer.runtime.predictor import OnnxPredictor

            certified = [c["sha256"] for c in self.info.get("certificates", ()) if c["format"] == "onnx"]
            if certified and sha256_of_file(self.onnx_path) not in certified:
                raise CheckError(f"{self.onnx_path} is not the file that was certified; run: tfxfer export {self.path}")
            return OnnxPredictor(self.onnx_path).predict
        return functools.partial(predict_with_keras, self.model, self.info["plan"]["image_size"])


def predict_with_keras(model: Any, size_px: int, images: Rows | Sequence) -> np.ndarray:
    """Probabilities by a Keras model for what `Run.predict` takes."""
    from tfxfer.model.predict import predict_in_batches
    from tfxfer.runtime.images import decode_image, resize_image

    if not hasattr(images, "shape"):
        pixels = [resize_image(i, size_px) if isinstance(i, np.ndarray) else decode_image(i, size_px) for i in images]
        images = np.stack(pixels) if pixels else np.zeros((0, size_px, size_px, 3), np.uint8)
    return predict_in_batches(model, images)


def _loaded(path: Path, trusted: Sequence[str], kind: str) -> Any:
    import keras

    import tfxfer.model.preprocess
    import tfxfer.sources.hub_layer  # noqa: F401  both register their layers

    for module in (*trusted, *(["tfxfer.sources.kerashub_layer", "keras_hub"] if kind == "kerashub" else [])):
        importlib.import_module(module)
    try:
        model = keras.models.load_model(path, compile=False)
    except ValueError as error:  # Keras puts what its layers raise into a story of its own
        cause = error.__cause__ or error.__context__
        if isinstance(cause, InputError):
            raise cause from None
        raise CheckError(f"Keras cannot open {path}: {' '.join(str(error).split())[:300]}") from None
    check_finite(((variable.path, variable) for variable in model.weights), f"The weights in {path}")
    return model


def load_run(path: str | Path, *, trusted: Sequence[str] = ()) -> Run:
    """Open a run folder.

    Args:
        path: The folder.
        trusted: Modules of your own code that custom objects in model.keras may come from.

    Raises:
        InputError: Where the folder is missing or holds no run.json.
    """
    path = Path(path)
    file = path / RUN_FILE
    if not path.is_dir():
        raise InputError(f"There is no folder {path}; give the folder that `tfxfer train` wrote.")
    if not file.is_file():
        raise InputError(f"{path} is not a run: it has no {RUN_FILE}. Give the folder that `tfxfer train` wrote.")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        info["data"]["classes"], info["plan"]["image_size"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise InputError(f"{file} is damaged; the run cannot be opened.") from None
    return Run(path, info, trusted)


def as_run(run: Run | str | Path) -> Run:
    """A run, or the folder of one."""
    return run if isinstance(run, Run) else load_run(run)


def new_run_folder(out: str | Path | None, name: str) -> Path:
    """The folder of a new run: `out`, or the next free `runs/NAME-N`. It is not made yet.

    Raises:
        InputError: Where `out` exists and is not an empty folder.
    """
    if out is None:
        base = Path("runs")
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "run"
        taken = [
            int(found.name[len(stem) + 1 :])
            for found in base.glob(f"{stem}-*")
            if found.name[len(stem) + 1 :].isdigit()
        ]
        return base / f"{stem}-{max(taken, default=0) + 1}"
    out = Path(out)
    check_free(out)
    if (out / RUN_FILE).exists():
        unfinished = _status(out) not in ("complete", "")
        go_on = "go on with it by --resume, " if unfinished else ""
        raise InputError(f"{out} is already a run; {go_on}give another --out, or remove it first.")
    at = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not at.is_dir() or (at == out and any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; give another --out.")
    return out


def begun_run(out: str | Path | None, plan: Plan) -> Run:
    """The run in a folder that is to be gone on with.

    Args:
        out: Its folder.
        plan: What is asked for; must be what the run was begun with.

    Raises:
        InputError: Where there is no such run, or it was begun with another plan.
    """
    if out is None:
        raise InputError("To resume, name the run's folder: --out RUN --resume.")
    check_free(Path(out))
    run = load_run(out)
    before, wanted = run.info["plan"], json.loads(json.dumps(plan.to_dict()))
    other = [key for key in wanted if before.get(key) != wanted[key]]
    if other:
        raise InputError(
            f"{run.path} was begun with another {' and '.join(other)}; resume it without such options, or train anew "
            "into another --out."
        )
    return run


def begun_config(out: str | Path) -> Path:
    """The plan of a run that is to be gone on with.

    Raises:
        InputError: Where none was begun there.
    """
    config = Path(out) / CONFIG_FILE
    if not config.is_file():
        raise InputError(f"{out} is no run that was begun: it has no {CONFIG_FILE}; drop --resume to train anew.")
    return config


def _status(folder: Path) -> str:
    try:
        return str(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("status", ""))
    except (ValueError, OSError, AttributeError):
        return ""


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Write run.json atomically."""
    write_json(folder / RUN_FILE, info)


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Write history.csv atomically; a column for every key that comes up."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def _number(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() and "." not in text else value
