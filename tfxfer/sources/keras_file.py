"""Sources in files of Keras 2 and 3, and in our own runs: read the config, build the body anew, load the weights.

Spelled as a path ending in .keras or .h5 (whole models), or as `run:PATH`. What needs no TensorFlow, the description,
is read by zip, HDF5 and JSON alone.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_file
from tfxfer.sources.network import build, check_digest, custom_objects, network_facts, read_network
from tfxfer.sources.report import LoadReport
from tfxfer.sources.stored_weights import statistics_of
from tfxfer.sources.weights_file import checked_file, load_weights_file
from tfxfer.specs import Source


def describe(
    spelling: str, reference: str, *, weights: str, input_range: str, partial: bool, trusted: Sequence[str]
) -> Source:
    """The card of a file or a run; see `tfxfer.sources`.

    Args:
        spelling: As the user wrote it.
        reference: The path.
        weights: Another file with the weights for the network of this one.
        input_range: What the network wants pixels scaled to, where it does not rescale them itself.
        partial: Whether the weights may be loaded in part.
        trusted: Modules of the user's own.

    Raises:
        InputError: Where the file is missing, refused, damaged, or holds no network of images.
    """
    facts: dict[str, Any] = {"title": f"Keras model {Path(reference).name}", "licence": "unknown"}
    path = Path(reference)
    digest = ""
    if spelling.startswith("run:"):
        path, digest, facts = _run(path, input_range)
    custom_objects(trusted)  # what they register, the gate knows then
    checked_file(path, trusted)
    actual = sha256_of_file(path)
    if digest and actual != digest:
        raise InputError(
            f"{path} has SHA-256 {actual}, but the run recorded {digest}: the file was changed or damaged; train or "
            "copy the run again."
        )
    described = {"file": str(path), "sha256": actual}
    if weights:
        described = {
            "file": str(checked_file(weights, trusted)),
            "sha256": sha256_of_file(Path(weights)),
            "network_file": str(path),
            "network_sha256": actual,
        }
    network = read_network(read_config(path), statistics_of(Path(described["file"])), str(path))
    return Source(
        name=spelling, kind="keras_file", reference=reference, weights=described, partial=partial,
        trusted=tuple(trusted), **network_facts(network, input_range, str(path)), **facts,
    )  # fmt: skip


def load(card: Source, size_px: int, *, weights: bool, include_top: bool, seed: int) -> tuple[Any, LoadReport | None]:
    """Build the body of the file's network and load its weights; see `tfxfer.sources`.

    Raises:
        InputError: Where a file is not what it was when the card was made, or does not fit.
    """
    path = Path(card.weights.get("network_file") or card.weights["file"])
    check_digest(path, card.weights.get("network_sha256") or card.weights["sha256"])
    custom_objects(card.trusted)
    checked_file(path, card.trusted)
    file = Path(card.weights["file"])
    network = read_network(read_config(path), statistics_of(file), str(path))
    model, renamed = build(card, network, size_px, include_top=include_top, seed=None if weights else seed)
    if not weights:
        return model, None
    check_digest(file, card.weights["sha256"])
    return model, load_weights_file(model, file, partial=card.partial, trusted=card.trusted, original_names=renamed)


def read_config(path: Path) -> dict[str, Any]:
    """The config of the whole model in a file that passed the gate.

    Raises:
        InputError: Where the file holds weights only.
    """
    if path.suffix.lower() == ".keras":
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("config.json"))
    import h5py

    with h5py.File(path, "r") as file:
        text = file.attrs.get("model_config")
    if text is None:
        raise InputError(
            f"{path} holds weights only, no network; name the network as the source and give this file as its weights: "
            f"--source py:MODULE:FUNCTION --weights {path} (or keras:NAME, or a .keras file)."
        )
    return json.loads(text)


def _run(folder: Path, input_range: str) -> tuple[Path, str, dict[str, Any]]:
    """The model of a run of ours, its recorded digest, and what the run says about it."""
    file = folder / "run.json"
    if not file.is_file():
        raise InputError(f"{folder} is not a run: it has no run.json. Give the folder that `tfxfer train` wrote.")
    if input_range not in ("", "0..255"):
        raise InputError(f"The model of {folder} rescales pixels inside; drop --input-range.")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        digest, classes = info["model"]["sha256"], tuple(info["data"]["classes"])
        licence, origin = info["source"]["licence"], info["source"]["name"]
        kind = info["source"].get("kind", "")
        name = info["model"]["file"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is damaged or of a run that was not finished; it cannot be a source.") from None
    if kind in ("hub", "kerashub"):
        raise InputError(
            f"{folder} was trained from {origin!r}, whose program cannot be built anew from the run; name {origin!r} "
            "as the source, or go on in Python with load_run(...).model."
        )
    path = folder / Path(name).name
    if not path.is_file():
        raise InputError(f"{folder} has no {name}; it is no finished run.")
    facts = {"title": f"{origin}, trained in {folder.name}", "licence": licence, "class_names": classes}
    facts["fine_tune_depth"] = info["source"].get("fine_tune_depth", -1)
    return path, digest, facts
