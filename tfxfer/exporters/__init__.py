"""Export formats. Adding one is a file here, its line below, and `reopen_NAME.py`, which reopens it in its own runtime.

An exporter is `f(model, folder, *, class_names, metadata) -> Path`: it writes the artifact below `folder` and returns
its path relative to `folder`. `certify` exports and proves; `verify` repeats the proof later.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def _onnx(model: Any, folder: Path, *, class_names: Sequence[str], metadata: Mapping[str, str]) -> Path:
    from tfxfer.exporters.onnx import export_onnx

    return export_onnx(model, folder, class_names=class_names, metadata=metadata)


def _saved_model(model: Any, folder: Path, *, class_names: Sequence[str], metadata: Mapping[str, str]) -> Path:
    from tfxfer.exporters.saved_model import export_saved_model

    return export_saved_model(model, folder, class_names=class_names, metadata=metadata)


EXPORTERS = {
    "onnx": _onnx,
    "saved_model": _saved_model,
}
