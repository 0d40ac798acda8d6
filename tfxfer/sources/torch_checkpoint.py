"""Weights from torch checkpoints, read without torch and without trust: of a card's package, or of the user's file.

A package's file is checked by SHA-256, read by an unpickler that knows few names and runs nothing else, turned into
Keras' layout and kept in the cache folder, so that the next load needs neither.
"""

import dataclasses
import hashlib
import importlib.util
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import InputError
from tfxfer.registry import lookup
from tfxfer.runtime.files import atomic_path, cache_dir, locked, sha256_of_bytes, sha256_of_file
from tfxfer.sources.builders import TORCH_MODULES, build_network
from tfxfer.sources.catalog import list_sources
from tfxfer.sources.network import check_digest
from tfxfer.sources.ranges import range_facts
from tfxfer.sources.report import LoadReport
from tfxfer.sources.state_dict import assign, load_state_dict, read_state_dict, to_keras
from tfxfer.sources.torch_pickle import read_checkpoint
from tfxfer.specs import Source

# Part of the cache's file name: raise it when the conversion changes.
LAYOUT_VERSION = 1


def describe(
    spelling: str,
    reference: str,
    *,
    weights: str = "",
    input_range: str = "",
    partial: bool = False,
    trusted: Sequence[str] = (),
) -> Source:
    """The card of an architecture with the weights of the user's own state dict; see `tfxfer.sources`.

    Args:
        spelling: As the user wrote it.
        reference: An entry of `TORCH_MODULES`.
        weights: The file, .pth, .pt, .bin or .safetensors.
        input_range: What the network was trained on, where that is not what the published weights were.
        partial: Whether the weights may be loaded in part.
        trusted: Not used: state dicts hold no objects.

    Raises:
        InputError: Where there is no such architecture or no file.
    """
    lookup(TORCH_MODULES, reference, "architecture for a torch checkpoint")
    card = next(card for card in list_sources() if card.architecture == reference)
    if not weights:
        raise InputError(
            f"{spelling!r} is an architecture without weights; give a state dict (--weights FILE, .pth, .pt, .bin or "
            f".safetensors), or take the source {card.name!r}, which has published ones."
        )
    if not Path(weights).is_file():
        raise InputError(f"There is no file {weights}; give a state dict in .pth, .pt, .bin or .safetensors.")
    facts: dict[str, Any] = range_facts(input_range) if input_range else {}
    return dataclasses.replace(
        card,
        name=spelling,
        title=f"{card.title.partition(',')[0]}, weights of a file",
        reference=reference,
        licence="unknown",
        url="",
        notes="",
        weights={"file": weights, "sha256": sha256_of_file(Path(weights))},
        num_classes=0,
        class_names=(),
        partial=partial,
        **facts,
    )


def load(card: Source, size_px: int, *, weights: bool, include_top: bool, seed: int) -> tuple[Any, LoadReport | None]:
    """Build the network of the card's architecture and load its weights; see `tfxfer.sources`.

    Raises:
        InputError: Where the weights are missing, have another SHA-256, are refused by the gate, or do not fit.
    """
    model = build_network(card, size_px, include_top=include_top, seed=seed)
    if not weights:
        return model, None
    if "package" in card.weights:
        load_weights(card, model)
        return model, None
    path = Path(card.weights["file"])
    check_digest(path, card.weights["sha256"])
    modules = lookup(TORCH_MODULES, card.architecture, "architecture for a torch checkpoint")()
    return model, load_state_dict(model, read_state_dict(path), modules, path, partial=card.partial)


def load_weights(source: Source, model: Any) -> None:
    """Set the weights of `source` on `model`, every one of them.

    Args:
        source: Its `weights` name `package`, `file` in it, `sha256` and `install`.
        model: What the builder of its architecture made, with or without the top.

    Raises:
        InputError: Where the package is missing, the file has another SHA-256, or its arrays do not fit the model.
    """
    assign(model, converted_weights(source), f"The weights of {source.name!r}")


def converted_weights(source: Source) -> dict[str, np.ndarray]:
    """The arrays of `source` in Keras' layout by "layer/variable"; from the cache, or converted and kept there.

    Any number of processes may call it at once: one converts, the others wait and read. A damaged cache file is
    made again.

    Raises:
        InputError: As `load_weights`.
    """
    name = f"{source.architecture}-{source.weights['sha256']}-{LAYOUT_VERSION}.npz"
    try:
        cached = cache_dir() / "weights" / name
        arrays = _read_cache(cached)
        if arrays is None:
            with locked(cached):
                arrays = _read_cache(cached)
                if arrays is None:
                    arrays = _convert_source(source)
                    _write_cache(cached, arrays)
        return arrays
    except OSError:  # a cache that cannot be written costs time, not the result
        return _convert_source(source)


def weights_path(source: Source) -> Path:
    """The checkpoint inside its package; the package is found, not imported.

    Raises:
        InputError: Where the package or the file is missing; says the command that installs it.
    """
    package, file = source.weights["package"], source.weights["file"]
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or ()) if found else []
    if not places:
        raise InputError(
            f"The weights of {source.name!r} come in the package {package!r}, which is not installed; "
            f"run: {source.weights['install']}"
        )
    path = Path(places[0]) / file
    if not path.is_file():
        raise InputError(
            f"The installed package {package!r} lacks {path}, the weights of {source.name!r}; "
            f"install it again: {source.weights['install']}"
        )
    return path


def _convert_source(source: Source) -> dict[str, np.ndarray]:
    path = weights_path(source)
    content = path.read_bytes()
    digest = sha256_of_bytes(content)
    if digest != source.weights["sha256"]:
        raise InputError(
            f"{path} has SHA-256 {digest}, but the card of {source.name!r} says {source.weights['sha256']}: "
            f"the file was changed or damaged; install it again: {source.weights['install']}"
        )
    modules = lookup(TORCH_MODULES, source.architecture, "architecture for a torch checkpoint")()
    return to_keras(read_checkpoint(content, str(path)), modules)


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 over names, shapes and values, 32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return np.frombuffer(digest.digest(), np.uint8)


def _write_cache(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic_path(path) as temporary:
        np.savez(temporary, sha256=_digest(arrays), **arrays)  # type: ignore[arg-type]


def _read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays, or None where the file is absent or is not what was written."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        digest = arrays.pop("sha256")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return None
    return arrays if np.array_equal(digest, _digest(arrays)) else None
