"""Reopen exported artifacts in their own runtimes and compare with `predict`. Imports no TensorFlow itself."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tfxfer.errors import CheckError
from tfxfer.exporters.layout import SAMPLES_FILE, Artifact, check_digests, exports_of, read_record
from tfxfer.exporters.runtimes import Outcome, reopened
from tfxfer.exporters.samples import Expected, Task, read_samples
from tfxfer.specs import Certificate

TOLERANCE = 1e-4
# A made-up picture is unlike anything that the head was fitted on, so its logits are large and so is their rounding
# error. It is there to show swapped channels or a wrong resize, which move probabilities by tenths.
MADE_UP_SLACK = 10.0


class CertificateError(CheckError):
    """Artifacts do not compute what the model computes; `certificates` has the figures."""

    def __init__(self, sentence: str, certificates: Sequence[Certificate] = ()):
        super().__init__(sentence)
        self.certificates = tuple(certificates)


def verify(path: Path | str, *, tolerance: float = TOLERANCE) -> list[Certificate]:
    """Prove again that the artifacts of a run are whole and compute what the model computed when it was exported.

    First the digests of all files; then each artifact in a fresh process of its own runtime (SavedModel without
    tfxfer importable, ONNX without TensorFlow), fed with the kept samples at batch 1, 3 and all, with images of other
    sizes and with encoded files. Changes nothing; the folder may have been moved.

    Args:
        path: A run folder, or its exports folder.
        tolerance: Largest absolute difference of a probability, default 1e-4.

    Returns:
        A fresh certificate for each artifact, all passed.

    Raises:
        InputError: Where there is no certificate to verify.
        CheckError: Where a file was changed, or an artifact does not compute what the model computed.
    """
    folder = exports_of(Path(path))
    record = read_record(folder)
    check_digests(folder, record)
    samples, expected = read_samples(folder / SAMPLES_FILE)
    artifacts = [
        Artifact(entry["format"], entry["path"], entry["sha256"], record["files"]) for entry in record["certificates"]
    ]
    with reopened([artifact.format for artifact in artifacts]) as (runtimes, scratch):
        tasks = samples.write_inputs(scratch)
        for artifact in artifacts:
            runtimes[artifact.format].submit(folder / artifact.path, scratch, tasks)
        certificates = [
            compare(
                artifact,
                runtimes[artifact.format].result(),
                tasks,
                expected,
                class_names=record["class_names"],
                tolerance=tolerance,
            )
            for artifact in artifacts
        ]
    if not all(certificate.passed for certificate in certificates):
        raise CertificateError(failure_sentence(folder, certificates), certificates)
    return certificates


def compare(
    artifact: Artifact,
    outcome: Outcome,
    tasks: Sequence[Task],
    expected: Expected,
    *,
    class_names: Sequence[str],
    tolerance: float,
) -> Certificate:
    """Judge what an artifact gave against what `predict` gave.

    Args:
        artifact: What was reopened.
        outcome: What it gave.
        tasks: How it was fed.
        expected: Probabilities by `predict`.
        class_names: K names, in the order of the outputs.
        tolerance: Largest absolute difference of a probability; made-up images may differ ten times as much, and do
            not count in the certificate's figures.

    Returns:
        The certificate, passed or with a sentence for each problem.
    """
    problems = [outcome.problem] if outcome.problem else _naming_problems(outcome.class_names, class_names)
    differences, agreements = [], []
    done = [task for task in tasks if task.name in outcome.probabilities]
    for task in done:
        got, want = outcome.probabilities[task.name], expected.of(task)
        if got.shape != want.shape:
            problems.append(f"{_where(task)}: it gives shape {got.shape}, not {want.shape}")
            continue
        difference = np.abs(got.astype(np.float64) - want)
        allowed = np.full(len(want), tolerance)
        allowed[list(task.made_up)] *= MADE_UP_SLACK
        same = same_first_class(got, want, allowed)
        real = np.delete(np.arange(len(want)), list(task.made_up))
        differences.append(difference[real].ravel())
        agreements.append(same[real])
        wrong = ~(difference.max(axis=1) <= allowed)  # also where it is NaN
        if wrong.any():
            largest, limit = difference[wrong].max(), allowed[wrong].min()
            problems.append(f"{_where(task)}: probabilities differ by {largest:.3g} (allowed {limit:g})")
        if not same.all():
            problems.append(f"{_where(task)}: the first class differs for {int((~same).sum())} of {len(same)} images")
        first = [outcome.class_names[column] for column in got.argmax(axis=1) if column < len(outcome.class_names)]
        if outcome.classes[task.name].tolist() != first:
            problems.append(f"{_where(task)}: `classes` does not name the largest of `probabilities`")
    every = np.concatenate(differences) if differences else np.ones(1)
    every = np.where(np.isfinite(every), every, 1.0)
    if not outcome.problem and not any(task.kind == "images" for task in done):
        problems.append("it computed nothing")
    return Certificate(
        format=artifact.format,
        path=artifact.path,
        sha256=artifact.sha256,
        runtime=outcome.runtime,
        num_images=max((task.count for task in done if task.name != "test"), default=0),
        batch_sizes=tuple(sorted({task.batch_size for task in done if task.name.startswith("batch_")})),
        max_abs_difference=float(every.max()),
        mean_abs_difference=float(every.mean()),
        tolerance=tolerance,
        top1_agreement=float(np.concatenate(agreements).mean()) if agreements else 0.0,
        passed=not problems,
        problems=tuple(problems),
    )


def same_first_class(got: np.ndarray, want: np.ndarray, tolerance: float | np.ndarray) -> np.ndarray:
    """Whether the largest column is the same, row by row; where the two are tied in `want`, either will do.

    Args:
        got, want: (n, K) probabilities.
        tolerance: Probabilities closer than this are tied; a number, or one a row.

    Returns:
        (n,) bool.

    Example:
        >>> import numpy as np
        >>> want = np.array([[0.50001, 0.49999], [0.6, 0.4]])
        >>> same_first_class(want[:, ::-1], want, 1e-4).tolist()
        [True, False]
    """
    rows = np.arange(len(want))
    gap = want.max(axis=1, initial=-np.inf) - want[rows, got.argmax(axis=1)]
    return gap < tolerance


def failure_sentence(folder: Path, certificates: Sequence[Certificate]) -> str:
    """One sentence on every certificate that did not pass."""
    parts = []
    for certificate in certificates:
        if not certificate.passed:
            shown = "; ".join(certificate.problems[:3])
            more = f"; and {len(certificate.problems) - 3} more" if len(certificate.problems) > 3 else ""
            parts.append(f"{certificate.format} ({certificate.path}): {shown}{more}")
    return f"The export in {folder} does not compute what the model computes. " + " | ".join(parts) + "."


def _where(task: Task) -> str:
    if task.name == "test":
        return "on the test part"
    if task.name.startswith("other_"):
        return f"on image {task.name} of another size"
    return f"on {'encoded files' if task.kind == 'bytes' else 'the samples'} at batch {task.batch_size}"


def _naming_problems(found: Sequence[str], wanted: Sequence[str]) -> list[str]:
    if len(found) != len(wanted):
        return [f"it has {len(found)} class names, not {len(wanted)}"]
    wrong = [index for index, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]]
    return [f"it names class {index} {found[index]!r}, not {wanted[index]!r}" for index in wrong[:1]]
