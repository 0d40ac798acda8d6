"""The one pass over all images: each is accepted with its digest, look and pixels, or refused with its reason."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tfxfer.data.items import Content, Item
from tfxfer.runtime.files import sha256_of_bytes
from tfxfer.runtime.images import (
    ImageError,
    Progress,
    image_of_array,
    map_threads,
    open_rgb,
    read_bytes,
    resize_square,
    small_look,
    to_rgb,
)
from tfxfer.runtime.store import RowStore

_PATTERN_SIZE_PX = 160


@dataclasses.dataclass(frozen=True, eq=False)
class Audit:
    """What came out.

    Attributes:
        items: The accepted, in their order.
        sha256: Of the content of each: the file's bytes, or an array's shape and bytes.
        looks: (N, 32, 32, 3) uint8: each image small, to compare with others; `None` where not asked for.
        patterns: (N, 60, 2) points and (N, 60, 96) descriptions of `local_patterns`; `None` where not asked for.
        sides_px: (N,) shorter side of each image; of a large JPEG a fraction of it, never below 128.
        pixels: Where a size was asked for, a store with a row for every image, those refused too.
        rows: (N,) the row of each image in it.
        rejected: (id, reason) of the rest.
    """

    items: tuple[Item, ...]
    sha256: tuple[str, ...]
    looks: np.ndarray | None
    patterns: tuple[np.ndarray, np.ndarray] | None
    sides_px: np.ndarray
    pixels: RowStore | None
    rows: np.ndarray
    rejected: tuple[tuple[str, str], ...]


def audit(
    items: Sequence[Item],
    size_px: int | None,
    looks: bool,
    patterns: bool = False,
    on_progress: Progress | None = None,
) -> Audit:
    """Decode every item once, on all cores.

    Args:
        items: What to decode.
        size_px: Side of the pixels to keep; `None` keeps none.
        looks: Whether to keep small looks.
        patterns: Whether to keep local patterns, which take longer than decoding.
        on_progress: Called with (done, total) from the calling thread.
    """
    small = np.empty((len(items), 32, 32, 3), np.uint8) if looks else None
    local: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(items)
    sides_px = np.zeros(len(items), np.int64)
    pixels = None if size_px is None else RowStore.temporary((len(items), size_px, size_px, 3), "uint8")

    def take(row: int) -> tuple[str, str]:
        try:
            sha256, image = open_content(items[row].content)
        except ImageError as error:
            return "", error.reason
        sides_px[row] = min(image.size)
        if small is not None:
            small[row] = small_look(image)
        if patterns:
            from tfxfer.data.turned import local_patterns  # here, as it brings SciPy

            local[row] = local_patterns(image)
        if pixels is not None and size_px is not None:
            pixels.write(row, np.asarray(resize_square(image, size_px))[None])
        return sha256, ""

    results = []
    for result in map_threads(take, range(len(items))):
        results.append(result)
        if on_progress is not None:
            on_progress(len(results), len(items))
    kept = [row for row, (sha256, _) in enumerate(results) if sha256]
    return Audit(
        items=tuple(items[row] for row in kept),
        sha256=tuple(results[row][0] for row in kept),
        looks=None if small is None else small[kept],
        patterns=_stacked([local[row] for row in kept]) if patterns else None,
        sides_px=sides_px[kept],
        pixels=pixels,
        rows=np.array(kept, np.int64),
        rejected=tuple((item.id, reason) for item, (sha256, reason) in zip(items, results, strict=True) if not sha256),
    )


def _stacked(pairs: Sequence[tuple[np.ndarray, np.ndarray] | None]) -> tuple[np.ndarray, np.ndarray] | None:
    found = [pair for pair in pairs if pair is not None]
    return (np.stack([pair[0] for pair in found]), np.stack([pair[1] for pair in found])) if found else None


def open_content(content: Content) -> tuple[str, Image.Image]:
    """The SHA-256 and the upright RGB picture of an item.

    Raises:
        ImageError: Where it cannot be decoded.
    """
    if callable(content):
        try:
            content = content()
        except ImageError:
            raise
        except Exception as error:  # whatever a foreign data set raises for one broken record
            raise ImageError(f"its record cannot be read ({' '.join(str(error).split())[:120]})") from None
    if isinstance(content, Path):
        content = read_bytes(content)
    if isinstance(content, bytes):
        return sha256_of_bytes(content), open_rgb(content)
    array = np.asarray(content) if isinstance(content, Image.Image) else content
    digest = hashlib.sha256(f"{array.shape} {array.dtype}\0".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest(), to_rgb(content) if isinstance(content, Image.Image) else image_of_array(content)
