"""The gate: a model file is a program, so it is read and checked before Keras or TensorFlow sees it.

It reads zip, HDF5, pickle and protocol buffers without running anything and without importing TensorFlow, goes by
lists of what is allowed, and has no switch that turns code execution on: `trusted` names modules of the user's own
whose classes may stand in a config, and never lets code inside the file through.

What the gate has passed is as safe as the libraries that read it then; keep its SHA-256 and check it at every reload.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfxfer.errors import InputError

if TYPE_CHECKING:
    import h5py

# By the end of the name, since that is what the loaders go by.
_BY_SUFFIX = {
    ".keras": "keras",
    ".h5": "h5",
    ".hdf5": "h5",
    ".pth": "torch",
    ".pt": "torch",
    ".bin": "torch",
    ".safetensors": "safetensors",
    ".tar.gz": "archive",
    ".tgz": "archive",
    ".tar": "archive",
}


def check_model_file(path: str | Path, *, trusted: Sequence[str] = ()) -> None:
    """Check any model file or folder before it is loaded.

    Args:
        path: A .keras, .h5, .hdf5, .weights.h5, .pth, .pt, .bin or .safetensors file, a .tar.gz of a SavedModel, a
            SavedModel folder, or the folder of a KerasHub preset. Another name is judged by its first bytes.
        trusted: Modules of the user's own (`--trust-custom-objects`); their classes may stand in a Keras config.

    Raises:
        InputError: Where it is refused; one sentence with the file, the place in it, the reason and what to do.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> _ = file.write_bytes((2).to_bytes(8, "little") + b"{}")
        >>> check_model_file(file)
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{str(path)!r} does not exist; give the path of a model file or folder.")
    kind = _kind(path)
    if kind is None:
        raise InputError(
            f"{str(path)!r} is no model file that is known; give a .keras, .h5, .pth or .safetensors file, a "
            "SavedModel folder or its .tar.gz."
        )
    _CHECKS[kind](path, tuple(trusted))


def check_keras_archive(path: str | Path, *, trusted: Sequence[str] = ()) -> None:
    """Check a .keras file; see `tfxfer.sources.safety.keras_archive`."""
    from tfxfer.sources.safety import keras_archive

    keras_archive.check_keras_archive(path, trusted=trusted)


def check_h5(path: str | Path, *, trusted: Sequence[str] = ()) -> None:
    """Check an HDF5 file of weights or of a whole model; see `tfxfer.sources.safety.hdf5`."""
    from tfxfer.sources.safety import hdf5

    hdf5.check_h5(path, trusted=trusted)


def bounded_datasets(file: "h5py.File", limit_bytes: int) -> Iterator[tuple[str, "h5py.Dataset"]]:
    """The arrays of an open HDF5 file, each checked before a loader reads it; see `tfxfer.sources.safety.hdf5`."""
    from tfxfer.sources.safety import hdf5

    return hdf5.bounded_datasets(file, limit_bytes)


def check_saved_model(folder: str | Path) -> None:
    """Check a SavedModel folder; see `tfxfer.sources.safety.saved_model`."""
    from tfxfer.sources.safety import saved_model

    saved_model.check_saved_model(folder)


def check_torch(path: str | Path) -> None:
    """Check a torch checkpoint of the old or the new format; see `tfxfer.sources.safety.torch_file`."""
    from tfxfer.sources.safety import torch_file

    torch_file.check_torch(path)


def check_safetensors(path: str | Path) -> None:
    """Check a .safetensors file; see `tfxfer.sources.safety.safetensors_file`."""
    from tfxfer.sources.safety import safetensors_file

    safetensors_file.check_safetensors(path)


def extract_archive(path: str | Path, into: str | Path) -> Path:
    """Unpack a .tar.gz of a SavedModel, contained and bounded; see `tfxfer.sources.safety.archive`."""
    from tfxfer.sources.safety import archive

    return archive.extract_archive(path, into)


def check_finite(named_arrays: Any, what: str = "The weights") -> None:
    """Refuse NaN and infinity in weights; see `tfxfer.sources.safety.finite`."""
    from tfxfer.sources.safety import finite

    finite.check_finite(named_arrays, what)


def _check_folder(path: Path, trusted: Sequence[str]) -> None:
    from tfxfer.sources.safety import keras_archive

    keras_archive.check_keras_folder(path, trusted=trusted)


def _check_archive(path: Path, trusted: Sequence[str]) -> None:
    """Unpack to a temporary folder and check that; who loads it unpacks it again, by `extract_archive`."""
    with tempfile.TemporaryDirectory() as folder:
        found = extract_archive(path, Path(folder) / "model")
        try:
            check_saved_model(found)
        except InputError as error:  # the user knows the archive, not the temporary folder
            raise InputError(str(error).replace(repr(str(found)), repr(str(path)), 1)) from error


_CHECKS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    "archive": _check_archive,
    "folder": _check_folder,
    "h5": lambda path, trusted: check_h5(path, trusted=trusted),
    "keras": lambda path, trusted: check_keras_archive(path, trusted=trusted),
    "safetensors": lambda path, trusted: check_safetensors(path),
    "saved_model": lambda path, trusted: check_saved_model(path),
    "torch": lambda path, trusted: check_torch(path),
}


def _kind(path: Path) -> str | None:
    """Which check is for `path`, or None."""
    if path.is_dir():
        names = {item.name for item in path.iterdir()}
        if any(name.startswith("saved_model.") for name in names):
            return "saved_model"
        return "folder" if "config.json" in names else None
    by_name = next((kind for suffix, kind in _BY_SUFFIX.items() if path.name.lower().endswith(suffix)), None)
    return by_name or _kind_by_content(path)


def _kind_by_content(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        from tfxfer.sources.safety.zip_members import opened_zip

        with opened_zip(path) as (_, members):
            return "keras" if "config.json" in members else "torch"
    magics = {b"\x89HDF\r\n\x1a\n": "h5", b"\x1f\x8b": "archive", b"\x80": "torch"}
    found = next((kind for magic, kind in magics.items() if start.startswith(magic)), None)
    return found or ("safetensors" if start[8:9] == b"{" else None)
