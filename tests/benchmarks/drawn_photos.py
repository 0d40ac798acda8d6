"""Any number of small photos, drawn with repetition from a data set and each altered, so that no two are equal."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tfxfer.runtime.images import map_threads

MARK_PX = 8


def write_photos(source: Path, folder: Path, count: int, size_px: int, seed: int = 0) -> Path:
    """Make `folder`/CLASS/NUMBER.jpg, classes in turn; an existing folder of the same is taken as it is.

    Each is a photo of `source` (class folders), squashed, perhaps mirrored, brightened or darkened, with a small
    square of noise in a corner that no other has.

    Args:
        source: Folder of class folders.
        folder: To write to.
        count: Images.
        size_px: Their side.
        seed: Of the draws.
    """
    done = folder / f".{count}-{size_px}-{seed}"
    if done.exists():
        return folder
    files = {child.name: sorted(child.iterdir()) for child in sorted(source.iterdir()) if child.is_dir()}
    for name in files:
        (folder / name).mkdir(parents=True, exist_ok=True)

    def write(drawn: tuple[int, str, Path]) -> None:
        number, name, file = drawn
        altered(file, size_px, (seed, number)).save(folder / name / f"{number:06d}.jpg", quality=90)

    for _ in map_threads(write, drawn_files(files, count, seed)):
        pass
    done.touch()
    return folder


def drawn_files(files: dict[str, list[Path]], count: int, seed: int) -> Iterator[tuple[int, str, Path]]:
    """(number, class, file), each class in turn and each of its files before any comes again."""
    turns = {}
    for name, found in files.items():
        order = list(found)
        random.Random(f"{seed} {name}").shuffle(order)
        turns[name] = itertools.cycle(order)
    for number, name in zip(range(count), itertools.cycle(files), strict=False):
        yield number, name, next(turns[name])


def altered(file: Path, size_px: int, seed: tuple[int, int]) -> Image.Image:
    """The photo of a file as number `seed` of a set."""
    rng = np.random.default_rng(seed)
    with Image.open(file) as image:
        image.draft("RGB", (2 * size_px, 2 * size_px))
        pixels = np.asarray(image.convert("RGB").resize((size_px, size_px), Image.Resampling.BILINEAR))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    changed = np.clip(pixels * rng.uniform(0.7, 1.2), 0, 255).astype(np.uint8)
    changed[:MARK_PX, :MARK_PX] = rng.integers(256, size=(MARK_PX, MARK_PX, 3))
    return Image.fromarray(changed)
