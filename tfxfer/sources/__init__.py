"""Pretrained models: the cards' catalogue, one file a kind of source, the architectures, the gate for model files.

A kind is a module with
    load(card, size_px, *, weights, include_top, seed) -> (keras.Model, LoadReport | None)
and, where users spell it with a prefix or a suffix,
    describe(spelling, reference, *, weights, input_range, partial, trusted) -> Source
which says what is known without loading more than it must. The model takes normalised float32 images (N, S, S, 3),
that is `pixel * scale + offset` of the card, and gives features (N, F), or logits (N, K) with `include_top`.
"""

from collections.abc import Callable
from types import ModuleType


def _applications() -> ModuleType:
    from tfxfer.sources import applications

    return applications


def _hub() -> ModuleType:
    from tfxfer.sources import hub

    return hub


def _keras_file() -> ModuleType:
    from tfxfer.sources import keras_file

    return keras_file


def _keras_h5() -> ModuleType:
    from tfxfer.sources import legacy_h5

    return legacy_h5


def _kerashub() -> ModuleType:
    from tfxfer.sources import kerashub

    return kerashub


def _own() -> ModuleType:
    from tfxfer.sources import own

    return own


def _torch_checkpoint() -> ModuleType:
    from tfxfer.sources import torch_checkpoint

    return torch_checkpoint


KINDS: dict[str, Callable[[], ModuleType]] = {
    "applications": _applications,
    "hub": _hub,
    "keras_file": _keras_file,
    "keras_h5": _keras_h5,
    "kerashub": _kerashub,
    "own": _own,
    "torch_checkpoint": _torch_checkpoint,
}

# How a source is spelled that has no card: by PREFIX:REFERENCE, or by a path with one of the suffixes.
PREFIXES = {
    "hub": "hub",
    "keras": "applications",
    "kerashub": "kerashub",
    "py": "own",
    "run": "keras_file",
    "torch": "torch_checkpoint",
}
SUFFIXES = {
    ".h5": "keras_file",
    ".keras": "keras_file",
}
