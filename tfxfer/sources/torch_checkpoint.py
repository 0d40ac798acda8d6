"""Weights from a torch checkpoint of the format before 1.6, read without torch and without trust.

The file is checked by SHA-256, read by an unpickler that knows four names and runs nothing else, turned into Keras'
layout and kept in the cache folder, so that the next load needs neither.
"""

import dataclasses
import hashlib
import importlib.util
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import InputError
from tfxfer.registry import lookup
from tfxfer.runtime.files import atomic_path, cache_dir, locked, sha256_of_bytes
from tfxfer.sources.builders import TORCH_MODULES
from tfxfer.specs import Source

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
# Part of the cache's file name: raise it when the conversion changes.
LAYOUT_VERSION = 1
# What a state dict calls an array, and what Keras calls it.
LEAVES = {"running_mean": "moving_mean", "running_var": "moving_variance"}


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


def read_checkpoint(content: bytes, name: str = "the checkpoint") -> dict[str, np.ndarray]:
    """Read a state dict in the torch format before 1.6.

    Args:
        content: The bytes of the file.
        name: What errors call it.

    Returns:
        Arrays by their name in the state dict, float32 or int64, in torch's layout.

    Raises:
        InputError: Where it is something else, is cut off, or asks for any object but tensors in a dict.
    """
    file = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]  # its peek() spares reads of single bytes
    try:
        magic, version, system = (_RestrictedUnpickler(file).load() for _ in range(3))
        if magic != MAGIC_NUMBER or version != PROTOCOL_VERSION or system["little_endian"] is not True:
            raise pickle.UnpicklingError("it starts with other numbers")
        state = _RestrictedUnpickler(file).load()
        keys = _RestrictedUnpickler(file).load()
        if not isinstance(state, OrderedDict) or not all(isinstance(value, _Tensor) for value in state.values()):
            raise pickle.UnpicklingError("it holds other things than a dict of tensors")
        kinds = {tensor.storage.key: tensor.storage for tensor in state.values()}
        storages = _read_storages(content, file.tell(), [kinds[key] for key in keys])
        return {str(key): tensor.array(storages[tensor.storage.key]) for key, tensor in state.items()}
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{name} cannot be read as a torch checkpoint of the format before 1.6: {error}.") from error


def to_keras(state: Mapping[str, np.ndarray], modules: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Rename and transpose the arrays of a state dict.

    Args:
        state: From `read_checkpoint`.
        modules: The layer of each torch module.

    Returns:
        Arrays by "layer/variable", in Keras' layout.

    Raises:
        InputError: Where a module has no layer, or a layer no arrays.

    Example:
        >>> state = {"fc.weight": np.zeros((10, 64), "float32"), "fc.bias": np.zeros(10, "float32")}
        >>> {name: array.shape for name, array in to_keras(state, {"fc": "logits"}).items()}
        {'logits/kernel': (64, 10), 'logits/bias': (10,)}
    """
    arrays = {}
    for key, array in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "num_batches_tracked":
            continue
        if module not in modules:
            raise InputError(f"The checkpoint has {key!r}, which no layer of the architecture takes.")
        normalises = f"{module}.running_mean" in state
        variable = LEAVES.get(leaf) or {
            ("weight", True): "gamma",
            ("bias", True): "beta",
            ("weight", False): "kernel",
            ("bias", False): "bias",
        }.get((leaf, normalises))
        if variable is None:
            raise InputError(f"The checkpoint has {key!r}, which neither a convolution nor Dense nor BatchNorm has.")
        arrays[f"{modules[module]}/{variable}"] = _keras_layout(array)
    lacking = set(modules.values()) - {name.partition("/")[0] for name in arrays}
    if lacking:
        raise InputError(f"The checkpoint has no arrays for {', '.join(sorted(lacking))}.")
    return arrays


def assign(model: Any, arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Set every weight of `model` from `arrays` by "layer/variable".

    Raises:
        InputError: Where one is missing or has another shape; nothing has been set then.
    """
    pairs = [(f"{layer.name}/{weight.name}", weight) for layer in model.layers for weight in layer.weights]
    for name, weight in pairs:
        if name not in arrays:
            raise InputError(f"{what} lack {name!r}, which the network {model.name!r} needs.")
        if tuple(weight.shape) != arrays[name].shape:
            raise InputError(
                f"{what} have {name!r} in shape {arrays[name].shape}; "
                f"the network {model.name!r} needs {tuple(weight.shape)}."
            )
    for name, weight in pairs:
        weight.assign(arrays[name])


def _keras_layout(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:  # Dense: (out, in)
        return np.ascontiguousarray(array.T)
    if array.ndim == 4 and array.shape[1] == 1:  # depthwise: (channels, 1, height, width)
        return np.ascontiguousarray(array.transpose(2, 3, 0, 1))
    if array.ndim == 4:  # convolution: (out, in, height, width)
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return array


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: np.dtype
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the pickle, before the numbers, which follow it in the file, have been read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, values: np.ndarray) -> np.ndarray:
        """The tensor as a view of the `values` of its storage."""
        steps = [(side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True)]
        if min((self.offset, *self.shape, *self.strides)) < 0 or self.offset + sum(steps) >= len(values):
            raise pickle.UnpicklingError(f"a tensor of shape {self.shape} leaves its storage of {len(values)} numbers")
        strides_bytes = [stride * values.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides_bytes, writeable=False)


class _Rebuild:
    """Stands for `torch._utils._rebuild_tensor_v2`; without attributes, so that a pickle cannot change it."""

    __slots__ = ()

    def __call__(self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor has no storage")
        return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _RestrictedUnpickler(pickle.Unpickler):
    """Finds the four names that a state dict needs; everything else is refused before it is imported."""

    ALLOWED: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "FloatStorage"): np.dtype("<f4"),
        ("torch", "LongStorage"): np.dtype("<i8"),
        ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no state dict needs; that was refused and not run"
            ) from None

    def persistent_load(self, identifier: Any) -> _Storage:
        kind, dtype, key, _location, length, view = identifier
        if kind != "storage" or not isinstance(dtype, np.dtype) or view is not None:
            raise pickle.UnpicklingError("it refers to something other than a plain storage")
        return _Storage(str(key), dtype, int(length))


def _read_storages(content: bytes, position: int, storages: list[_Storage]) -> dict[str, np.ndarray]:
    """The numbers after the pickles: for each storage its length (int64) and its values."""
    arrays = {}
    for storage in storages:
        (length,) = struct.unpack_from("<q", content, position)
        position += 8
        if length != storage.length:
            raise pickle.UnpicklingError(f"a storage holds {length} numbers where {storage.length} were announced")
        arrays[storage.key] = np.frombuffer(content, storage.dtype, length, position)
        position += length * storage.dtype.itemsize
    return arrays
