"""Predict with an exported ONNX file: onnxruntime and Pillow, no TensorFlow, so that it answers in a second."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tfxfer.errors import InputError
from tfxfer.runtime.images import decode_image, map_threads, resize_image
from tfxfer.runtime.store import Rows

ImageLike = str | Path | bytes | np.ndarray


class OnnxPredictor:
    """A model.onnx that tfxfer exported.

    Args:
        path: The ONNX file.
        batch_size: Images a call of the runtime, at least 1.

    Attributes:
        class_names: Names of the K classes, in the order of the outputs.
        image_size_px: Side that the model resizes images to.
        metadata: Everything that the file says about itself, text to text.

    Raises:
        InputError: Where the file is missing, does not run, or is not an export of tfxfer.

    Example:
        >>> predictor = OnnxPredictor("runs/clothing-1/exports/model.onnx")  # doctest: +SKIP
        >>> predictor.top(predictor.predict(["photo.jpg"]), k=1)  # doctest: +SKIP
        [[('dress', 0.97)]]
    """

    def __init__(self, path: str | Path, *, batch_size: int = 32) -> None:
        if not Path(path).is_file():
            raise InputError(f"There is no ONNX file {path}; export the model first.")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}.")
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            line = str(error).strip().splitlines()[0][:200]
            raise InputError(f"{path} is not an ONNX file that onnxruntime can run: {line}") from None
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        try:
            self.class_names: tuple[str, ...] = tuple(json.loads(self.metadata["class_names"]))
            self.image_size_px = int(self.metadata["image_size"])
        except (KeyError, ValueError, TypeError):
            raise InputError(f"{path} has no class names and image size inside; it is no export of tfxfer.") from None
        self._batch_size = batch_size

    def predict(self, images: Rows | Sequence[ImageLike]) -> np.ndarray:
        """Probabilities of images.

        Args:
            images: (N, H, W, 3) uint8, RGB, any size, in memory or rows in a file; or a list of paths, encoded files
                (bytes) and uint8 arrays (H, W, 1..4), each of its own size.

        Returns:
            (N, K) float32.

        Raises:
            InputError: Where an image cannot be read; `ImageError` for a file.
        """
        if isinstance(images, str | bytes | Path):
            raise InputError("Give a list of images, also for one.")
        pieces = [self._run(batch) for batch in self._batches(images)]
        return np.concatenate(pieces) if pieces else np.zeros((0, len(self.class_names)), np.float32)

    def top(self, probabilities: np.ndarray, k: int = 5) -> list[list[tuple[str, float]]]:
        """The `k` likeliest classes of each row, likeliest first, as (name, probability).

        Args:
            probabilities: (N, K) by `predict`.
            k: At least 1; more than K gives all K.

        Raises:
            InputError: Where k is less than 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}.")
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
        return [
            [(self.class_names[column], float(row[column])) for column in columns]
            for row, columns in zip(probabilities, order, strict=True)
        ]

    def _run(self, batch: np.ndarray) -> np.ndarray:
        (probabilities,) = self._session.run(["probabilities"], {"images": np.ascontiguousarray(batch)})
        return probabilities

    def _batches(self, images: Any) -> Iterator[np.ndarray]:
        shape: tuple[int, ...] = getattr(images, "shape", ())
        if len(shape) == 4 and shape[-1] == 3:
            if images.dtype != np.uint8:
                raise InputError(f"Images must be uint8 in 0..255, not {images.dtype}.")
            for start in range(0, len(images), self._batch_size):
                yield images[start : start + self._batch_size]
            return
        batch: list[np.ndarray] = []
        for pixels in map_threads(self._decode, images):  # threads read ahead while the runtime computes
            batch.append(pixels)
            if len(batch) == self._batch_size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    def _decode(self, image: ImageLike) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return resize_image(image, self.image_size_px)
        return decode_image(image, self.image_size_px)
