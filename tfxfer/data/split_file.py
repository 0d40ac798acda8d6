"""split.csv: which image was in which part, to be reused."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfxfer.data.items import PARTS, part_named
from tfxfer.errors import InputError, did_you_mean
from tfxfer.runtime.files import write_text

SPLIT_COLUMNS = ("path", "label", "part", "group", "sha256")


def write_split(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write split.csv atomically: one row an image with `SPLIT_COLUMNS`."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, SPLIT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(Path(path), buffer.getvalue())


class EarlierSplit:
    """What was decided before: the part of an image by its path, or by its content where it was renamed.

    Args:
        path: A split.csv.
        more: Further ones that tell of other images.
        continued: For data that has grown, and may be another folder by now: an image is known by its content, or else
            by the group that the data names for it, never by its path; and none of them has to be known.

    Attributes:
        path: The first file.
        continued: As given.
        rows: One dict an image, with `SPLIT_COLUMNS`.

    Raises:
        InputError: Where a file cannot be read or lacks a column.
    """

    def __init__(self, path: str | Path, *more: str | Path, continued: bool = False) -> None:
        self.path, self.continued = Path(path), continued
        self.rows: list[dict[str, str]] = []
        for file in (path, *more):
            self.rows += _rows(Path(file))
        self._by_path = {row["path"]: row["part"] for row in self.rows}
        self._by_content = {row["sha256"]: row["part"] for row in self.rows if row["sha256"]}
        self._by_group: dict[str, str] = {}
        for row in self.rows:
            if row.get("group") and self._by_group.get(row["group"]) != "train":
                self._by_group[row["group"]] = row["part"]

    def part_of(self, id: str, sha256: str, group: str = "") -> str | None:
        """The part of an image, or `None` where it is new."""
        if self.continued:
            return self._by_content.get(sha256) or (self._by_group.get(group) if group else None)
        return self._by_path.get(id) or self._by_content.get(sha256)

    def trained_on(self) -> frozenset[str]:
        """The SHA-256 of what is in the train and validation part."""
        return frozenset(digest for digest, part in self._by_content.items() if part != "test")


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            for column in ("path", "part", "sha256"):
                if column not in columns:
                    hint = did_you_mean(column, columns)
                    raise InputError(f"{path} has no column {column!r}, so it is not a split.csv. {hint}")
            return [{**row, "part": _part(row, f"{path}, line {reader.line_num}")} for row in reader]
    except OSError as error:
        raise InputError(f"Cannot read the split file {path}: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"The split file {path} is not a CSV file in UTF-8: {error}.") from None


def _part(row: Mapping[str, str], where: str) -> str:
    part = part_named(row["part"] or "")
    if part is None:
        raise InputError(f"{where}: part is {row['part']!r}; expected one of {', '.join(PARTS)}.")
    return part
