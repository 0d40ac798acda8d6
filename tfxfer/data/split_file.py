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
    """A split.csv that was written before: the part of an image by its path, or by its content where it was renamed.

    Args:
        path: The file.

    Raises:
        InputError: Where it cannot be read or lacks a column.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._by_path: dict[str, str] = {}
        self._by_content: dict[str, str] = {}
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                columns = reader.fieldnames or []
                for column in ("path", "part", "sha256"):
                    if column not in columns:
                        hint = did_you_mean(column, columns)
                        raise InputError(f"{path} has no column {column!r}, so it is not a split.csv. {hint}")
                for row in reader:
                    self._add(row, reader.line_num)
        except OSError as error:
            raise InputError(f"Cannot read the split file {path}: {error.strerror}.") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"The split file {path} is not a CSV file in UTF-8: {error}.") from None

    def _add(self, row: Mapping[str, str], line: int) -> None:
        part = part_named(row["part"] or "")
        if part is None:
            raise InputError(f"{self.path}, line {line}: part is {row['part']!r}; expected one of {', '.join(PARTS)}.")
        self._by_path[row["path"]] = part
        if row["sha256"]:
            self._by_content[row["sha256"]] = part

    def part_of(self, id: str, sha256: str) -> str | None:
        """The part of an image, or `None` where it is new."""
        return self._by_path.get(id) or self._by_content.get(sha256)
