"""What lies where in an exports folder, and whether it is still what was certified."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfxfer.errors import CheckError, InputError
from tfxfer.runtime.files import sha256_of_file, sha256_of_folder

CERTIFICATE_FILE = "certificate.json"
SAMPLES_FILE = "samples.npz"
OWN_NAMES = frozenset({CERTIFICATE_FILE, SAMPLES_FILE, "saved_model", "model.onnx"})


@dataclasses.dataclass(frozen=True)
class Artifact:
    """One exported artifact.

    Attributes:
        format: The entry of `tfxfer.exporters.EXPORTERS` that wrote it.
        path: Relative to the exports folder.
        sha256: Of the file, or of all names and contents below the folder.
        files: Path relative to the exports folder, to SHA-256, for each file of it.
    """

    format: str
    path: str
    sha256: str
    files: Mapping[str, str]


def describe_artifact(format_name: str, folder: Path, path: Path) -> Artifact:
    """Digests of the artifact `folder / path`."""
    target = folder / path
    digest = sha256_of_folder(target) if target.is_dir() else sha256_of_file(target)
    return Artifact(format_name, path.as_posix(), digest, _digests(folder, target))


def _digests(folder: Path, target: Path) -> dict[str, str]:
    files = sorted(file for file in target.rglob("*") if file.is_file()) if target.is_dir() else [target]
    return {file.relative_to(folder).as_posix(): sha256_of_file(file) for file in files if file.exists()}


def exports_of(path: Path) -> Path:
    """The exports folder of a run, or `path` itself where it is one.

    Raises:
        InputError: Where neither has a certificate.
    """
    for folder in (path / "exports", path):
        if (folder / CERTIFICATE_FILE).is_file():
            return folder
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give a run folder or its exports folder.")
    for failed in (path / "exports.failed", path.with_name(path.name + ".failed")):
        if (failed / CERTIFICATE_FILE).is_file():
            raise InputError(f"The export of {path} failed, so there is nothing to verify; {failed} says why.")
    raise InputError(f"{path} has no {CERTIFICATE_FILE}, nor has {path / 'exports'}; export the model first.")


def read_record(folder: Path) -> dict[str, Any]:
    """The content of certificate.json.

    Raises:
        CheckError: Where it is damaged.
    """
    path = folder / CERTIFICATE_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        needed = record["certificates"], record["files"], record["class_names"], record["samples_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"{path} is damaged ({type(error).__name__}: {error}); export the model again.") from None
    if not needed[0]:
        raise CheckError(f"{path} certifies no artifact; export the model again.")
    return record


def exported_formats(folder: Path) -> tuple[str, ...]:
    """The formats that an exports folder has a certificate for; none where it has none, or a damaged one."""
    try:
        return tuple(entry["format"] for entry in read_record(folder)["certificates"])
    except CheckError:
        return ()


def check_digests(folder: Path, record: Mapping[str, Any]) -> None:
    """Compare every file with its digest in certificate.json.

    Raises:
        CheckError: Names each file that was changed, is missing or was added.
    """
    problems = []
    expected = {**record["files"], SAMPLES_FILE: record["samples_sha256"]}
    found = _digests(folder, folder / SAMPLES_FILE)
    for entry in record["certificates"]:
        found |= _digests(folder, folder / entry["path"])
    for name in sorted({*expected, *found}):
        if name not in found:
            problems.append(f"{name} is missing")
        elif name not in expected:
            problems.append(f"{name} was added")
        elif found[name] != expected[name]:
            problems.append(f"{name} was changed (SHA-256 {found[name][:12]}..., certified {expected[name][:12]}...)")
    if problems:
        raise CheckError(
            f"{folder} is not what was certified: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}. Export the model again."
        )


def check_replaceable(folder: Path) -> None:
    """Refuse to put exports where something else lies.

    Raises:
        InputError: Where `folder` is a file, or has content that no export of ours wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; exports need a folder.")
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    strangers = sorted(set(names) - OWN_NAMES)
    if strangers:
        raise InputError(
            f"{folder} has other content ({', '.join(strangers[:3])}); give a folder that is new, empty, or an earlier "
            "export."
        )
