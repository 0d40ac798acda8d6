"""From anything that holds labelled images to a Dataset: read, audit, group, split, check."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.data.audit import Audit, audit, open_content
from tfxfer.data.dataset import Dataset, Part, parts_in_order
from tfxfer.data.duplicates import linked_groups, near_duplicate_pairs
from tfxfer.data.items import PARTS, Item, Reading, joined, part_named, with_groups
from tfxfer.data.pixels import PixelRows
from tfxfer.data.split import check_fractions, split_items
from tfxfer.data.split_file import EarlierSplit
from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_bytes
from tfxfer.runtime.images import ImageError, Progress, read_bytes
from tfxfer.runtime.store import RowStore


def load_data(
    data: Any,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    group_by: str | None = None,
    split: str | Path | EarlierSplit | None = None,
    image_size: int | None = None,
    near_duplicates: bool | str = True,
    class_names: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> Dataset:
    """Read labelled images, refuse what cannot be read, and split them without leaks.

    Args:
        data: A folder of class folders, or of train/ with test/ and/or val/ that hold those; a .csv file or a
            pandas DataFrame with `path,label` and perhaps `split,group,weight`; arrays `(x, y)` or `(x, y, w)`; a
            `tf.data.Dataset` of the same; a Hugging Face Dataset with Image and ClassLabel; or a dict of "train",
            "val", "test" to any of these.
        seed: Of the split.
        val_fraction: Share of the training images split off for validation where the data brings none, in [0, 1).
        test_fraction: Share split off for the test where the data brings none, in [0, 1).
        group_by: Regular expression searched in the relative paths; what it captures names a group, and groups
            never cross parts.
        split: A split.csv of an earlier run, or what was read of some: images in it keep their part.
        image_size: Side in pixels of the images to keep, in a temporary file, from the one decoding pass.
        near_duplicates: Whether near-duplicates are found and kept together; "turned" finds turned, mirrored and
            shifted copies of a class too, which takes some 10 seconds for 900 images.
        class_names: The classes in label order, where it is not to be the order of names; for arrays the names of
            the labels 0, 1, 2 ...
        on_progress: Called with (done, total) while images are decoded.

    Returns:
        The data set: every image is in one part, in `quarantined` or in `leaks`.

    Raises:
        InputError: Where there is nothing to train on, with the place and what to do.
    """
    fractions = {"val": val_fraction, "test": test_fraction}
    check_fractions(fractions)
    reading = _read(data, class_names, near_duplicates)
    if group_by:
        reading = Reading(reading.name, with_groups(reading.items, group_by), reading.class_names, reading.rejected)
    checked = audit(reading.items, image_size, bool(near_duplicates), near_duplicates == "turned", on_progress)
    quarantined = (*reading.rejected, *checked.rejected)
    kept, leaks = _without_leaks(checked)
    items = [checked.items[row] for row in kept]
    sha256 = [checked.sha256[row] for row in kept]
    _check_classes(reading, items, quarantined)
    keys, groups, alike = _groups(items, sha256, _pairs(checked, kept))
    parts, how = split_items(items, keys, sha256, seed, fractions, split)
    file = str(split.path if isinstance(split, EarlierSplit) else split or "")
    order = sorted(range(len(items)), key=lambda row: PARTS.index(parts[row]))  # stable: keeps the reader's order
    dataset = Dataset(
        name=reading.name,
        class_names=reading.class_names,
        parts=_parts(items, sha256, groups, parts, order, reading.class_names),
        quarantined=quarantined,
        leaks=leaks,
        conflicts=_conflicts(items, sha256),
        near_duplicates=alike,
        split={**how, "seed": seed, "group_by": group_by or "", "file": file},
        image_size=image_size,
    )
    if checked.pixels is not None and image_size is not None:
        _hand_over(dataset, checked.pixels, checked.rows[[kept[row] for row in order]], image_size)
    _check_parts(dataset)
    return dataset


def load_test_data(
    data: Any,
    class_names: Sequence[str],
    *,
    group_by: str | None = None,
    image_size: int | None = None,
    near_duplicates: bool | str = True,
    on_progress: Progress | None = None,
) -> Dataset:
    """Read labelled images to score a trained model on: the test part where the data has one, else everything.

    Args:
        data: As for `load_data`.
        class_names: The model's classes in label order; the data may lack some, and may have no others.
        group_by, image_size, near_duplicates, on_progress: As for `load_data`.

    Returns:
        A data set whose one part is "test".

    Raises:
        InputError: Where no image is left, or a class is not one of the model's.
    """
    reading = _read(data, class_names, near_duplicates)
    items = tuple(item for item in reading.items if item.part == "test") or reading.items
    if group_by:
        items = with_groups(items, group_by)
    checked = audit(items, image_size, bool(near_duplicates), near_duplicates == "turned", on_progress)
    if not checked.items:
        where, reason = (*reading.rejected, *checked.rejected)[0]
        raise InputError(f"No image of {reading.name} can be read; the first, {where}: {reason}.")
    rows = range(len(checked.items))
    _, groups, alike = _groups(checked.items, checked.sha256, _pairs(checked, rows))
    dataset = Dataset(
        name=reading.name,
        class_names=tuple(class_names),
        parts=_parts(checked.items, checked.sha256, groups, ["test"] * len(rows), rows, class_names),
        quarantined=(*reading.rejected, *checked.rejected),
        conflicts=_conflicts(checked.items, checked.sha256),
        near_duplicates=alike,
        split={"how": "all for the test", "fractions": {}, "seed": 0, "group_by": group_by or "", "file": ""},
        image_size=image_size,
    )
    if checked.pixels is not None and image_size is not None:
        _hand_over(dataset, checked.pixels, checked.rows, image_size)
    return dataset


def look_over(data: Any) -> tuple[str, ...]:
    """Refuse what `load_data` would refuse without decoding an image: no images, one class, a class of one image.

    Returns:
        The names of the classes in label order.

    Raises:
        InputError: As `load_data`.
    """
    reading = _read(data, None, True)
    _check_classes(reading, reading.items, reading.rejected)
    return reading.class_names


def read_items(data: Any) -> tuple[Item, ...]:
    """The images of a data set as its reader finds them, none of them decoded."""
    return tuple(_read(data, None, True).items)


def content_digests(data: Any) -> tuple[str, ...]:
    """The SHA-256 of each image that can be read, as a split.csv has it; files are read and not decoded."""
    found = []
    for item in _read(data, None, True).items:
        with contextlib.suppress(ImageError):
            path = item.content
            found.append(sha256_of_bytes(read_bytes(path)) if isinstance(path, Path) else open_content(path)[0])
    return tuple(found)


def _read(data: Any, class_names: Sequence[str] | None, near_duplicates: bool | str) -> Reading:
    if near_duplicates not in (True, False, "turned"):
        raise InputError(f"near_duplicates must be True, False or 'turned', not {near_duplicates!r}.")
    if isinstance(data, Dataset):
        raise InputError("The data is loaded already; pass the Dataset on as it is.")
    if class_names is not None and len(set(class_names)) != len(class_names):
        raise InputError("The class names must differ from each other.")
    if isinstance(data, Mapping) and data and all(part_named(str(key)) for key in data):
        return joined({key: _read(value, class_names, near_duplicates) for key, value in data.items()}, class_names)
    from tfxfer.data import READERS

    for load_reader in READERS.values():
        reader = load_reader()
        if reader.reads(data):
            return reader.read(data, class_names)
    raise InputError(
        f"Cannot read data of type {type(data).__name__}; expected a folder, a .csv file, a DataFrame, (x, y) arrays, "
        "a tf.data.Dataset, a Hugging Face Dataset, or a dict with 'train' and 'test' of these."
    )


def _without_leaks(checked: Audit) -> tuple[list[int], tuple[dict[str, Any], ...]]:
    """Rows to keep, and the leaks: content in several given parts stays in the test, or else in the validation."""
    by_content: dict[str, list[int]] = defaultdict(list)
    for row, sha256 in enumerate(checked.sha256):
        if checked.items[row].part:
            by_content[sha256].append(row)
    dropped: set[int] = set()
    leaks = []
    for sha256, rows in by_content.items():
        parts = {checked.items[row].part for row in rows}
        if len(parts) < 2:
            continue
        keeper = next(part for part in ("test", "val") if part in parts)
        out = [row for row in rows if checked.items[row].part != keeper]
        dropped.update(out)
        kept_ids = [checked.items[row].id for row in rows if row not in out]
        leaks.append({"sha256": sha256, "kept": kept_ids, "dropped": [checked.items[row].id for row in out]})
    return [row for row in range(len(checked.items)) if row not in dropped], tuple(leaks)


def _pairs(checked: Audit, rows: Sequence[int]) -> np.ndarray:
    """Near-duplicates among these rows of the audit, numbered within them."""
    if checked.looks is None:
        return np.empty((0, 2), np.int64)
    kept = np.asarray(rows, np.int64)
    pairs = near_duplicate_pairs(checked.looks[kept], checked.sides_px[kept])
    if checked.patterns is None:
        return pairs
    from tfxfer.data.turned import turned_pairs

    points, descriptions = (values[kept] for values in checked.patterns)
    turned = turned_pairs(points, descriptions, [checked.items[row].label for row in rows])
    return np.concatenate([pairs, turned])


def _groups(
    items: Sequence[Item], sha256: Sequence[str], pairs: np.ndarray
) -> tuple[list[str], list[str], tuple[tuple[str, ...], ...]]:
    """Split keys, group names, and the near-duplicates.

    The key of a group is the smallest of its members' named groups or digests: a choice without regard to
    `share`, so that large groups go to each part as often as single images do.
    """
    links = [(int(a), int(b)) for a, b in pairs]
    first: dict[str, int] = {}
    for row, digest in enumerate(sha256):
        if first.setdefault(digest, row) != row:
            links.append((first[digest], row))
    pictures: dict[int, list[int]] = defaultdict(list)
    for row, root in enumerate(linked_groups(len(items), links)):
        pictures[root].append(row)
    alike = tuple(tuple(items[row].id for row in rows) for rows in pictures.values() if len(rows) > 1)
    named: dict[str, int] = {}
    for row, item in enumerate(items):
        if item.group and named.setdefault(item.group, row) != row:
            links.append((named[item.group], row))
    roots = linked_groups(len(items), links)
    members: dict[int, list[int]] = defaultdict(list)
    for row, root in enumerate(roots):
        members[root].append(row)
    key_of = {root: min(_own_key(items[row], sha256[row]) for row in rows) for root, rows in members.items()}
    name_of = {root: min(items[row].group or items[row].id for row in rows) for root, rows in members.items()}
    return [key_of[root] for root in roots], [name_of[root] for root in roots], alike


def _own_key(item: Item, sha256: str) -> str:
    return f"group {item.group}" if item.group else sha256


def _check_classes(reading: Reading, items: Sequence[Item], quarantined: Sequence[tuple[str, str]]) -> None:
    """Refuse what is too little to train on, before any split."""
    refused = ""
    if quarantined:
        where, reason = quarantined[0]
        refused = f" ({len(quarantined)} files were refused, the first {where}: {reason})"
    if not items:
        raise InputError(f"No image of {reading.name} can be read{refused}.")
    if len(reading.class_names) < 2:
        raise InputError(
            f"All images of {reading.name} are of one class, {reading.class_names[0]!r}; at least two are needed."
        )
    total = Counter(item.label for item in items)
    trained = Counter(item.label for item in items if item.part in (None, "train"))
    for name in reading.class_names:
        if total[name] == 1:
            only = next(item.id for item in items if item.label == name)
            raise InputError(f"Class {name!r} has one image, {only}; at least two are needed{refused}.")
        if total[name] == 0:
            raise InputError(f"Class {name!r} has no image that can be read{refused}.")
        if trained[name] < 2 and any(trained.values()):
            count = "no image" if not trained[name] else "one image only"
            raise InputError(f"Class {name!r} has {count} in train; at least two are needed{refused}.")


def _check_parts(dataset: Dataset) -> None:
    for part, counts in dataset.counts().items():
        for name, count in counts.items():
            if not count:
                raise InputError(
                    f"Class {name!r} is missing from the part {part!r} of {dataset.name}; add images of it there, or "
                    "leave that part out and have one split off."
                )


def _conflicts(items: Sequence[Item], sha256: Sequence[str]) -> tuple[dict[str, Any], ...]:
    labels: dict[str, list[Item]] = defaultdict(list)
    for item, digest in zip(items, sha256, strict=True):
        labels[digest].append(item)
    return tuple(
        {"sha256": digest, "ids": [item.id for item in same], "labels": [item.label for item in same]}
        for digest, same in labels.items()
        if len({item.label for item in same}) > 1
    )


def _parts(
    items: Sequence[Item],
    sha256: Sequence[str],
    groups: Sequence[str],
    parts: Sequence[str],
    order: Sequence[int],
    class_names: Sequence[str],
) -> dict[str, Part]:
    label_of = {name: index for index, name in enumerate(class_names)}
    weighted = any(item.weight is not None for item in items)
    made = {}
    for name in PARTS:
        rows = [row for row in order if parts[row] == name]
        weights = [1.0 if (weight := items[row].weight) is None else weight for row in rows]
        made[name] = Part(
            ids=tuple(items[row].id for row in rows),
            labels=np.array([label_of[items[row].label] for row in rows], np.int64),
            sha256=tuple(sha256[row] for row in rows),
            groups=tuple(groups[row] for row in rows),
            weights=np.array(weights, np.float32) if weighted else None,
            contents=tuple(items[row].content for row in rows),
        )
    return parts_in_order(made)


def _hand_over(dataset: Dataset, pixels: RowStore, rows: np.ndarray, size_px: int) -> None:
    """Give each part its stretch of the pixels that the audit decoded."""
    start = 0
    for name, part in dataset.parts.items():
        dataset._pixels[name, size_px] = PixelRows(pixels, rows[start : start + len(part)], part.sha256)
        start += len(part)
