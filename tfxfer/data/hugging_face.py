"""Reader: a Hugging Face `datasets.Dataset` or `DatasetDict` with an Image and a ClassLabel column."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfxfer.data.items import Encoded, Item, Reading, joined, part_named
from tfxfer.errors import InputError, did_you_mean
from tfxfer.runtime.images import ImageError


def reads(data: Any) -> bool:
    """Whether `data` has `features`, rows by number and columns by name, or is a mapping of such things."""
    if isinstance(data, Mapping):
        return bool(data) and all(reads(value) for value in data.values())
    return isinstance(getattr(data, "features", None), Mapping) and hasattr(data, "cast_column")


def read(data: Any, class_names: Sequence[str] | None = None) -> Reading:
    """One item a row; the encoded images are fetched row by row when they are decoded.

    Args:
        data: The data set.
        class_names: The classes in label order; by default those of the ClassLabel.

    Raises:
        InputError: Where there is not one Image and one ClassLabel column, or a row has no label.
    """
    if isinstance(data, Mapping):
        for key in data:
            if part_named(str(key)) is None:
                raise InputError(f"Unknown split {key!r} in the data; expected 'train', 'validation' and 'test'.")
        return joined({str(key): read(value, class_names) for key, value in data.items()}, class_names)
    image_column, label_column = _column(data, "Image"), _column(data, "ClassLabel")
    names = tuple(data.features[label_column].names)
    for name in class_names or ():
        if name not in names:
            raise InputError(f"The data has no class {name!r}. {did_you_mean(name, names)}")
    encoded = data.cast_column(image_column, type(data.features[image_column])(decode=False))
    items = []
    for row, label in enumerate(data[label_column]):
        if label is None or not 0 <= label < len(names):
            raise InputError(
                f"Row {row} has the label {label}; expected 0..{len(names) - 1}. Filter such rows out first."
            )
        items.append(Item(f"row {row}", names[label], _fetcher(encoded, row, image_column)))
    return Reading(_name_of(data), tuple(items), tuple(class_names or names))


def _column(data: Any, kind: str) -> str:
    columns = [name for name, feature in data.features.items() if type(feature).__name__ == kind]
    if len(columns) != 1:
        found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in data.features.items())
        raise InputError(f"The data has {len(columns)} columns of type {kind}; expected one. It has: {found}.")
    return columns[0]


def _fetcher(data: Any, row: int, column: str) -> Callable[[], Encoded]:
    def fetch() -> Encoded:
        cell = data[row][column]
        if not cell or not (cell.get("bytes") or cell.get("path")):
            raise ImageError("its record has no image")
        return cell["bytes"] or Path(cell["path"])

    return fetch


def _name_of(data: Any) -> str:
    return str(getattr(getattr(data, "info", None), "dataset_name", None) or "hugging_face")
