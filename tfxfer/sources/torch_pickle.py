"""State dicts in the pickles of torch, before 1.6 and the zip since, read without torch and without trust.

The unpickler knows the names that a dict of tensors needs and runs nothing else.
"""

import dataclasses
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfxfer.errors import InputError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
# NumPy's name of the numbers in a torch storage; it has none for bfloat16.
ITEMS = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
# Under what training scripts keep the state dict in a checkpoint.
WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_checkpoint(content: bytes, name: str = "the checkpoint") -> dict[str, np.ndarray]:
    """Read a state dict in the torch format before 1.6.

    Args:
        content: The bytes of the file.
        name: What errors call it.

    Returns:
        Arrays by their name in the state dict, floats as float32, in torch's layout.

    Raises:
        InputError: Where it is something else, is cut off, or asks for any object but tensors in a dict.
    """
    file = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]  # its peek() spares reads of single bytes
    try:
        magic, version, system = (_RestrictedUnpickler(file).load() for _ in range(3))
        if magic != MAGIC_NUMBER or version != PROTOCOL_VERSION or system["little_endian"] is not True:
            raise pickle.UnpicklingError("it starts with other numbers")
        state = _tensors(_RestrictedUnpickler(file).load())
        keys = _RestrictedUnpickler(file).load()
        kinds = {tensor.storage.key: tensor.storage for tensor in state.values()}
        storages = _read_storages(content, file.tell(), [kinds[key] for key in keys])
        return {str(key): tensor.array(storages[tensor.storage.key]) for key, tensor in state.items()}
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{name} cannot be read as a torch checkpoint of the format before 1.6: {error}.") from error


def read_zipped_checkpoint(content: bytes, name: str = "the checkpoint") -> dict[str, np.ndarray]:
    """Read a state dict in the torch format since 1.6, a zip of one pickle and of a member for each storage.

    Args, Returns and Raises as `read_checkpoint`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (place,) = (member for member in archive.namelist() if member.rpartition("/")[2] == "data.pkl")
            root = place.removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise pickle.UnpicklingError("its numbers are not little-endian")
            state = _tensors(_RestrictedUnpickler(io.BytesIO(archive.read(place))).load())
            storages = {tensor.storage.key: tensor.storage for tensor in state.values()}
            arrays = {key: storage.numbers(archive.read(f"{root}data/{key}")) for key, storage in storages.items()}
            return {str(key): tensor.array(arrays[tensor.storage.key]) for key, tensor in state.items()}
    except Exception as error:  # a damaged zip or pickle raises almost anything
        raise InputError(f"{name} cannot be read as a torch checkpoint of the format since 1.6: {error}.") from error


def floats_from_bfloat16(halves: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers as those.

    Example:
        >>> floats_from_bfloat16(np.array([0x3F80, 0xC000], "<u2"))
        array([ 1., -2.], dtype=float32)
    """
    return (halves.astype("<u4") << 16).view("<f4")


def _tensors(state: Any) -> "dict[Any, _Tensor]":
    """The dict of tensors, as it is or under one of the usual names in a larger dict."""
    for wrapped in (state, *(state.get(key) for key in WRAPPERS if isinstance(state, dict))):
        if isinstance(wrapped, dict) and wrapped and all(isinstance(value, _Tensor) for value in wrapped.values()):
            return wrapped
    raise pickle.UnpicklingError("it holds other things than a dict of tensors")


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    item: str
    length: int

    def numbers(self, content: bytes, position: int = 0) -> np.ndarray:
        """What the bytes say, floats as float32."""
        if self.item == "bfloat16":
            return floats_from_bfloat16(np.frombuffer(content, "<u2", self.length, position))
        found = np.frombuffer(content, self.item, self.length, position)
        return found.astype("<f4", copy=False) if found.dtype.kind == "f" else found

    @property
    def num_bytes(self) -> int:
        return self.length * (2 if self.item == "bfloat16" else np.dtype(self.item).itemsize)


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
    """Finds the names that a state dict needs; everything else is refused before it is imported."""

    ALLOWED: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        **{("torch", name): item for name, item in ITEMS.items()},
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
        kind, item, key, _location, length, *view = identifier
        plain = kind == "storage" and isinstance(item, str) and item in ITEMS.values() and int(length) >= 0
        if not plain or view not in ([], [None]):  # the old format has a sixth part, of views into storages
            raise pickle.UnpicklingError("it refers to something other than a plain storage")
        return _Storage(str(key), item, int(length))


def _read_storages(content: bytes, position: int, storages: list[_Storage]) -> dict[str, np.ndarray]:
    """The numbers after the pickles: for each storage its length (int64) and its values."""
    arrays = {}
    for storage in storages:
        (length,) = struct.unpack_from("<q", content, position)
        position += 8
        if length != storage.length:
            raise pickle.UnpicklingError(f"a storage holds {length} numbers where {storage.length} were announced")
        arrays[storage.key] = storage.numbers(content, position)
        position += storage.num_bytes
    return arrays
