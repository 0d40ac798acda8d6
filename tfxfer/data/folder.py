"""Reader: a folder with one folder a class, or with train/, val/ and test/ that hold those."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tfxfer.data.items import Item, Reading, order_of_classes, part_named
from tfxfer.errors import InputError
from tfxfer.runtime.images import IMAGE_SUFFIXES

_Rejected = tuple[str, str]
_UNREAD_PICTURES = frozenset(
    f".{name}" for name in ("arw", "cr2", "cr3", "dcm", "dng", "heic", "heif", "jp2", "jxl", "nef", "psd", "raw", "svg")
)


def reads(data: Any) -> bool:
    """Whether `data` is a path that does not name a CSV file or a folder with labels.csv."""
    if not isinstance(data, str | Path):
        return False
    path = Path(data)
    return path.suffix.lower() != ".csv" and not (path / "labels.csv").is_file()


def read(data: Any, class_names: Sequence[str] | None = None) -> Reading:
    """Find the images of every class.

    Where there is a folder train/, it and the folders val/ and test/ beside it (also `validation`, `valid`; any
    case) are the parts and all else beside them is ignored. Otherwise every folder is a class. Images may lie
    deeper inside a class folder. Hidden files and folders, `__pycache__` and folders without files are passed by;
    every other file is either an item or rejected with its reason.

    Args:
        data: Path of the folder.
        class_names: The classes in label order; by default the folders in name order.

    Raises:
        InputError: Where there is no such folder or no image in it.
    """
    given = Path(data)
    if not given.exists():
        raise InputError(f"There is no folder {given}{_nearby(given)}.")
    if not given.is_dir():
        raise InputError(f"{given} is a file; expected a folder of class folders, or a .csv file with path and label.")
    root = given.resolve()
    items: list[Item] = []
    rejected: list[_Rejected] = []
    for part, folder in _part_folders(root):
        for class_folder in _folders(folder):
            found, refused = _class_items(root, class_folder, part)
            items += found
            rejected += refused
    if not items:
        raise InputError(_nothing_found(given, rejected))
    _check_no_class_is_lost({item.label for item in items}, rejected)
    return Reading(
        root.name, tuple(items), order_of_classes({item.label for item in items}, class_names), tuple(rejected)
    )


def _check_no_class_is_lost(classes: set[str], rejected: Sequence[_Rejected]) -> None:
    """A folder of foreign files is no class; a folder of pictures that cannot be read would be one too few."""
    for name, reason in rejected:
        *folders, file = name.split("/")
        label = next((folder for folder in folders if part_named(folder) is None), "")
        if label not in classes and Path(file).suffix.lower() in _UNREAD_PICTURES:
            raise InputError(
                f"The folder {label} has pictures but none that can be read, as {name}: {reason}; convert them to JPEG "
                "or PNG, or move the folder away."
            )


def _part_folders(root: Path) -> list[tuple[str | None, Path]]:
    parts: dict[str, Path] = {}
    for folder in _folders(root):
        part = part_named(folder.name)
        if part is None:
            continue
        if part in parts:
            raise InputError(f"{parts[part]} and {folder} both mean the part {part!r}; keep one of them.")
        parts[part] = folder
    if "train" not in parts:
        if len(parts) > 1:
            raise InputError(
                f"{root} has {' and '.join(sorted(parts))} but no train folder; add it, or pass one folder."
            )
        return [(None, root)]
    for folder in parts.values():
        if _leaves(folder, root):
            raise InputError(f"{folder} is a link out of the data folder; copy the images there instead.")
    return sorted(parts.items())  # type: ignore[return-value]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _class_items(root: Path, folder: Path, part: str | None) -> tuple[list[Item], list[_Rejected]]:
    if _leaves(folder, root):
        return [], [(folder.relative_to(root).as_posix(), "it is a link out of the data folder")]
    items: list[Item] = []
    rejected: list[_Rejected] = []
    for path in _files(folder):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() and _leaves(path, root):
            rejected.append((name, "it is a link out of the data folder"))
        elif path.is_dir():
            rejected.append((name, "it is a link to a folder"))
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            rejected.append((name, f"its suffix {path.suffix!r} is not one of an image format that is read"))
        else:
            items.append(Item(name, folder.name, path, part))
    return items, rejected


def _files(folder: Path) -> Iterator[Path]:
    """Files and links below `folder` in a fixed order; folders behind links are not entered."""
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not _hidden(name) and name not in links)
        for name in sorted(files + links):
            if not _hidden(name):
                yield Path(where) / name


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _leaves(path: Path, root: Path) -> bool:
    return not path.resolve().is_relative_to(root)


def _nearby(path: Path) -> str:
    parent = next(parent for parent in [*path.absolute().parents] if parent.is_dir())
    names = sorted(child.name for child in parent.iterdir() if child.is_dir() and not _hidden(child.name))
    return f"; {parent} has {', '.join(names[:8])}" if names else ""


def _nothing_found(root: Path, rejected: Sequence[_Rejected]) -> str:
    if rejected:
        where, reason = rejected[0]
        return f"No image found in {root}: {len(rejected)} files were refused, the first {where}: {reason}."
    flat = any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir())
    hint = "its images lie in no class folder" if flat else "it holds none"
    return f"No labelled image found in {root}: {hint}; expected one folder a class, as {root.name}/cat/1.jpg."
