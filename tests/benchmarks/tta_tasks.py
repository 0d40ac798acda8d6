"""The tasks of time_to_accuracy.py: one folder a data set and seed, with the same train/, val/ and test/ for everybody.

tfxfer splits, so that near-duplicates (on bloodcells turned copies too) stay on one side; the images are copied.
"""

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import tfxfer
from tfxfer.runtime.files import write_json

NEAR_DUPLICATES = {"bloodcells": "turned"}
FULL_SETS = ("clothing", "trashnet", "bloodcells")
LABELS_A_CLASS, VAL_A_CLASS = 10, 2
SEEDS = {  # data set (with -10: ten labelled images a class) to the number of seeds, in the order that they are run
    "clothing-10": 3, "bloodcells-10": 3, "trashnet-10": 3, "clothing": 3, "bloodcells": 1, "trashnet": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """One data set with one split.

    Attributes:
        name: As in `SEEDS`.
        seed: Of the split, of the choice of ten, and of all trainings.
        folder: With train/, val/ and test/.
        paths: Of the test images, "CLASS/FILE".
        labels: (N,) class numbers of the test images.
        groups: N names: test images that show one thing share one.
        class_names: Sorted.
        counts: Images by part.
    """

    name: str
    seed: int
    folder: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    groups: tuple[str, ...]
    class_names: tuple[str, ...]
    counts: dict[str, int]

    @property
    def near_duplicates(self) -> str | None:
        """What tfxfer is told about near-duplicates; None: nothing."""
        return NEAR_DUPLICATES.get(self.name.removesuffix("-10"))

    def in_order(self, paths: Sequence[str], class_names: Sequence[str], probabilities: np.ndarray) -> np.ndarray:
        """(N, K) probabilities of rows `paths` and columns `class_names`, in the order of this task."""
        row_of = {path: row for row, path in enumerate(paths)}
        if set(row_of) != set(self.paths) or set(class_names) != set(self.class_names):
            raise SystemExit(f"Of {self.name} another test part was read: {len(row_of)} images, classes {class_names}.")
        columns = [list(class_names).index(name) for name in self.class_names]
        return np.asarray(probabilities, float)[[row_of[path] for path in self.paths]][:, columns]


def make_task(name: str, seed: int, data: Path, results: Path) -> Task:
    """The task of this name; made once, then found again under `results`/data."""
    folder = results / "data" / f"{name}-{seed}"
    if not (folder / "task.json").exists():
        _write_task(name, seed, data, folder)
    told = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    rows = told["test"]
    return Task(
        name, seed, folder, tuple(row["path"] for row in rows), np.array([row["label"] for row in rows]),
        tuple(row["group"] for row in rows), tuple(told["class_names"]), told["counts"],
    )  # fmt: skip


def _write_task(name: str, seed: int, data: Path, folder: Path) -> None:
    full = name.removesuffix("-10")
    dataset = tfxfer.load_data(
        data / full, seed=seed, val_fraction=0.2, near_duplicates=NEAR_DUPLICATES.get(full, True)
    )
    chosen = {
        part: [
            (path, dataset.class_names[label], group)
            for path, label, group in zip(held.paths or (), held.labels, held.groups, strict=True)
        ]
        for part, held in dataset.parts.items()
    }
    if name != full:
        for part, number in (("train", LABELS_A_CLASS - VAL_A_CLASS), ("val", VAL_A_CLASS)):
            chosen[part] = few_a_class(chosen[part], number, seed)
    shutil.rmtree(folder, ignore_errors=True)
    for part, rows in chosen.items():
        for path, label, _ in rows:
            (folder / part / label).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / part / label / path.name)
    rows = [
        {"path": f"{label}/{path.name}", "label": dataset.class_names.index(label), "group": group}
        for path, label, group in sorted(chosen["test"], key=lambda row: (row[1], row[0].name))
    ]
    counts = {part: len(rows) for part, rows in chosen.items()}
    write_json(folder / "task.json", {"class_names": list(dataset.class_names), "counts": counts, "test": rows})


def few_a_class(rows: Sequence[tuple[Path, str, str]], number: int, seed: int) -> list[tuple[Path, str, str]]:
    """`number` rows (path, class, group) of each class by chance, of different groups as far as there are any."""
    drawn = sorted(rows, key=lambda row: str(row[0]))
    random.Random(seed).shuffle(drawn)
    chosen: list[tuple[Path, str, str]] = []
    for name in sorted({label for _, label, _ in rows}):
        mine = [row for row in drawn if row[1] == name]
        seen: dict[str, int] = {}
        turns = []
        for row in mine:
            turns.append(seen.get(row[2], 0))
            seen[row[2]] = turns[-1] + 1
        order = sorted(range(len(mine)), key=turns.__getitem__)
        chosen += [mine[index] for index in order[:number]]
    return chosen
