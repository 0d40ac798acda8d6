"""Torch checkpoints (.pth, .pt, .bin), old and new format: their pickles are read as a list of opcodes, never run."""

import io
import itertools
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, cast

from tfxfer.errors import InputError
from tfxfer.sources.safety.refusal import MAX_CONFIG_BYTES, expands_too_much, refusal, shown
from tfxfer.sources.safety.zip_members import opened_zip, read_member

# The four names of a state dict: a dict, a tensor, and its storage of one of ten kinds of numbers.
ITEM_BYTES = {
    **dict.fromkeys(("Double", "Long"), 8),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Char", "Byte", "Bool"), 1),
}
ALLOWED_NAMES = frozenset(
    {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {f"torch {kind}Storage" for kind in ITEM_BYTES}
)
# What pickle writes for a dict of tensors. INST, OBJ, NEWOBJ, EXT*, BYTEARRAY8, buffers and PERSID are left out.
_OPCODES = """
    APPEND APPENDS BINFLOAT BINGET BINBYTES BININT BININT1 BININT2 BINPERSID BINPUT BINSTRING BINUNICODE BUILD DICT
    EMPTY_DICT EMPTY_LIST EMPTY_TUPLE FALSE FLOAT FRAME GET GLOBAL INT LIST LONG LONG1 LONG4 LONG_BINGET LONG_BINPUT
    MARK MEMOIZE NEWFALSE NEWTRUE NONE POP POP_MARK PROTO PUT REDUCE SETITEM SETITEMS SHORT_BINBYTES SHORT_BINSTRING
    SHORT_BINUNICODE STACK_GLOBAL STOP STRING TUPLE TUPLE1 TUPLE2 TUPLE3 UNICODE BINUNICODE8
    """
ALLOWED_OPCODES = frozenset(_OPCODES.split())
MAX_OPCODES = 1_000_000
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_MEMBER = re.compile(
    r"[^/]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+|)"
)
_STRINGS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_ADVICE = "save only its state_dict() with torch.save, or as .safetensors, and do not use this file if it is not yours"
_DAMAGED = "get the file again from where it was published"


def check_torch(path: str | Path) -> None:
    """Check a torch checkpoint: nothing in its pickles but tensors in dicts.

    Args:
        path: Written by `torch.save(model.state_dict())`, in the format before 1.6 or since.

    Raises:
        InputError: Where a pickle asks for any other name, is damaged or far too long, or the archive is refused.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(4)
        if start.startswith(b"PK"):
            _check_new(path)
        elif start[:1] == b"\x80":
            file.seek(0)
            _check_old(file, path)
        else:
            raise refusal(path, "it is not a torch checkpoint of the old or the new format", _DAMAGED)


def check_pickle(file: IO[bytes], path: Path, where: str) -> list[Any]:
    """Check one pickle from where `file` stands, up to its end, without running it.

    Args:
        file: Open for reading.
        path: The file, for messages.
        where: The member, for messages.

    Returns:
        Its numbers and texts in the order of the opcodes.

    Raises:
        InputError: Where it asks for a name or an opcode that a state dict does not need.
    """
    constants: list[Any] = []
    names = _Names()
    start = file.tell()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], _Bounded(file))), 1):
            if count > MAX_OPCODES or file.tell() - start > MAX_CONFIG_BYTES:
                raise refusal(path, f"{where} is a pickle of more than {MAX_OPCODES:,} parts", _ADVICE)
            if opcode.name not in ALLOWED_OPCODES:
                raise refusal(path, f"{where} uses the pickle opcode {opcode.name}, which no state dict needs", _ADVICE)
            # A place in the memo far away makes the unpickler take memory for all places before it.
            if opcode.name in (*_PUTS, *_GETS) and not 0 <= int(str(argument)) <= MAX_OPCODES:
                raise refusal(path, f"{where} uses place {argument:,} of the pickle's memo", _ADVICE)
            if opcode.name == "FRAME" and int(str(argument)) > MAX_CONFIG_BYTES:
                raise refusal(path, f"{where} announces a part of {argument:,} bytes", _ADVICE)
            wanted = names.after(opcode.name, argument)
            if wanted is not None and wanted not in ALLOWED_NAMES:
                raise refusal(
                    path,
                    f"{where} asks for {shown(wanted.replace(' ', '.'))}, which no state dict needs; it was not run",
                    _ADVICE,
                )
            if argument is not None and opcode.name not in (*_PUTS, *_GETS, "GLOBAL", "PROTO", "FRAME"):
                constants.append(argument)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise refusal(path, f"{where} is a damaged pickle ({str(error)[:120]})", _DAMAGED) from error
    return constants


class _Names:
    """Which name GLOBAL or STACK_GLOBAL asks for: keeps as much of stack and memo as that takes."""

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}
        self._last: list[Any] = []

    def after(self, opcode: str, argument: Any) -> str | None:
        """The name that this opcode asks for, or None."""
        if opcode == "GLOBAL":
            self._last = []
            return str(argument)
        if opcode == "STACK_GLOBAL":
            # Both must be texts in plain sight; what was computed is refused.
            found, self._last = self._last[-2:], []
            ok = len(found) == 2 and all(isinstance(part, str) for part in found)
            return " ".join(found) if ok else "(computed)"
        if opcode in _STRINGS:
            self._last = [*self._last[-1:], argument]
        elif opcode in _GETS:
            self._last = [*self._last[-1:], self._memo.get(int(argument))]
        elif opcode == "MEMOIZE" or opcode in _PUTS:
            key = len(self._memo) if opcode == "MEMOIZE" else int(argument)
            self._memo[key] = self._last[-1] if self._last else None
        elif opcode not in ("PROTO", "FRAME"):
            self._last = []
        return None


class _Bounded(io.RawIOBase):
    """A file of which `pickletools` cannot read more than a config's worth at once."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= MAX_CONFIG_BYTES:
            raise ValueError(f"it announces a part of {count:,} bytes")
        return self._file.read(count)

    def readline(self, size: int | None = -1) -> bytes:
        return self._file.readline(2**16)


def _check_old(file: IO[bytes], path: Path) -> None:
    """Five pickles (number, version, system, state dict, storages), then the numbers."""
    start = file.tell()
    if check_pickle(file, path, "its first part") != [MAGIC_NUMBER]:
        raise refusal(path, "it is a pickle, but no torch checkpoint of the format before 1.6", _ADVICE)
    ends = [file.tell()]
    for where in ("its version", "its part on the system", "its state dict", "its list of storages"):
        check_pickle(file, path, where)
        ends.append(file.tell())
    file.seek(start)
    content = file.read(ends[-1] - start)
    _, _, system, state, keys = (content[begin:end] for begin, end in itertools.pairwise([start, *ends]))
    if _read_inert(system, path)[0].get("little_endian") is not True:
        raise refusal(path, "its numbers are not little-endian", "save it again on a usual machine")
    storages = _read_inert(state, path)[1]
    left_bytes = path.stat().st_size - ends[-1]
    for key in _read_inert(keys, path)[0]:
        left_bytes -= 8 + storages.get(key, 0)
    if left_bytes < 0:
        raise refusal(path, f"it ends {-left_bytes:,} bytes before its numbers do", _DAMAGED)


def _check_new(path: Path) -> None:
    """A zip with one pickle and a member of plain numbers for each storage."""
    with opened_zip(path) as (archive, members):
        pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise refusal(path, f"it has {len(pickles)} members named data.pkl instead of one", _ADVICE)
        root = pickles[0].partition("/")[0]
        for name, info in members.items():
            if not _MEMBER.fullmatch(name) or name.partition("/")[0] != root:
                program = "/code/" in name or name.endswith("constants.pkl")
                kind = "part of a TorchScript program" if program else "no part of a state dict"
                raise refusal(path, f"its member {shown(name)} is {kind}", _ADVICE)
            if info.compress_type != zipfile.ZIP_STORED:
                raise refusal(path, f"its member {shown(name)} is compressed, which torch never does", _DAMAGED)
        order = members.get(f"{root}/byteorder")
        if order is not None and read_member(path, archive, order) != b"little":
            raise refusal(path, "its numbers are not little-endian", "save it again on a usual machine")
        content = read_member(path, archive, members[pickles[0]])
    where = f"its member {shown(pickles[0])}"
    stream = io.BytesIO(content)
    check_pickle(stream, path, where)
    if stream.read(1):
        raise refusal(path, f"{where} goes on after its end", _ADVICE)
    for key, size_bytes in _read_inert(content, path)[1].items():
        member = members.get(f"{root}/data/{key}")
        if member is None or member.file_size < size_bytes:
            stored = "is not there" if member is None else f"has {member.file_size:,} bytes instead of {size_bytes:,}"
            raise refusal(path, f"its member {shown(f'{root}/data/{key}')} {stored}", _DAMAGED)


def _read_inert(content: bytes, path: Path) -> tuple[Any, dict[str, int]]:
    """What a pickle that `check_pickle` has passed describes: a skeleton without numbers, and bytes by storage."""
    reader = _InertUnpickler(io.BytesIO(content))
    try:
        return reader.load(), reader.storages
    except Exception as error:  # a damaged pickle raises nearly anything
        raise refusal(path, f"its state dict is damaged ({str(error)[:120]})", _DAMAGED) from error


class _InertUnpickler(pickle.Unpickler):
    """Knows the names of a state dict and makes nothing of them but their sizes."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in ALLOWED_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return {"OrderedDict": OrderedDict, "_rebuild_tensor_v2": _check_tensor}.get(name, name.removesuffix("Storage"))

    def persistent_load(self, identifier: Any) -> tuple[int, int]:
        """(numbers, bytes a number) of a storage."""
        kind, dtype, key, _location, length = identifier[:5]
        if kind != "storage" or dtype not in ITEM_BYTES or type(length) is not int or length < 0:
            raise pickle.UnpicklingError("it refers to something other than a plain storage")
        self.storages[str(key)] = length * ITEM_BYTES[dtype]
        return length, ITEM_BYTES[dtype]


def _check_tensor(storage: tuple[int, int], offset: int, shape: Any, strides: Any, *_: Any) -> None:
    """A tensor must lie inside its storage, and must not be a small one repeated for ever."""
    length, item_bytes = storage
    if shape and min((offset, *shape, *strides)) < 0:
        raise pickle.UnpicklingError("a tensor has a negative size")
    if 0 in shape:
        return
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if last >= length or expands_too_much(math.prod(shape) * item_bytes, length * item_bytes):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(shape)} leaves its storage of {length:,} numbers")
