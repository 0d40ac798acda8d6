"""The audited and split data: what every later step takes."""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.data.items import PARTS, Content
from tfxfer.data.pixels import PixelRows
from tfxfer.data.split_file import write_split
from tfxfer.errors import InputError, did_you_mean
from tfxfer.runtime.images import Progress, allocate_pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One part: train, val or test. All fields have one entry an image, in one order.

    Attributes:
        ids: Path relative to the data, or "row 17".
        labels: (N,) int64, indices into the data set's class names.
        sha256: Of the content.
        groups: What must not be torn apart; near-duplicates share a group, an image alone has its own id.
        weights: (N,) float32, or `None` where the data has none.
        contents: Where the pixels come from.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    sha256: tuple[str, ...]
    groups: tuple[str, ...]
    weights: np.ndarray | None = None
    contents: tuple[Content, ...] = dataclasses.field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def paths(self) -> tuple[Path, ...] | None:
        """The files, or `None` where the data is not made of files."""
        paths = tuple(content for content in self.contents if isinstance(content, Path))
        return paths if len(paths) == len(self.ids) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in parts; made by `load_data`.

    Attributes:
        name: Short name, for run folders and tables.
        class_names: In label order.
        parts: "train", "val", "test" to their images, in this order; a part may be absent.
        quarantined: (id, reason) of each image that was refused.
        leaks: Identical content in several given parts: `{"sha256", "kept", "dropped"}`, ids; what was dropped is
            in no part.
        conflicts: Identical content under several classes: `{"sha256", "ids", "labels"}`; kept as it is.
        near_duplicates: Ids of images that show the same picture, one tuple a picture.
        split: How the parts came about: `how`, `seed`, `fractions`, `group_by`, `file`.
        image_size: Side of the pixels that are held already, or `None`.
    """

    name: str
    class_names: tuple[str, ...]
    parts: Mapping[str, Part]
    quarantined: tuple[tuple[str, str], ...] = ()
    leaks: tuple[Mapping[str, Any], ...] = ()
    conflicts: tuple[Mapping[str, Any], ...] = ()
    near_duplicates: tuple[tuple[str, ...], ...] = ()
    split: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_size: int | None = None
    _pixels: dict[tuple[str, int], PixelRows] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def __repr__(self) -> str:
        parts = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items())
        told = f", {len(self.quarantined)} quarantined" if self.quarantined else ""
        return f"<Dataset {self.name!r}: {self.num_classes} classes, {parts}{told}>"

    def part(self, name: str) -> Part:
        """The part of this name.

        Raises:
            InputError: Where there is none.
        """
        if name not in self.parts:
            raise InputError(f"The data {self.name!r} has no part {name!r}. {did_you_mean(name, self.parts)}")
        return self.parts[name]

    def pixels(self, part: str, size_px: int, on_progress: Progress | None = None) -> np.ndarray:
        """All images of a part, decoded and resized, in memory; `pixel_rows` reads them as they are needed.

        Args:
            part: "train", "val" or "test".
            size_px: Side in pixels.
            on_progress: Called with (done, total).

        Returns:
            (N, size_px, size_px, 3) uint8 in the order of the part; a file on disk, mapped, when above 2 GB.

        Raises:
            ImageError: Where a file changed since the audit and cannot be decoded any more.
        """
        rows = self.pixel_rows(part, size_px)
        pixels = allocate_pixels(len(rows), size_px)
        for start in range(0, len(rows), 64):
            pixels[start : start + 64] = rows[start : start + 64]
            if on_progress is not None:
                on_progress(min(start + 64, len(rows)), len(rows))
        return pixels

    def pixel_rows(self, part: str, size_px: int) -> PixelRows:
        """The images of a part in a temporary file, decoded and resized when they are first read; at most once.

        Args:
            part: "train", "val" or "test".
            size_px: Side in pixels.

        Returns:
            What an int, a slice or an array of ints picks (n, size_px, size_px, 3) uint8 arrays from.
        """
        if (part, size_px) not in self._pixels:
            found = self.part(part)
            self._pixels[part, size_px] = PixelRows.of_contents(found.contents, found.sha256, size_px)
        return self._pixels[part, size_px]

    def with_classes(self, class_names: Sequence[str]) -> "Dataset":
        """The same images with the classes in another order.

        Args:
            class_names: The classes, each once, in label order.
        """
        number = np.array([class_names.index(name) for name in self.class_names])
        parts = {
            name: dataclasses.replace(part, labels=number[part.labels].astype(np.int64))
            for name, part in self.parts.items()
        }
        return dataclasses.replace(self, class_names=tuple(class_names), parts=parts)

    def counts(self) -> dict[str, dict[str, int]]:
        """Images by part and class."""
        tallies = {name: Counter(part.labels.tolist()) for name, part in self.parts.items()}
        return {
            name: {label: tally[index] for index, label in enumerate(self.class_names)}
            for name, tally in tallies.items()
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the classes and over part, class and content of every image; no matter of order or names."""
        lines = sorted(
            f"{name}\t{self.class_names[label]}\t{sha256}"
            for name, part in self.parts.items()
            for label, sha256 in zip(part.labels, part.sha256, strict=True)
        )
        return hashlib.sha256("\n".join([*self.class_names, "", *lines]).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What run.json keeps of the data; plain values only."""
        part_of = {id: name for name, part in self.parts.items() for id in part.ids}
        crossing = [ids for ids in self.near_duplicates if len({part_of[id] for id in ids}) > 1]
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "classes": list(self.class_names),
            "counts": self.counts(),
            "groups": {name: len(set(part.groups)) for name, part in self.parts.items()},
            "quarantined": [{"path": id, "reason": reason} for id, reason in self.quarantined],
            "leaks": [dict(leak) for leak in self.leaks],
            "conflicts": [dict(conflict) for conflict in self.conflicts],
            "near_duplicates": [list(ids) for ids in self.near_duplicates],
            "near_duplicates_across_parts": [list(ids) for ids in crossing],
            "split": dict(self.split),
        }

    def write_split(self, path: str | Path) -> None:
        """Write split.csv (path, label, part, group, sha256), which `load_data(split=...)` reuses."""
        rows = [
            {"path": id, "label": self.class_names[label], "part": name, "group": group, "sha256": sha256}
            for name, part in self.parts.items()
            for id, label, group, sha256 in zip(part.ids, part.labels, part.groups, part.sha256, strict=True)
        ]
        write_split(Path(path), rows)

    def as_tf(
        self, part: str, image_size: int | None = None, batch_size: int = 32, shuffle: bool = False, seed: int = 0
    ) -> Any:
        """A part as a `tf.data.Dataset` for the user's own `fit`.

        Args:
            part: "train", "val" or "test".
            image_size: Side in pixels; by default the size the data was loaded at, else 224.
            batch_size: Images a batch; the last one may be smaller.
            shuffle: Whether to draw a new order each epoch.
            seed: Of the orders.

        Returns:
            Batches of (images float32 (n, S, S, 3) in 0..255, labels int64 (n,)), and the weights where there are
            some.
        """
        import tensorflow as tf

        chosen = self.part(part)
        size_px = image_size or self.image_size or 224
        pixels = self.pixel_rows(part, size_px)
        rows = tf.data.Dataset.range(len(chosen))
        if shuffle:
            rows = rows.shuffle(len(chosen), seed=seed, reshuffle_each_iteration=True)
        labels = tf.constant(chosen.labels)
        weights = None if chosen.weights is None else tf.constant(chosen.weights)

        def batch(index: Any) -> tuple[Any, ...]:
            images = tf.numpy_function(
                lambda rows: pixels[rows].astype(np.float32), [index], tf.float32, stateful=False
            )
            images.set_shape((None, size_px, size_px, 3))
            found = (images, tf.gather(labels, index))
            return found if weights is None else (*found, tf.gather(weights, index))

        return rows.batch(batch_size).map(batch, num_parallel_calls=2).prefetch(2)


def parts_in_order(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts that have images, as train, val, test."""
    return {name: parts[name] for name in PARTS if name in parts and len(parts[name])}
