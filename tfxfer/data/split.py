"""Which image goes to which part: by a hash of seed and content, so that new files never move old ones."""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfxfer.data.items import Item
from tfxfer.data.split_file import EarlierSplit
from tfxfer.errors import InputError


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Refuse fractions outside [0, 1), or that leave nothing to train on.

    Raises:
        InputError: Names the fraction.
    """
    for part, value in fractions.items():
        if not 0 <= value < 1:
            raise InputError(f"{part}_fraction must lie in [0, 1), not {value}.")
    if sum(fractions.values()) >= 1:
        raise InputError(f"The fractions to split off add up to {sum(fractions.values())}, so none is left to train.")


def split_items(
    items: Sequence[Item],
    keys: Sequence[str],
    sha256: Sequence[str],
    seed: int,
    fractions: Mapping[str, float],
    file: str | Path | EarlierSplit | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Keep the parts that the data gives and split off those that it lacks.

    They come from the items without a part, or where all have one, from the training items; never is a given
    validation part taken for the test.

    Args:
        items: The items.
        keys: Group of each, see `assign`.
        sha256: Of the content of each.
        seed: Of the split.
        fractions: Share of the parts "val" and "test", where the data lacks them.
        file: An earlier split.csv, or some, whose decisions stay.

    Returns:
        The part of each item, and how it came about: `how` in words, `fractions` of the parts split off.

    Raises:
        InputError: Where there is nothing to train on, groups cross given parts, or the file contradicts the data.
    """
    given = {item.part for item in items if item.part}
    free = None if any(item.part is None for item in items) else "train"
    if free and free not in given:
        raise InputError(f"The data has no training part; expected 'train' beside {' and '.join(sorted(given))}.")
    _check_named_groups(items)
    needed = {part: value for part, value in fractions.items() if part not in given and value > 0}
    part_of_key = {key: item.part for item, key in zip(items, keys, strict=True) if item.part}
    fixed = [part_of_key.get(key) if free is None else None for key in keys]
    if file is not None:
        earlier = _earlier(items, sha256, file, free, needed)
        fixed = [before or now for before, now in zip(earlier, fixed, strict=True)]
    parts = [item.part or "train" for item in items]
    if free is None or needed:
        pool = [row for row, item in enumerate(items) if item.part == free]
        labels = [items[row].label for row in pool]
        assigned = assign(labels, [keys[row] for row in pool], needed, seed, [fixed[row] for row in pool])
        for row, part in zip(pool, assigned, strict=True):
            parts[row] = part
    made = " and ".join(sorted(needed)) or "nothing"
    return parts, {
        "how": f"{made} split off by content; given: {', '.join(sorted(given)) or 'none'}",
        "fractions": needed,
    }


def share(seed: int, key: str) -> float:
    """A number in [0, 1) that is as good as random and depends on nothing but the seed and the key.

    Example:
        >>> round(share(0, "a"), 4), share(0, "a") == share(1, "a")
        (0.3715, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:7]) / 2**56


def assign(
    labels: Sequence[str],
    keys: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
    fixed: Sequence[str | None] | None = None,
) -> list[str]:
    """Give every image a part.

    A group whose number `share(seed, key)` lies below the fraction of "test" goes there, in the next stretch to
    "val", else it stays in "train". As no other file has a say, files that are added move none that were there.
    The price is that the size of a part varies around its fraction as coin tosses do. One repair: a class
    without an image in some part gets the group there whose number is nearest to it, so only classes of a few
    groups can see a file move when others come.

    Args:
        labels: Class of each image.
        keys: Group of each image; one that is alone brings a key of its own (its content's digest).
        fractions: Share of each part to split off: "test", "val" or both, in [0, 1), the sum below 1.
        seed: Another seed is another split.
        fixed: The part of each image that was decided before, or `None`.

    Returns:
        The part of each image.

    Raises:
        InputError: Where a class has too few groups to be in every part.
    """
    fixed = fixed or [None] * len(labels)
    members: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        members[key].append(index)
    parts: dict[str, str] = {}
    for key, indices in members.items():
        decided = {part for index in indices if (part := fixed[index])}
        # Copies of one picture that were decided apart stay so; a new copy follows the one outside training.
        parts[key] = next((part for part in ("test", "val", "train") if part in decided), "") or _part_of(
            share(seed, key), fractions
        )
    wanted = ["train", *(part for part in ("test", "val") if fractions.get(part))]
    movable = {key: share(seed, key) for key, indices in members.items() if all(fixed[i] is None for i in indices)}
    _repair(parts, {key: [labels[i] for i in indices] for key, indices in members.items()}, movable, wanted)
    return [fixed[index] or parts[key] for index, key in enumerate(keys)]


def _part_of(number: float, fractions: Mapping[str, float]) -> str:
    edge = 0.0
    for part in ("test", "val"):
        edge += fractions.get(part, 0.0)
        if number < edge:
            return part
    return "train"


def _repair(
    parts: dict[str, str], labels: Mapping[str, list[str]], movable: Mapping[str, float], wanted: Sequence[str]
) -> None:
    """Move single groups until every class is in every wanted part, taking from where it has groups to spare."""
    groups: Counter[tuple[str, str]] = Counter()  # (part, class) -> groups that hold the class there
    by_class: dict[str, list[str]] = defaultdict(list)
    for key, names in labels.items():
        for name in set(names):
            groups[parts[key], name] += 1
            by_class[name].append(key)
    for part, name in itertools.product(wanted, sorted(by_class)):
        if groups[part, name]:
            continue
        spare = [
            key
            for key in by_class[name]
            if key in movable and all(groups[parts[key], other] > 1 for other in set(labels[key]))
        ]
        if not spare:
            kept = sum(key not in movable for key in by_class[name])
            held = f", and {kept} of them keep the part that the earlier split gave them" if kept else ""
            raise InputError(
                f"Class {name!r} has {len(by_class[name])} images or groups that are independent of each other, too "
                f"few to be in {_listed(wanted)}{held}; add images, or bring a part for test or validation of your own."
            )
        from_train = [key for key in spare if parts[key] == "train"] or spare
        key = max(from_train, key=movable.__getitem__) if part == "train" else min(from_train, key=movable.__getitem__)
        for other in set(labels[key]):
            groups[parts[key], other] -= 1
            groups[part, other] += 1
        parts[key] = part


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def _check_named_groups(items: Sequence[Item]) -> None:
    seen: dict[str, Item] = {}
    for item in items:
        if not item.group or item.part is None:
            continue
        other = seen.setdefault(item.group, item)
        if other.part != item.part:
            raise InputError(
                f"Group {item.group!r} is in two given parts ({other.id} in {other.part}, {item.id} in {item.part}); "
                "groups must not cross parts: name the groups apart or move the images."
            )


def _earlier(
    items: Sequence[Item],
    sha256: Sequence[str],
    file: str | Path | EarlierSplit,
    free: str | None,
    needed: Mapping[str, float],
) -> list[str | None]:
    earlier = file if isinstance(file, EarlierSplit) else EarlierSplit(file)
    found = [earlier.part_of(item.id, digest, item.group) for item, digest in zip(items, sha256, strict=True)]
    if not any(found) and not earlier.continued:
        raise InputError(f"None of the {len(items)} images is in {earlier.path}; it belongs to other data.")
    for row, (item, part) in enumerate(zip(items, found, strict=True)):
        allowed = {"train", *needed} if item.part == free else {item.part}
        if earlier.continued and part in ("train", "val") and item.part in ("train", "val"):
            found[row] = part if part in allowed else None  # seen in training is seen in training
        elif part and part not in allowed:
            raise InputError(
                f"{earlier.path} puts {item.id} in {part}, but the data has it in {item.part or 'another part'}."
            )
    return found
