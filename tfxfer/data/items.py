"""What a reader hands over: one item an image, before anything is decoded."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tfxfer.errors import InputError, did_you_mean

PARTS = ("train", "val", "test")
_PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

# A file, encoded bytes, an (H, W, C) uint8 array, or a function that fetches one of them when its turn comes.
Encoded = Path | bytes | np.ndarray | Image.Image
Content = Encoded | Callable[[], Encoded]


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One labelled image.

    Attributes:
        id: Path relative to the data, with slashes, or "row 17".
        label: Name of its class.
        content: Where its pixels come from.
        part: "train", "val" or "test" where the data says so.
        group: Name of its group where the data says so, else empty.
        weight: Of the sample in training, where given.
    """

    id: str
    label: str
    content: Content = dataclasses.field(repr=False)
    part: str | None = None
    group: str = ""
    weight: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """All that a reader found.

    Attributes:
        name: Short name of the data.
        items: In a fixed order.
        class_names: In label order.
        rejected: (id, reason) of what was found but cannot be an image of a class.
    """

    name: str
    items: tuple[Item, ...]
    class_names: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...] = ()


def part_named(name: str) -> str | None:
    """The part that a folder, key or cell of this name means, whatever its case; `None` where it means none.

    Example:
        >>> part_named("Validation"), part_named("dress")
        ('val', None)
    """
    return _PART_NAMES.get(name.strip().lower())


def order_of_classes(found: Iterable[str], wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Class names in label order: as wanted, else numbers by value and words by name.

    Raises:
        InputError: Where a class was found that is not among the wanted ones.

    Example:
        >>> order_of_classes({"10", "9"}), order_of_classes({"b", "a"})
        (('9', '10'), ('a', 'b'))
    """
    names = set(found)
    if wanted is None:
        numbers = all(name.isdecimal() for name in names)
        return tuple(sorted(names, key=lambda name: (int(name), name) if numbers else (0, name)))
    for name in sorted(names):
        if name not in wanted:
            raise InputError(
                f"The data has a class {name!r}, which is not among those known here. {did_you_mean(name, wanted)}"
            )
    return tuple(wanted)


def check_pattern(pattern: str) -> re.Pattern[str]:
    """The compiled group expression.

    Raises:
        InputError: Where it is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"The group expression {pattern!r} is not a regular expression: {error}.") from None


def with_groups(items: Sequence[Item], pattern: str) -> tuple[Item, ...]:
    """The items, each in the group that a regular expression finds in its id; unmatched ones stay as they are.

    Args:
        items: The items.
        pattern: Searched in the id; the first capturing group that matched, or else the whole match, is the name.

    Raises:
        InputError: Where the expression is not valid or matches no id at all.
    """
    regex = check_pattern(pattern)
    grouped = []
    num_matched = 0
    for item in items:
        match = regex.search(item.id)
        if match:
            num_matched += 1
            name = next((text for text in match.groups() if text), match.group())
            item = dataclasses.replace(item, group=name)
        grouped.append(item)
    if items and not num_matched:
        raise InputError(f"The group expression {pattern!r} matches none of the paths, such as {items[0].id!r}.")
    return tuple(grouped)


def joined(readings: Mapping[str, Reading], wanted: Sequence[str] | None) -> Reading:
    """One reading out of several, each the part that its key names.

    Raises:
        InputError: Where a key names no part, or two keys the same.
    """
    items: list[Item] = []
    rejected: list[tuple[str, str]] = []
    parts: dict[str, str] = {}
    for key, reading in readings.items():
        part = part_named(str(key))
        if part is None:
            raise InputError(f"Unknown part {key!r} in the data; expected 'train', 'val' and 'test'.")
        if part in parts:
            raise InputError(f"The keys {parts[part]!r} and {key!r} both mean the part {part!r}; keep one.")
        parts[part] = str(key)
        items += [dataclasses.replace(item, id=f"{key}/{item.id}", part=part) for item in reading.items]
        rejected += [(f"{key}/{where}", reason) for where, reason in reading.rejected]
    orders = {reading.class_names for reading in readings.values()}
    names = orders.pop() if len(orders) == 1 else order_of_classes({name for order in orders for name in order}, wanted)
    return Reading("arrays", tuple(items), names, tuple(rejected))
