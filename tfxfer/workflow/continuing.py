"""Go on with a finished run: its classes keep their numbers, its images their parts, and the two models are compared.

`--source run:OLD` continues OLD where the data has classes of OLD's. Where it has none, OLD's backbone is a source like
any other, and only the rule remains that an image that OLD was trained on is never tested on.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfxfer.data import Dataset
from tfxfer.data.items import order_of_classes
from tfxfer.data.load import content_digests
from tfxfer.data.split_file import EarlierSplit, write_split
from tfxfer.errors import InputError, did_you_mean
from tfxfer.features.solvers import Anchor
from tfxfer.model.predict import predict_in_batches
from tfxfer.select.promotion import in_classes, judge_promotion
from tfxfer.specs import Plan
from tfxfer.train.lock import check_free
from tfxfer.workflow.run import MODEL_FILE, Run, load_run

PREFIX = "run:"
SPLIT_FILE = "split.csv"
# What runs before had seen and the data no longer has: the next run in the chain must know it too.
EARLIER_FILE = "earlier.csv"
# What a continued run does as the one before did, unless told otherwise.
INHERITED = ("group_by", "metric", "near_duplicates")


def inherited(source: Any) -> dict[str, Any]:
    """The values of a plan that a source brings along; none where it is no run.

    Example:
        >>> inherited("digits_cnn")
        {}
    """
    if not isinstance(source, str) or not source.startswith(PREFIX):
        return {}
    before = load_run(source.removeprefix(PREFIX)).info["plan"]
    return {key: before[key] for key in INHERITED if key in before}


@dataclasses.dataclass(frozen=True)
class Classes:
    """How the classes of a run go on.

    Attributes:
        kept, new, dropped: Their names; none is kept where nothing is continued.
    """

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """In label order: old ones keep their numbers, less the rows that went away; new ones follow."""
        return (*self.kept, *self.new)


class Earlier:
    """The run that a plan names as its source.

    Attributes:
        run: The run, which is only read.
        split: Which image it, and the runs before it, had in which part.

    Raises:
        InputError: Where it is still at work, or does not tell what it was trained on.
    """

    def __init__(self, folder: str | Path, trusted: Sequence[str] = ()):
        self.run: Run = load_run(folder, trusted=trusted)
        path = self.run.path
        check_free(path)
        if not (path / SPLIT_FILE).is_file():
            raise InputError(
                f"{path} has no {SPLIT_FILE}, so which images it was trained on is not known; copy it there again, or, "
                f"for its backbone alone, name {path / MODEL_FILE} as the source."
            )
        more = [path / EARLIER_FILE] if (path / EARLIER_FILE).is_file() else []
        self.split = EarlierSplit(path / SPLIT_FILE, *more, continued=True)

    def classes(self, found: Sequence[str], drop: Sequence[str], what: str) -> Classes:
        """How its classes go on in data with such classes.

        Args:
            found: The data's classes, in any order.
            drop: Classes that are to go.
            what: The data, for messages.

        Raises:
            InputError: Where a class has no image and is not dropped, or a dropped one has some or is none.
        """
        folder, theirs = self.run.path, self.run.class_names
        kept = tuple(name for name in theirs if name in found)
        new = order_of_classes(set(found) - set(theirs))
        if not kept:
            if drop:
                raise InputError(
                    f"No class of {what} is one of {folder}, so only its backbone goes on and --drop-class would do "
                    "nothing; drop it."
                )
            return Classes((), new)
        for name in drop:
            if name not in theirs:
                raise InputError(f"--drop-class {name!r} is no class of {folder}. {did_you_mean(name, theirs)}")
            if name in found:
                raise InputError(f"--drop-class {name!r} is to go, but {what} has images of it; move them away.")
        missing = [name for name in theirs if name not in found and name not in drop]
        if missing:
            raise InputError(
                f"{folder} knows {_listed(missing)}, of which {what} has no image; add images, or let the class go: "
                f"{' '.join(f'--drop-class {name}' for name in missing)}. For the run's backbone alone, name "
                f"{folder / MODEL_FILE} as the source."
            )
        return Classes(kept, new, tuple(name for name in theirs if name not in kept))


def earlier_run(plan: Plan) -> Earlier | None:
    """The run that a plan goes on with; None where its source is none."""
    if not plan.source.startswith(PREFIX):
        if plan.drop_class:
            raise InputError(f"--drop-class is for a run that is continued (--source run:OLD), not for {plan.source}.")
        return None
    return Earlier(plan.source.removeprefix(PREFIX), plan.trust)


class Continuing:
    """How data goes on with an earlier run.

    Args:
        earlier: The run.
        dataset: The data, split already.
        plan: For the classes to drop.
        own_model: The user built the model, so the order of its classes is theirs.

    Attributes:
        classes: How the classes go on.
        dataset: The data, its classes in the order of the run before and then the new ones.

    Raises:
        InputError: Where the classes do not go on, or an image is tested on that was trained on, or the reverse.
    """

    def __init__(self, earlier: Earlier, dataset: Dataset, plan: Plan, *, own_model: bool = False):
        self.earlier = earlier
        if own_model:
            self.classes = Classes((), dataset.class_names)
        else:
            self.classes = earlier.classes(dataset.class_names, plan.drop_class, dataset.name)
        self.dataset = dataset.with_classes(self.classes.names) if self.continues else dataset
        self._check_parts()

    @property
    def continues(self) -> bool:
        """Whether classes go on, and not the backbone alone."""
        return bool(self.classes.kept)

    @property
    def known(self) -> np.ndarray:
        """(K,) bool: the classes that the run before knew."""
        return np.isin(np.array(self.dataset.class_names), self.classes.kept)

    def seen(self, sha256: Sequence[str]) -> np.ndarray:
        """(N,) bool: which of these images runs before were trained on."""
        trained = self.earlier.split.trained_on()
        return np.array([digest in trained for digest in sha256], bool)

    def taken_over(self, model: keras.Model) -> dict[str, Any]:
        """For `training_data`: which images runs before have seen, and the head that the new one is held to.

        Args:
            model: As it was built, with the old head.
        """
        train, val = self.dataset.part("train"), self.dataset.part("val")
        seen = self.seen((*train.sha256, *val.sha256))
        if not self.continues:
            return {"seen": seen}
        kernel, bias = (np.where(self.known, value, 0.0) for value in model.get_layer("logits").get_weights())
        return {"seen": seen, "anchor": Anchor(kernel.astype(np.float32), bias.astype(np.float32), self.known)}

    def describe(self) -> dict[str, Any]:
        """What run.json keeps, before anything is trained."""
        known = {row["sha256"] for row in self.earlier.split.rows}
        images = {}
        for name, part in self.dataset.parts.items():
            old = sum(digest in known for digest in part.sha256)
            images[name] = {"old": old, "new": len(part) - old}
        info = self.earlier.run.info
        return {
            "run": str(self.earlier.run.path),
            "status_of_run": info.get("status", ""),
            "model_sha256": info["model"]["sha256"],
            "what": "classes and backbone" if self.continues else "backbone only",
            "classes": {key: list(names) for key, names in dataclasses.asdict(self.classes).items()},
            "images": {**images, "no_longer_in_the_data": len(self._absent())},
        }

    def write_earlier(self, folder: Path) -> None:
        """Keep what runs before had seen beside the new split.csv, which tells of today's images only."""
        absent = self._absent()
        if absent:
            write_split(folder / EARLIER_FILE, absent)

    def compare(self, probabilities: np.ndarray, plan: Plan) -> dict[str, Any]:
        """Score the model of the run before on the test part too, and compare; see `judge_promotion`.

        Args:
            probabilities: (N, K) of the new model on the test part.
            plan: Metric and seed.
        """
        if not self.continues:
            return {"verdict": "not compared", "reason": "the two models have no class in common"}
        run, test = self.earlier.run, self.dataset.part("test")
        pixels = self.dataset.pixel_rows("test", run.info["plan"]["image_size"])
        theirs = predict_in_batches(run.model, pixels)
        return judge_promotion(
            probabilities, in_classes(theirs, run.class_names, self.dataset.class_names), test.labels,
            known=self.known, class_names=self.dataset.class_names, groups=test.groups, weights=test.weights,
            metric=plan.metric, seed=plan.seed,
        )  # fmt: skip

    def _absent(self) -> list[dict[str, str]]:
        here = {digest for part in self.dataset.parts.values() for digest in part.sha256}
        return [row for row in self.earlier.split.rows if row["sha256"] not in here]

    def _check_parts(self) -> None:
        """What `load_data(split=...)` sees to; data that was loaded before may be split otherwise."""
        parts, split = self.dataset.parts, self.earlier.split
        trained = split.trained_on()
        tested = {row["sha256"] for row in split.rows} - trained
        for name, part in parts.items():
            wrong = [digest in (trained if name == "test" else tested) for digest in part.sha256]
            if any(wrong):
                was, now = ("trained on", "tests on") if name == "test" else ("tested on", "trains on")
                raise InputError(
                    f"{self.earlier.run.path} was {was} {sum(wrong)} images that {self.dataset.name} now {now}, such "
                    f"as {part.ids[wrong.index(True)]}; give fit the folder or the "
                    "arrays themselves, which are then split as the run's were."
                )


def look_ahead(data: Any, found: Sequence[str], plan: Plan) -> dict[str, Any]:
    """What `--dry-run` says about going on with a run; {} where the source is none.

    Args:
        data: Folder or CSV, read but not decoded.
        found: Its classes.
        plan: Source and classes to drop.
    """
    earlier = earlier_run(plan)
    if earlier is None:
        return {}
    classes = earlier.classes(found, plan.drop_class, str(data))
    known, digests = {row["sha256"] for row in earlier.split.rows}, content_digests(data)
    old = sum(digest in known for digest in digests)
    return {
        "continued": {
            "run": str(earlier.run.path),
            "what": "classes and backbone" if classes.kept else "backbone only",
            "classes": {key: list(names) for key, names in dataclasses.asdict(classes).items()},
            "images": {"old": old, "new": len(digests) - old},
        }
    }


def _listed(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return " and ".join(([", ".join(quoted[:-1])] if quoted[1:] else []) + quoted[-1:])
