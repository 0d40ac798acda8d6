"""Reader: a CSV file or a pandas DataFrame with the columns path and label, and perhaps split, group and weight."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfxfer.data.items import Item, Reading, order_of_classes, part_named
from tfxfer.errors import InputError, did_you_mean

COLUMNS = ("path", "label", "split", "group", "weight")


def reads(data: Any) -> bool:
    """Whether `data` is the path of a .csv file or of a folder with labels.csv, or looks like a DataFrame."""
    if isinstance(data, str | Path):
        return Path(data).suffix.lower() == ".csv" or (Path(data) / "labels.csv").is_file()
    return hasattr(data, "columns") and hasattr(data, "to_dict")


def read(data: Any, class_names: Sequence[str] | None = None) -> Reading:
    """One item a row; other columns are ignored.

    Args:
        data: The CSV, whose relative paths start at its own folder; or the frame, whose relative paths start at
            the working directory.
        class_names: The classes in label order; by default in name order, numbers by value.

    Raises:
        InputError: Where the file is missing, a column is missing, or a cell cannot be understood; names the row.
    """
    if isinstance(data, str | Path):
        path = Path(data) / "labels.csv" if Path(data).is_dir() else Path(data)
        rows, where = _rows_of_file(path), str(path)
        base, name = path.resolve().parent, path.resolve().parent.name if path.name == "labels.csv" else path.stem
    else:
        columns = [str(column) for column in data.columns]
        _check_columns(columns, "the DataFrame")
        rows = [
            (f"row {number}", {str(key): value for key, value in row.items()})
            for number, row in enumerate(data.to_dict("records"))
        ]
        where, base, name = "the DataFrame", Path.cwd(), "table"
    items: list[Item] = []
    seen: dict[str, str] = {}
    for place, row in rows:
        item = _item(row, base, f"{where}, {place}")
        earlier = seen.setdefault(item.id, place)
        if earlier != place:
            raise InputError(f"{where}, {place}: the path {item.id!r} is in {earlier} already; each may come once.")
        items.append(item)
    if not items:
        raise InputError(f"No image found in {where}: it has no rows.")
    return Reading(name, tuple(items), order_of_classes({item.label for item in items}, class_names))


def _rows_of_file(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(list(reader.fieldnames or []), str(path))
            return [(f"line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise InputError(f"Cannot read the table {path}: {(error.strerror or str(error)).lower()}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}.") from None


def _check_columns(columns: Sequence[str], where: str) -> None:
    for column in ("path", "label"):
        if column not in columns:
            hint = did_you_mean(column, columns) if columns else "It is empty."
            raise InputError(f"{where[0].upper() + where[1:]} has no column {column!r}. {hint}")


def _item(row: Mapping[str, Any], base: Path, place: str) -> Item:
    path, label = _text(row.get("path")), _text(row.get("label"))
    if not path or not label:
        raise InputError(f"{place}: the {'label' if path else 'path'} is empty; every row needs a path and a label.")
    cell = _text(row.get("split"))
    part = part_named(cell)
    if cell and part is None:
        raise InputError(f"{place}: split is {cell!r}; expected train, val or test, or nothing.")
    full = base / path
    id = full.relative_to(base).as_posix() if full.is_relative_to(base) else Path(path).as_posix()
    return Item(id, label, full, part, _text(row.get("group")), _weight(_text(row.get("weight")), place))


def _text(cell: Any) -> str:
    """A cell as text: nothing for what is missing, and whole numbers without the `.0` that a gap in a column adds."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or str(cell) in ("<NA>", "NaT"):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip()


def _weight(text: str, place: str) -> float | None:
    if not text:
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < math.inf:
        raise InputError(f"{place}: weight is {text!r}; expected a number that is not negative.")
    return weight
