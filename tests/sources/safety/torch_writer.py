"""Torch checkpoints written without torch, in the old and the new format, and pickles that would run code."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
KINDS = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage", "uint8": "ByteStorage"}


class Tensor:
    """A tensor over a storage; tensors of one key share it."""

    def __init__(self, values, key, shape=None, strides=None, offset=0, length=None):
        self.values, self.key, self.offset = np.ascontiguousarray(values), str(key), offset
        self.shape = tuple(self.values.shape) if shape is None else shape
        steps = [stride // self.values.itemsize for stride in self.values.strides]
        self.strides = tuple(steps) if strides is None else strides
        self.length = self.values.size if length is None else length


class Global:
    """Pickles as a name, without importing it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of `function` (a callable or a Global) that runs when the pickle is loaded."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class _Storage:
    def __init__(self, tensor):
        self.tensor = tensor


class _Pickler(pickle._Pickler):
    """The Python pickler, which lets names be written that are not installed here."""

    def __init__(self, file, protocol, old):
        super().__init__(file, protocol)
        self.old = old

    def persistent_id(self, item):
        if not isinstance(item, _Storage):
            return None
        tensor = item.tensor
        name = Global("torch", KINDS[str(tensor.values.dtype)])
        identity = ("storage", name, tensor.key, "cpu", tensor.length)
        return (*identity, None) if self.old else identity

    def save(self, item, save_persistent_id=True):
        if isinstance(item, Global):
            if self.proto >= 4:
                super().save(item.module)
                super().save(item.name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(pickle.GLOBAL + f"{item.module}\n{item.name}\n".encode())
            return None
        if isinstance(item, Call):
            self.save(item.function)
            self.save(tuple(item.arguments))
            self.write(pickle.REDUCE)
            return None
        if isinstance(item, Tensor):
            call = Call(
                Global("torch._utils", "_rebuild_tensor_v2"),
                _Storage(item),
                item.offset,
                item.shape,
                item.strides,
                False,
                OrderedDict(),
            )
            return self.save(call)
        return super().save(item, save_persistent_id)


def dumps(item, protocol=2, old=False) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol, old).dump(item)
    return file.getvalue()


def storages(item) -> dict[str, np.ndarray]:
    found = {}
    for value in item.values() if isinstance(item, dict) else [item]:
        if isinstance(value, Tensor):
            found.setdefault(value.key, value.values)
        elif isinstance(value, dict):
            found |= storages(value)
    return found


def write_old(path: Path, state, protocol=2) -> Path:
    """The format before 1.6: five pickles, then each storage with its length."""
    held = storages(state)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [dumps(item, protocol, old=True) for item in (MAGIC_NUMBER, 1001, system, state, sorted(held))]
    numbers = [struct.pack("<q", held[key].size) + held[key].tobytes() for key in sorted(held)]
    path.write_bytes(b"".join(parts + numbers))
    return path


def write_new(path: Path, state, protocol=2, extra=(), compression=zipfile.ZIP_STORED) -> Path:
    """The format since 1.6: a zip."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", state if isinstance(state, bytes) else dumps(state, protocol))
        archive.writestr("archive/byteorder", "little")
        for key, values in ({} if isinstance(state, bytes) else storages(state)).items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", "3\n")
        for name, content in extra:
            archive.writestr(name, content)
    return path
