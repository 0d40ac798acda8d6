"""HDF5 files (.h5, .weights.h5): plain arrays in this one file, none declared far larger than what is stored."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from tfxfer.errors import InputError
from tfxfer.sources.safety.keras_config import check_config
from tfxfer.sources.safety.refusal import MAX_CONFIG_BYTES, expands_too_much, refusal, shown

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# About four seconds of looking.
MAX_OBJECTS = 20_000
MAX_DEPTH = 64
MAX_ATTRIBUTES = 1_000
# Filters that ship with h5py; another number would make HDF5 look for a plug-in, a shared library.
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
CONFIG_ATTRIBUTES = ("model_config", "training_config")
_DAMAGED = "get the file again from where it was published"
_HOSTILE = "do not use this file"
# What an attribute may be: numbers, truth values (an enumeration in HDF5), texts.
_ATTRIBUTE_CLASSES = {h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM, h5py.h5t.STRING}
_LINKS = {h5py.h5l.TYPE_EXTERNAL: "is a link to another file", h5py.h5l.TYPE_SOFT: "is a soft link"}


def check_h5(path: str | Path, *, trusted: Sequence[str] = ()) -> None:
    """Check an HDF5 file of weights, or of a whole model as Keras 2 saves it.

    Args:
        path: A .h5, .hdf5 or .weights.h5 file.
        trusted: Modules of the user's own whose classes may stand in its config.

    Raises:
        InputError: Where it is damaged, points outside itself, declares far more than it holds, or its config names
            what is not on the list.
    """
    path = Path(path)
    with path.open("rb") as file:
        check_hdf5_stream(file, path, "the file", trusted=trusted)


def check_hdf5_stream(file: IO[bytes], path: Path, where: str, *, trusted: Sequence[str] = ()) -> int:
    """Check HDF5 in an open file, which may be a member of an archive.

    Args:
        file: Seekable.
        path: The file, for messages.
        where: The member, for messages.
        trusted: As `check_h5`.

    Returns:
        The bytes of all arrays as declared.

    Raises:
        InputError: As `check_h5`.
    """
    size_bytes = file.seek(0, 2)
    file.seek(0)
    if file.read(8) != SIGNATURE:
        raise refusal(path, f"{where} is not HDF5 (its first bytes are others)", _DAMAGED)
    file.seek(0)
    try:
        with h5py.File(file, "r") as opened:
            declared_bytes = sum(
                _nbytes(dataset) for _, dataset in _datasets(opened, path, where, size_bytes, limit_bytes=None)
            )
            if expands_too_much(declared_bytes, size_bytes):
                raise refusal(
                    path, f"{where} has {size_bytes:,} bytes and declares arrays of {declared_bytes:,}", _HOSTILE
                )
            _check_configs(opened, path, trusted, declared_bytes)
    except InputError:
        raise
    except Exception as error:  # damaged HDF5 raises nearly anything
        raise refusal(path, f"{where} is damaged HDF5 ({_first_line(error)})", _DAMAGED) from error
    return declared_bytes


def bounded_datasets(file: h5py.File, limit_bytes: int) -> Iterator[tuple[str, h5py.Dataset]]:
    """The arrays of an open file, each of them checked before it is given out, so that a loader may read it.

    Args:
        file: Open for reading.
        limit_bytes: What all arrays together may have, say twice the size of the built model; at least 0.

    Yields:
        Name and dataset, not read yet.

    Raises:
        InputError: Where a dataset is refused, or all of them declare more than `limit_bytes`.

    Example:
        >>> import io
        >>> with h5py.File(io.BytesIO(), "w") as file:
        ...     file["layer/kernel"] = np.zeros((2, 3), "float32")
        ...     [(name, dataset.shape) for name, dataset in bounded_datasets(file, 24)]
        [('layer/kernel', (2, 3))]
    """
    name = str(file.filename)
    yield from _datasets(file, Path(name), "the file", file.id.get_filesize(), limit_bytes=limit_bytes)


def _datasets(
    file: h5py.File, path: Path, where: str, size_bytes: int, *, limit_bytes: int | None
) -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset, depth first, hard links only, each object once."""
    seen: set[int] = set()
    total_bytes = 0
    stack: list[tuple[str, h5py.Group]] = [("", file)]
    while stack:
        prefix, group = stack.pop()
        _check_attributes(group, path, where, prefix or "/")
        inner: list[tuple[str, h5py.Group]] = []
        for key in group.id:
            name = f"{prefix}/" * bool(prefix) + key.decode("utf-8", "surrogateescape")
            kind = group.id.links.get_info(key).type
            if kind != h5py.h5l.TYPE_HARD:
                reason = _LINKS.get(kind, "is a link of an unknown kind")
                raise refusal(path, f"in {where}, {shown(name)} {reason}", _HOSTILE)
            item = group[key]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > MAX_OBJECTS or name.count("/") > MAX_DEPTH:
                raise refusal(
                    path, f"{where} has more than {MAX_OBJECTS:,} arrays and groups, or nests them too deep", _HOSTILE
                )
            if isinstance(item, h5py.Group):
                inner.append((name, item))
                continue
            if not isinstance(item, h5py.Dataset):
                raise refusal(path, f"in {where}, {shown(name)} is neither an array nor a group", _HOSTILE)
            _check_attributes(item, path, where, name)
            _check_dataset(item, path, where, name, size_bytes)
            total_bytes += _nbytes(item)
            if limit_bytes is not None and total_bytes > limit_bytes:
                raise refusal(
                    path,
                    f"in {where}, the arrays up to {shown(name)} declare {total_bytes:,} bytes, and the model takes "
                    f"{limit_bytes:,}",
                    "use the weights of this architecture",
                )
            yield name, item
        stack += reversed(inner)  # in the order of names


def _nbytes(dataset: h5py.Dataset) -> int:
    # Not dataset.nbytes, which is computed in 64 bits and may wrap around.
    return 0 if dataset.shape is None else math.prod(dataset.shape) * dataset.dtype.itemsize


def _check_dataset(dataset: h5py.Dataset, path: Path, where: str, name: str, size_bytes: int) -> None:
    """A plain array of numbers or of fixed texts, stored in this file, in about the bytes that its shape says."""
    if problem := _layout_problem(dataset) or _size_problem(dataset, size_bytes):
        raise refusal(path, f"in {where}, the array {shown(name)} {problem}", _HOSTILE)


def _layout_problem(dataset: h5py.Dataset) -> str:
    properties = dataset.id.get_create_plist()
    if properties.get_external_count():
        return "is stored in another file"
    layout = properties.get_layout()
    if layout not in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
        return "is virtual: a view of arrays elsewhere"
    unknown = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())} - FILTERS
    if unknown:
        return f"is compressed by the filter {unknown.pop()}, which is not on the list"
    dtype = dataset.dtype
    # Keras writes bfloat16 as two opaque bytes.
    plain = dtype.kind in "biufcS" or (dtype.kind == "V" and dtype.names is None and dtype.itemsize <= 16)
    if not plain or dtype.subdtype is not None or h5py.check_dtype(ref=dtype) is not None:
        return f"holds {shown(str(dtype))} instead of numbers"
    return ""


def _size_problem(dataset: h5py.Dataset, size_bytes: int) -> str:
    if dataset.shape is None:
        return ""
    declared_bytes, stored_bytes = _nbytes(dataset), dataset.id.get_storage_size()
    shape = "x".join(map(str, dataset.shape)) or "a single number"
    if dataset.chunks is None:
        # Storage is absent where nothing was ever written, and the reader fills the array with zeros.
        fits = stored_bytes == declared_bytes or (stored_bytes == 0 and declared_bytes <= 2**20)
        if not fits or stored_bytes > size_bytes:
            return f"declares {shape} = {declared_bytes:,} bytes and {min(stored_bytes, size_bytes):,} are stored"
        return ""
    chunk_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if expands_too_much(max(declared_bytes, chunk_bytes), min(stored_bytes, size_bytes)):
        return f"declares {shape} = {declared_bytes:,} bytes and {stored_bytes:,} are stored"
    return ""


def _check_attributes(item: Any, path: Path, where: str, name: str) -> None:
    """Few, small, plain attributes; none is read here."""
    count = h5py.h5a.get_num_attrs(item.id)
    if count > MAX_ATTRIBUTES:
        raise refusal(path, f"in {where}, {shown(name)} has {count:,} attributes", _HOSTILE)
    for index in range(count):
        attribute = h5py.h5a.open(item.id, index=index)
        kind, label = attribute.get_type(), attribute.name.decode("utf-8", "replace")
        size_bytes = math.prod(attribute.shape or ()) * kind.get_size()
        if kind.get_class() not in _ATTRIBUTE_CLASSES:
            raise refusal(
                path, f"in {where}, the attribute {shown(label)} of {shown(name)} is neither number nor text", _HOSTILE
            )
        if size_bytes > MAX_CONFIG_BYTES:
            raise refusal(
                path, f"in {where}, the attribute {shown(label)} of {shown(name)} has {size_bytes:,} bytes", _HOSTILE
            )


def _check_configs(file: h5py.File, path: Path, trusted: Sequence[str], declared_bytes: int) -> None:
    """The configs of model and training, where the file has them."""
    for name in CONFIG_ATTRIBUTES:
        if name not in file.attrs:
            continue
        attribute = h5py.h5a.open(file.id, name.encode())
        if math.prod(attribute.shape or ()) != 1:
            raise refusal(path, f"its attribute {name!r} is not one text", _HOSTILE)
        value = file.attrs[name]
        value = value.item() if isinstance(value, (np.ndarray, np.generic)) else value
        text = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        if not isinstance(text, bytes):
            raise refusal(path, f"its attribute {name!r} is not one text", _HOSTILE)
        # Training configs have no layers of their own to weigh.
        weight_bytes = declared_bytes if name == "model_config" else None
        check_config(text, path, f"its attribute {name!r}", trusted=trusted, weight_bytes=weight_bytes)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
