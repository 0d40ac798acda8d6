"""Image files to arrays with Pillow: the one decoder of training, evaluation and prediction. No TensorFlow."""

import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from tfxfer.errors import InputError

_NAMES = ("avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp")
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _NAMES)
MAX_PIXELS = 100_000_000
# Only formats that Pillow decodes by itself: EPS, for one, would start Ghostscript on the user's file.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF")
_MEMORY_LIMIT_BYTES = 2 * 1024**3
_ORIENTATION_TAG = 0x0112

Progress = Callable[[int, int], None]
T = TypeVar("T")
R = TypeVar("R")


class ImageError(InputError):
    """An image that cannot be decoded; `reason` says why, without the path."""

    def __init__(self, reason: str, path: str | Path | None = None) -> None:
        self.reason = reason
        self.path = None if path is None else str(path)
        where = "The image" if path is None else str(path)
        super().__init__(f"{where} cannot be read: {reason}.")


def decode_image(source: str | Path | bytes, size_px: int | None = None) -> np.ndarray:
    """Decode one image to RGB, upright by its EXIF orientation, alpha laid over white, 16-bit grey scaled to 8 bit.

    Args:
        source: A path, or the encoded bytes. The format is told by content, not by suffix; of several frames the
            first is taken.
        size_px: Side of the square output in pixels; the whole picture is squashed, nothing cropped. `None`
            keeps the picture's own size.

    Returns:
        (H, W, 3) or (size_px, size_px, 3) uint8.

    Raises:
        ImageError: Where it is no image, truncated, empty, larger than 100 megapixels, or of a pixel type that
            has no plain 8-bit form.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("RGB", (5, 3), (255, 0, 0)).save(buffer, "png")
        >>> decode_image(buffer.getvalue()).shape, decode_image(buffer.getvalue(), 2)[0, 0].tolist()
        ((3, 5, 3), [255, 0, 0])
    """
    path = None if isinstance(source, bytes) else source
    try:
        image = open_rgb(source if isinstance(source, bytes) else read_bytes(source))
    except ImageError as error:
        raise ImageError(error.reason, path) from None
    if size_px is not None:
        image = resize_square(image, size_px)
    return np.asarray(image)


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        ImageError: Where it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(error.strerror.lower() if error.strerror else str(error), path) from None


def open_rgb(content: bytes) -> Image.Image:
    """Decode to an upright RGB picture of its own size.

    A JPEG is decoded whole: letting the decoder shrink it would be faster, but the exported graph cannot do that, and
    probabilities would differ (by up to 0.09 where it was tried).

    Raises:
        ImageError: As `decode_image`.
    """
    if not content:
        raise ImageError("the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(content), formats=_known_formats())
    except Image.UnidentifiedImageError:
        raise ImageError(_what_it_is(content)) from None
    except Image.DecompressionBombError:
        raise ImageError(f"it has more than {MAX_PIXELS // 10**6} megapixels") from None
    except MemoryError:
        raise
    except Exception as error:  # a hostile header makes Pillow's parsers raise nearly anything
        raise ImageError(f"its header is broken ({error})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"it has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels")
    try:
        image.load()
        return to_rgb(upright(image))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # as above, for the pixel data
        raise ImageError(_plain_reason(error)) from None


def resize_square(image: Image.Image, size_px: int) -> Image.Image:
    """Squash to `size_px` x `size_px`, bilinear with antialiasing, as the model's own input layer does.

    Along the width first, as that layer: in one call Pillow chooses the order by its version and the picture's shape,
    and rounds to whole levels in between.
    """
    for size in ((size_px, image.height), (size_px, size_px)):
        image = image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
    return image


def resize_image(array: np.ndarray, size_px: int) -> np.ndarray:
    """Resize as `decode_image` does.

    Args:
        array: (H, W, C) or (H, W) uint8, C in 1..4: grey, grey and alpha, RGB, RGB and alpha.
        size_px: Side of the output.

    Returns:
        (size_px, size_px, 3) uint8.

    Example:
        >>> resize_image(np.full((4, 6, 1), 9, "uint8"), 2).tolist()
        [[[9, 9, 9], [9, 9, 9]], [[9, 9, 9], [9, 9, 9]]]
    """
    return np.asarray(resize_square(image_of_array(array), size_px))


def image_of_array(array: np.ndarray) -> Image.Image:
    """(H, W, C) or (H, W) uint8 with C in 1..4 as an RGB picture, alpha laid over white.

    Raises:
        InputError: Where the array has another shape or type.
    """
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (2, 3, 4)):
        raise InputError(f"An image must be uint8 of shape (H, W, 1..4), not {array.dtype} of shape {array.shape}.")
    return to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def decode_images(
    paths: Sequence[str | Path | bytes],
    size_px: int,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> np.ndarray:
    """Decode many images on all cores.

    Args:
        paths: Paths or encoded bytes.
        size_px: Side of the output.
        workers: Threads; by default one a core.
        on_progress: Called with (done, total) from the calling thread.

    Returns:
        (N, size_px, size_px, 3) uint8 in the order of `paths`; a file on disk, mapped, when above 2 GB.

    Raises:
        ImageError: At the first that cannot be decoded.
    """
    pixels = allocate_pixels(len(paths), size_px)

    def decode(row: int) -> None:
        pixels[row] = decode_image(paths[row], size_px)

    for done, _ in enumerate(map_threads(decode, range(len(paths)), workers), start=1):
        if on_progress is not None:
            on_progress(done, len(paths))
    return pixels


def allocate_pixels(count: int, size_px: int) -> np.ndarray:
    """An empty (count, size_px, size_px, 3) uint8 array, in an unnamed temporary file when above 2 GB."""
    shape = (count, size_px, size_px, 3)
    if count * size_px * size_px * 3 <= _MEMORY_LIMIT_BYTES:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(prefix="tfxfer-pixels-") as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)  # the mapping keeps the deleted file alive


def map_threads(function: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """`map` over threads, in order, with few items in flight (Pillow and hashlib release the GIL)."""
    count = workers or available_cores()
    if count <= 1:
        yield from map(function, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(function, item) for item in islice(rest, 16 * count)]
        waiting.reverse()
        try:
            while waiting:
                yield waiting.pop().result()
                if len(waiting) <= 8 * count:
                    more = [pool.submit(function, item) for item in islice(rest, 8 * count)]
                    waiting[:0] = more[::-1]
        finally:
            for future in waiting:
                future.cancel()


def small_look(image: Image.Image) -> np.ndarray:
    """The picture averaged down to (32, 32, 3) uint8, for `perceptual_hashes` and for comparing pixels."""
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX, reducing_gap=2.0))


def perceptual_hash(image: np.ndarray | Image.Image) -> int:
    """64 bits that stay nearly the same when a picture is resized, re-encoded or slightly edited.

    Args:
        image: An RGB picture, or an array as `resize_image` takes.

    Example:
        >>> perceptual_hash(np.zeros((32, 32, 3), "uint8"))
        0
    """
    picture = to_rgb(image) if isinstance(image, Image.Image) else image_of_array(image)
    return int(perceptual_hashes(small_look(picture)[None])[0])


def perceptual_hashes(looks: np.ndarray) -> np.ndarray:
    """Hash many small looks: which of the 64 lowest cosine frequencies of the grey picture lie above their median.

    Args:
        looks: (N, 32, 32, 3) uint8 of `small_look`.

    Returns:
        (N,) uint64.

    Reference: C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", thesis, FH
        Hagenberg, 2010 (the DCT-based hash).
    """
    index = np.arange(32)
    cosines = np.cos(np.pi * (index[None, :] + 0.5) * np.arange(8)[:, None] / 32).astype(np.float32)
    weights = (1 << np.arange(64, dtype=np.uint64)).astype(np.uint64)
    hashes = np.empty(len(looks), np.uint64)
    for start in range(0, len(looks), 4096):
        grey = looks[start : start + 4096].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        low = np.round(cosines @ grey @ cosines.T, 1).reshape(-1, 64)  # rounded: no bit hangs on float noise
        bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
        bits[:, 0] = False  # the mean brightness says nothing about the picture
        hashes[start : start + 4096] = (bits * weights).sum(axis=1, dtype=np.uint64)
    return hashes


def hamming_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of bits in which two arrays of hashes differ, broadcast.

    Example:
        >>> hamming_distances(np.array([7, 8], np.uint64), np.array([5], np.uint64)).tolist()
        [1, 3]
    """
    return np.bitwise_count(np.asarray(a, np.uint64) ^ np.asarray(b, np.uint64)).astype(np.int64)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF is missing from some builds


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says."""
    try:
        turned = image.getexif().get(_ORIENTATION_TAG, 1) not in (0, 1)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return image
    return ImageOps.exif_transpose(image) if turned else image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode: alpha laid over white, 16-bit grey scaled to 8 bit.

    Raises:
        ImageError: For 32-bit pixels, which have no fixed white.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _scaled_grey(image).convert("RGB")
    if image.has_transparency_data:
        colour = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
        white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colour).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ImageError("its pixels are 32-bit numbers with no fixed white; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _what_it_is(content: bytes) -> str:
    if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "it is a HEIC photo, which is not supported; convert it to JPEG"
    head = content[:512]
    if not head.strip(b"\0"):
        return "it holds only zero bytes"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "it is text, not an image"
    return "it is not an image of a known format"


def _plain_reason(error: Any) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "it is truncated"
    return f"its pixel data is broken ({text[:120]})"
