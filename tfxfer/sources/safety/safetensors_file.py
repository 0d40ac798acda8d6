"""The .safetensors file: a bounded header whose arrays lie inside the file, side by side."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from tfxfer.sources.safety.refusal import MAX_CONFIG_BYTES, refusal, shown

# Bytes a number; what NumPy (with ml_dtypes) can hold.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_DAMAGED = "get the file again from where it was published"


def check_safetensors(path: str | Path) -> None:
    """Check the header of a .safetensors file against the file.

    Args:
        path: The file.

    Raises:
        InputError: Where the header is too large or no header, an array leaves the file, overlaps another, has a
            shape of another size, or a dtype that is not on the list.
    """
    path = Path(path)
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_CONFIG_BYTES, size_bytes - 8):
            raise refusal(path, f"it announces a header of {header_bytes:,} bytes and has {size_bytes:,}", _DAMAGED)
        header = _parsed(file.read(header_bytes), path)
    ends = 0
    spans = sorted((_span(entry, shown(name), path) for name, entry in header.items() if name != "__metadata__"))
    for begin, end, name in spans:
        if begin != ends:
            reason = "overlaps another" if begin < ends else "leaves a hole before it"
            raise refusal(path, f"its array {name} {reason}", _DAMAGED)
        ends = end
    if ends != size_bytes - 8 - header_bytes:
        raise refusal(
            path, f"its arrays have {ends:,} bytes and {size_bytes - 8 - header_bytes:,} are stored", _DAMAGED
        )


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    """The header as a dict; a name that comes twice is refused, since readers differ in which they take."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name comes twice")
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"its header cannot be read ({str(error)[:120]})", _DAMAGED) from error
    if not isinstance(header, dict):
        raise refusal(path, "its header is not a table of arrays", _DAMAGED)
    return header


def _span(entry: Any, name: str, path: Path) -> tuple[int, int, str]:
    """Begin and end of one array, in bytes after the header."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (begin, end, *shape))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise refusal(path, f"the entry of its array {name} is not dtype, shape and offsets", _DAMAGED)
    if dtype not in ITEM_BYTES:
        raise refusal(path, f"its array {name} has the dtype {shown(dtype)}, which is not on the list", _DAMAGED)
    if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise refusal(path, f"its array {name} of shape {tuple(shape)} does not fill {end - begin:,} bytes", _DAMAGED)
    return begin, end, name
