"""What says that an exported artifact computes what the model computes."""

import dataclasses
from typing import ClassVar

from tfxfer.specs.base import Spec


@dataclasses.dataclass(frozen=True)
class Certificate(Spec):
    """The proof that an exported artifact computes what the model computes.

    Attributes:
        format: "saved_model" or "onnx".
        path: Of the artifact, relative to the certificate.
        sha256: Digest of the artifact (of all files and their names, for a folder).
        runtime: Name and version of what reopened it.
        num_images: Real images compared.
        batch_sizes: Batches they were fed in.
        max_abs_difference, mean_abs_difference: Of probabilities, over everything compared.
        tolerance: Largest difference allowed.
        top1_agreement: Share of images with the same first class, ties below the tolerance counted as the same.
        passed: The verdict.
        problems: One sentence each, empty where it passed.
    """

    what: ClassVar[str] = "certificate"
    format: str
    path: str
    sha256: str
    runtime: str
    num_images: int
    batch_sizes: tuple[int, ...]
    max_abs_difference: float
    mean_abs_difference: float
    tolerance: float
    top1_agreement: float
    passed: bool
    problems: tuple[str, ...] = ()
