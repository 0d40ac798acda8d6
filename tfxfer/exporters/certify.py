"""Export a model, prove every artifact in its own runtime, and only then put the folder in its place."""

import contextlib
import dataclasses
import datetime
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfxfer import __version__
from tfxfer.errors import CheckError, InputError, TfxferError
from tfxfer.exporters import EXPORTERS
from tfxfer.exporters.layout import CERTIFICATE_FILE, SAMPLES_FILE, Artifact, check_replaceable, describe_artifact
from tfxfer.exporters.runtimes import Outcome, reopened
from tfxfer.exporters.samples import TEST_BATCH, Expected, Samples, make_samples, write_samples
from tfxfer.exporters.serving import servable
from tfxfer.exporters.verify import TOLERANCE, CertificateError, compare, failure_sentence
from tfxfer.registry import lookup
from tfxfer.runtime.files import atomic_folder, sha256_of_file, write_json
from tfxfer.runtime.store import Rows
from tfxfer.specs import Certificate


def certify(
    model: keras.Model,
    exports_folder: Path | str,
    *,
    formats: Sequence[str] = ("saved_model", "onnx"),
    class_names: Sequence[str],
    metadata: Mapping[str, str],
    samples: np.ndarray,
    labels: np.ndarray,
    other_size_samples: Sequence[np.ndarray] = (),
    test_images: Rows | None = None,
    test_labels: np.ndarray | None = None,
    test_probabilities: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> list[Certificate]:
    """Export in every format, reopen each artifact in a fresh process of its runtime, and compare with `predict`.

    The folder appears complete or not at all. It holds the artifacts, samples.npz and certificate.json; an earlier
    export there is replaced once the new one has passed. After a failure `exports_folder` is as it was, and
    certificate.json with the figures, without artifacts, is in a folder beside it whose name ends in `.failed`.

    Args:
        model: Images (N, H, W, C) in 0..255 to probabilities (N, K).
        exports_folder: Where the artifacts go.
        formats: Entries of `tfxfer.exporters.EXPORTERS`.
        class_names: K names, in the order of the outputs.
        metadata: Facts that travel with the artifacts, text to text (source, licence, ...).
        samples: (n, S, S, 3) uint8 real images, kept for `verify`; 64 are a good number.
        labels: (n,) int.
        other_size_samples: A few (H, W, 3) uint8 images of other sizes.
        test_images: (m, S, S, 3) uint8; the artifacts' accuracy is measured on them. Not kept.
        test_labels: (m,) int, with test_images.
        test_probabilities: (m, K) that `model.predict` gave for test_images, where it is known already.
        tolerance: Largest absolute difference of a probability, default 1e-4.

    Returns:
        A certificate for each format, in order.

    Raises:
        InputError: Where an argument does not fit.
        CheckError: Where an artifact does not run or does not compute what the model computes.
    """
    exports_folder = Path(exports_folder)
    names = tuple(str(name) for name in class_names)
    _check(model, formats, names, exports_folder)
    kept = make_samples(samples, labels, other_size_samples)
    test = _TestPart.of(test_images, test_labels, test_probabilities)
    proof = _Proof(model, kept, test, names, dict(metadata), tolerance)
    with atomic_folder(exports_folder) as folder:
        certificates = proof.make(folder, formats)
        if not all(certificate.passed for certificate in certificates):
            failed = exports_folder.with_name(exports_folder.name + ".failed")
            write_json(failed / CERTIFICATE_FILE, proof.record)
            sentence = f"{failure_sentence(exports_folder, certificates)} Nothing was kept; {failed} has the figures."
            raise CertificateError(sentence, certificates)
        write_json(folder / CERTIFICATE_FILE, proof.record)
        replaced = _move_aside(exports_folder)
    for leftover in (replaced, exports_folder.with_name(exports_folder.name + ".failed")):
        shutil.rmtree(leftover, ignore_errors=True)
    return certificates


@dataclasses.dataclass(frozen=True, eq=False)
class _TestPart:
    images: Rows
    labels: np.ndarray
    probabilities: np.ndarray | None

    @classmethod
    def of(cls, images, labels, probabilities) -> "_TestPart | None":
        if images is None:
            return None
        if labels is None or len(labels) != len(images) or not len(images):
            raise InputError("test_images for export need as many test_labels, and at least one.")
        if probabilities is not None and len(probabilities) != len(images):
            raise InputError(f"{len(probabilities)} test_probabilities came with {len(images)} test_images.")
        return cls(images, np.asarray(labels), probabilities)

    def accuracy(self, probabilities: np.ndarray) -> float:
        return float((probabilities.argmax(axis=1) == self.labels).mean())


class _Proof:
    """Exports a model into a folder and judges the artifacts; `record` is what certificate.json holds."""

    def __init__(self, model, samples: Samples, test: _TestPart | None, class_names, metadata, tolerance: float):
        self.model, self.image_size_px = servable(model)
        self.samples = samples
        self.test = test
        self.class_names = class_names
        self.metadata = metadata
        self.tolerance = tolerance
        self.seconds: dict[str, float] = {}
        self.record: dict[str, Any] = {}
        if samples.images.shape[1:3] != (self.image_size_px, self.image_size_px):
            raise InputError(
                f"Samples for export are {samples.images.shape[1]} x {samples.images.shape[2]} pixels, and the model "
                f"resizes to {self.image_size_px}; give samples of that size."
            )

    def make(self, folder: Path, formats: Sequence[str]) -> list[Certificate]:
        """Export, reopen and compare. The processes start first and import their runtimes meanwhile."""
        with self._timed("total"), reopened(formats) as (runtimes, scratch):
            tasks = self.samples.write_inputs(scratch, None if self.test is None else self.test.images)
            artifacts = []
            for name in formats:
                artifacts.append(self._export(name, folder))
                runtimes[name].submit(folder / artifacts[-1].path, scratch, tasks)
            with self._timed("predict"):
                expected = _predict(self.model, self.samples, self.test)
            _check_probabilities(expected.images, len(self.class_names))
            with self._timed("wait_for_runtimes"):
                outcomes = [runtimes[name].result() for name in formats]
        certificates = [
            compare(artifact, outcome, tasks, expected, class_names=self.class_names, tolerance=self.tolerance)
            for artifact, outcome in zip(artifacts, outcomes, strict=True)
        ]
        write_samples(folder / SAMPLES_FILE, self.samples, expected)
        self._fill_record(folder, artifacts, certificates, self._accuracies(formats, outcomes, expected))
        return certificates

    def _export(self, name: str, folder: Path) -> Artifact:
        with self._timed(f"export_{name}"):
            try:
                path = EXPORTERS[name](self.model, folder, class_names=self.class_names, metadata=self.metadata)
            except TfxferError:
                raise
            except Exception as error:
                line = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
                raise CheckError(
                    f"The model {self.model.name!r} does not convert to {name}: {type(error).__name__}: {line[:300]}"
                ) from error
            return describe_artifact(name, folder, path)

    def _accuracies(self, formats, outcomes: Sequence[Outcome], expected: Expected) -> dict[str, Any] | None:
        if self.test is None or expected.test is None:
            return None
        found = {"predict": self.test.accuracy(expected.test)}
        for name, outcome in zip(formats, outcomes, strict=True):
            if "test" in outcome.probabilities:
                found[name] = self.test.accuracy(outcome.probabilities["test"])
        return {"num_images": len(self.test.labels), "accuracy": found}

    def _fill_record(self, folder: Path, artifacts: Sequence[Artifact], certificates, test_part) -> None:
        self.record = {
            "tfxfer": __version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "class_names": list(self.class_names),
            "image_size_px": self.image_size_px,
            "metadata": self.metadata,
            "certificates": [certificate.to_dict() for certificate in certificates],
            "files": {name: digest for artifact in artifacts for name, digest in artifact.files.items()},
            "samples_sha256": sha256_of_file(folder / SAMPLES_FILE),
            "test_part": test_part,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def _check(model: keras.Model, formats: Sequence[str], class_names: Sequence[str], exports_folder: Path) -> None:
    if not formats or len(set(formats)) != len(formats):
        raise InputError(f"Give each export format once, at least one; not {', '.join(formats) or 'none'}.")
    for name in formats:
        lookup(EXPORTERS, name, "export format")
    outputs = getattr(model, "output_shape", None)  # a model never built has none
    if not isinstance(outputs, tuple) or len(outputs) != 2:
        raise InputError(f"Cannot export {model.name!r}: its output is {outputs}, not (N, classes).")
    if outputs[1] != len(class_names):
        raise InputError(f"{len(class_names)} class names were given for the {outputs[1]} outputs of {model.name!r}.")
    check_replaceable(exports_folder)


def _check_probabilities(probabilities: np.ndarray, num_classes: int) -> None:
    sums = probabilities.sum(axis=1)
    if probabilities.shape[1] != num_classes or not (np.abs(sums - 1) < 1e-3).all() or probabilities.min() < 0:
        raise InputError(
            f"The model's outputs are not probabilities (rows sum to {sums.min():.3g} .. {sums.max():.3g}, smallest "
            f"{probabilities.min():.3g}): build it without logits=True, or put a softmax behind it."
        )


def _predict(model: keras.Model, samples: Samples, test: _TestPart | None) -> Expected:
    """`model.predict` on everything that is compared, in one pass: shapes differ, and each would be traced anew."""
    groups = [
        _in_batches(samples.images),
        [image[None] for image in samples.others],
        [image[None] for image in samples.decoded],
        _in_batches(test.images) if test is not None and test.probabilities is None else [],
    ]

    def batches() -> Iterator[np.ndarray]:
        for group in groups:
            yield from (batch.astype(np.float32) for batch in group)

    spec = tf.TensorSpec((None, None, None, samples.images.shape[-1]), tf.float32)
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    data = data.apply(tf.data.experimental.assert_cardinality(sum(map(len, groups))))
    with _full_float32():
        every = model.predict(data, verbose=0).astype(np.float32)
    ends = np.cumsum([sum(map(len, group)) for group in groups])
    images, others, decoded, tested = np.split(every, ends[:-1])
    if test is not None and test.probabilities is not None:
        tested = np.asarray(test.probabilities, np.float32)
    return Expected(images, others, decoded, tested if test is not None else None)


def _in_batches(images: Rows) -> list[np.ndarray]:
    return [images[start : start + TEST_BATCH] for start in range(0, len(images), TEST_BATCH)]


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TensorFloat-32 on a GPU: it rounds products to 10 bits, more than the tolerance."""
    was = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(was)


def _move_aside(folder: Path) -> Path:
    """Make room for the new export as the last thing before it is put in place; returns where the old one went."""
    aside = folder.with_name(f".{folder.name}-replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    return aside
