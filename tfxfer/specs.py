"""The words of tfxfer as frozen dataclasses: Source, Stage, Recipe, Plan, Block, Certificate. Plain data only."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from tfxfer.errors import InputError, did_you_mean

BATCH_NORM_STATES = ("frozen", "affine", "adapt", "train")
METRICS = ("accuracy", "macro_f1", "balanced_accuracy")


class Spec:
    """Base of the dataclasses here: to and from plain dicts, unknown keys refused by name."""

    what: ClassVar[str] = "spec"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain mapping.

        Raises:
            InputError: Where a key is unknown or missing, or a value is out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in fields:
                raise InputError(f"Unknown key {key!r} in the {cls.what}. {did_you_mean(key, fields)}")
        for key, value in values.items():
            _check_type(f"{key!r} in the {cls.what}", value, fields[key].type)
        try:
            return cls(**{key: _frozen(value) for key, value in values.items()})
        except TypeError as error:
            raise InputError(f"The {cls.what} is not complete: {error}.") from None

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, of what TOML and JSON can hold; `None` is left out."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) is not None
        }


_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    int | float | str: ((int, float, str), "a number or text"),
    str | tuple[str, ...]: ((str, list, tuple), "text or a list of texts"),
}


def _check_type(what: str, value: Any, wanted: Any) -> None:
    kinds, words = _TYPES.get(wanted, ((object,), ""))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
        raise InputError(f"{what} must be {words}, not {value!r}.")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


@dataclasses.dataclass(frozen=True)
class Block(Spec):
    """A run of consecutive layers of a backbone that freezes as one.

    Attributes:
        name: Unique in the backbone.
        layers: Names of its layers, in the order of the network.
        num_parameters: All numbers in its weights, BatchNorm statistics included.
    """

    what: ClassVar[str] = "block"
    name: str
    layers: tuple[str, ...]
    num_parameters: int


def pattern_of(depth: Any) -> re.Pattern | None:
    """The regular expression that a freeze depth is, "re:PATTERN" or compiled; None where it is another depth.

    Raises:
        InputError: Where the pattern is no regular expression.

    Example:
        >>> pattern_of("re:^conv"), pattern_of(3)
        (re.compile('^conv'), None)
    """
    if isinstance(depth, re.Pattern):
        return depth
    if not isinstance(depth, str) or not depth.startswith("re:"):
        return None
    try:
        return re.compile(depth.removeprefix("re:"))
    except re.error as error:
        raise InputError(f"The freeze pattern {depth!r} is not a regular expression: {error}.") from None


def depth_of(names: Sequence[str], depth: int | float | str) -> int:
    """The number of leading blocks that `depth` names.

    Args:
        names: Of all blocks, from the input to the head.
        depth: A count in 0..len(names); a share of the blocks strictly between 0 and 1, rounded to whole blocks; "all";
            or a block's name (inclusive). Strings of numbers are numbers.

    Raises:
        InputError: Where the count is out of range or no block has that name.

    Example:
        >>> depth_of(["stem", "block_1", "top"], "block_1"), depth_of(["stem", "block_1", "top"], "all")
        (2, 3)
        >>> depth_of(["stem", "block_1", "block_2", "top"], 0.5)
        2
    """
    names = list(names)
    if depth == "all":
        return len(names)
    if isinstance(depth, str) and depth in names:
        return names.index(depth) + 1
    try:
        number = float(depth)
    except (TypeError, ValueError):
        raise InputError(
            f"No block is named {depth!r}; a freeze depth is 0 to {len(names)}, a share such as 0.7, 'all', "
            f"'re:PATTERN', or one of {', '.join(names)}."
        ) from None
    if 0 < number < 1:
        return round(number * len(names))
    if isinstance(depth, bool) or not number.is_integer() or not 0 <= number <= len(names):
        raise InputError(
            f"Freeze depth {depth} is out of range: there are {len(names)} blocks; give 0 to {len(names)}, a share "
            "between 0 and 1, or all."
        )
    return int(number)


@dataclasses.dataclass(frozen=True)
class Source(Spec):
    """A pretrained model that can be loaded: what its card in models/ says, or what was found out about a file.

    Attributes:
        name: As the user spells it.
        kind: The entry of `tfxfer.sources.KINDS` that loads it.
        title: One line for tables.
        reference: What stands behind the prefix of the spelling: a path, a handle, the name of an architecture.
        architecture: The builder's name in `tfxfer.sources.builders.BUILDERS`.
        licence: SPDX identifier of the weights.
        paper: Authors, title, venue, year.
        weights: `package` and `file` inside it, or a `file` beside the card; `sha256`; `install`, the command that
            brings the package.
        image_size_px: Side of the square input it was trained at.
        min_image_size_px: The smallest side that it takes.
        fixed_size: Whether it takes no other side (a Flatten inside).
        scale, offset: Per channel; the network sees `pixel * scale + offset` with pixels in 0..255.
        channel_order: "rgb", or "bgr": channels are turned round before scale and offset.
        blocks: Names of its blocks in order. A layer belongs to block B if it is named B or starts with `B_`. Empty:
            found in the network itself.
        fine_tune_depth: Number of leading blocks that recipe `auto` keeps frozen when it fine-tunes; -1: the first
            seven tenths.
        num_classes: Width of the original output.
        class_names: "imagenet", or the names.
        features: Width of the backbone's output; 0: seen when it is loaded.
        num_parameters: Numbers in the weights of the backbone; 0: seen when it is loaded.
        partial: Whether weights may be loaded in part.
        trusted: Modules whose custom objects may be made: the user's own code.
    """

    what: ClassVar[str] = "source card"
    name: str
    kind: str
    title: str
    licence: str
    image_size_px: int
    min_image_size_px: int
    architecture: str = ""
    reference: str = ""
    paper: str = ""
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)
    channel_order: str = "rgb"
    blocks: tuple[str, ...] = ()
    num_classes: int = 0
    class_names: str | tuple[str, ...] = ()
    features: int = 0
    num_parameters: int = 0
    fine_tune_depth: int = -1
    fixed_size: bool = False
    url: str = ""
    notes: str = ""
    partial: bool = False
    trusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.blocks)) != len(self.blocks):
            raise InputError(f"The card of {self.name!r} needs block names, each once.")
        if self.channel_order not in ("rgb", "bgr"):
            raise InputError(f"The card of {self.name!r}: channel_order must be 'rgb' or 'bgr'.")
        if not -1 <= self.fine_tune_depth <= (len(self.blocks) or self.fine_tune_depth):
            raise InputError(f"The card of {self.name!r}: fine_tune_depth must lie in 0..{len(self.blocks)}, or be -1.")


@dataclasses.dataclass(frozen=True)
class Stage(Spec):
    """One step of a recipe.

    Attributes:
        name: For logs and tables.
        solver: "convex" (regularised logistic head on frozen features, to its optimum) or "adamw".
        freeze_depth: Leading blocks frozen: a count, a share strictly between 0 and 1, a block name (inclusive), "all",
            or "auto" (the card's); or "re:PATTERN", any blocks and layers with such names.
        epochs: Passes over the training part, at least 1; 0 for the convex solver.
        learning_rates: Peak rates measured from the highest down until one is no better; one value is used as it is.
        warmup_share: Share of the steps that the rate climbs; cosine to zero afterwards.
        weight_decay: Decoupled; kernels only.
        label_smoothing: In [0, 1).
        batch_norm: State of BatchNorm in trained blocks: "frozen", "affine", "adapt" or "train".
        min_steps: Give small data more epochs, so that a stage has at least 100 steps.
        layer_decay: In (0, 1]; each block learns at this share of the rate of the one behind it, the head at the whole.
        average: In [0, 1); above 0 the weights kept are a moving average with this decay.
        mixup, cutmix: The alpha of their Beta distribution, 0 for none; of both, each batch gets one. Where blocks are
            frozen, what crosses the boundary is mixed, not pixels.
        clip_norm: Gradients are scaled down to this norm.
        micro_batches: A batch is computed in so many parts, which takes as much less memory.
    """

    what: ClassVar[str] = "stage"
    name: str
    solver: str = "adamw"
    freeze_depth: int | float | str = "auto"
    epochs: int = 6
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    warmup_share: float = 0.2
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    batch_norm: str = "frozen"
    min_steps: bool = True
    layer_decay: float = 1.0
    average: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    clip_norm: float = 1.0
    micro_batches: int = 1

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        _need(self.solver in ("convex", "adamw"), f"{where}: solver must be 'convex' or 'adamw', not {self.solver!r}.")
        _need(self.epochs >= (self.solver == "adamw"), f"{where}: epochs must be at least 1, not {self.epochs}.")
        _need(
            bool(self.learning_rates) and all(0 < rate < 10 for rate in self.learning_rates),
            f"{where}: learning rates must lie between 0 and 10.",
        )
        _need(0 <= self.warmup_share < 1, f"{where}: warmup_share must lie in [0, 1).")
        _need(0 <= self.label_smoothing < 1, f"{where}: label_smoothing must lie in [0, 1).")
        _need(self.weight_decay >= 0, f"{where}: weight_decay must not be negative.")
        _need(0 < self.layer_decay <= 1, f"{where}: layer_decay must lie in (0, 1], not {self.layer_decay}.")
        _need(0 <= self.average < 1, f"{where}: average must lie in [0, 1), not {self.average}.")
        _need(min(self.mixup, self.cutmix) >= 0, f"{where}: mixup and cutmix must not be negative.")
        _need(self.clip_norm > 0, f"{where}: clip_norm must be above 0, not {self.clip_norm}.")
        _need(self.micro_batches >= 1, f"{where}: micro_batches must be at least 1, not {self.micro_batches}.")
        _need(
            self.batch_norm in BATCH_NORM_STATES,
            f"{where}: batch_norm must be one of {', '.join(BATCH_NORM_STATES)}, not {self.batch_norm!r}.",
        )


@dataclasses.dataclass(frozen=True)
class Recipe(Spec):
    """A name and its stages, in order."""

    what: ClassVar[str] = "recipe"
    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        stages = tuple(Stage.from_dict(stage) if isinstance(stage, Mapping) else stage for stage in self.stages)
        object.__setattr__(self, "stages", stages)
        _need(bool(stages), f"recipe {self.name!r} has no stage.")
        _need(all(isinstance(s, Stage) for s in stages), f"recipe {self.name!r}: each stage must be a table.")
        _need(
            all(stage.solver != "convex" for stage in stages[1:]),
            f"recipe {self.name!r}: a convex stage can only be the first.",
        )


@dataclasses.dataclass(frozen=True)
class Plan(Spec):
    """Everything about a training that a search may vary, and that `config.toml` keeps.

    Attributes:
        source: Name of the source, or another spelling of one, such as hub:PATH.
        recipe: The stages.
        weights: File with the source's weights, where they are not its own; empty: its own.
        input_range: What the source wants pixels scaled to, see `tfxfer.sources.ranges`; empty: what is known of it.
        partial: Whether the source's weights may be loaded in part.
        trust: Modules of the user's own code that custom objects in model files may come from.
        method: The entry of `tfxfer.methods.METHODS`.
        image_size: Side in pixels that images are resized to.
        dropout: Rate before the head while it is fine-tuned, in [0, 1).
        batch_size: Images a step.
        metric: What is selected for: "accuracy", "macro_f1" or "balanced_accuracy".
        augment: "mirror" (train on plain and left-right mirrored images), "none", or "auto" (mirror unless the probe
            gets worse by it).
        seed: Of split, shuffle, dropout and bootstrap.
        val_fraction: Share split off for validation where the data brings none.
        baseline: "quick", "scratch" or "none".
        group_by: Regular expression on relative paths; what it captures names the group. Empty: none.
        near_duplicates: Which images stay together: "on" (near-duplicates by perceptual hash), "turned" (also turned,
            mirrored and shifted copies; its time grows with the square of a class), or "off".
        time_limit_seconds: Wall time for training; 0: none.
        num_seeds: Repetitions of both sides of the baseline gate.
    """

    what: ClassVar[str] = "plan"
    source: str
    recipe: Recipe
    method: str = "fine_tune"
    image_size: int = 224
    dropout: float = 0.2
    batch_size: int = 32
    metric: str = "accuracy"
    augment: str = "auto"
    seed: int = 0
    val_fraction: float = 0.2
    baseline: str = "quick"
    group_by: str = ""
    near_duplicates: str = "on"
    time_limit_seconds: float = 0.0
    num_seeds: int = 1
    weights: str = ""
    input_range: str = ""
    partial: bool = False
    trust: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.recipe, Mapping):
            object.__setattr__(self, "recipe", Recipe.from_dict(self.recipe))
        _need(isinstance(self.recipe, Recipe), f"recipe must be a table with name and stages, not {self.recipe!r}.")
        _need(
            isinstance(self.seed, int) and 0 <= self.seed < 2**31,
            f"seed must be a whole number from 0 to {2**31 - 1}, not {self.seed!r}.",
        )
        _need(self.image_size >= 1, f"image_size must be at least 1 pixel, not {self.image_size}.")
        _need(0 <= self.dropout < 1, f"dropout must lie in [0, 1), not {self.dropout}.")
        _need(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}.")
        _need(self.metric in METRICS, f"metric must be one of {', '.join(METRICS)}, not {self.metric!r}.")
        _need(
            self.augment in ("auto", "mirror", "none"),
            f"augment must be 'auto', 'mirror' or 'none', not {self.augment!r}.",
        )
        _need(0 < self.val_fraction < 1, f"val_fraction must lie between 0 and 1, not {self.val_fraction}.")
        _need(
            self.baseline in ("quick", "scratch", "none"),
            f"baseline must be 'quick', 'scratch' or 'none', not {self.baseline!r}.",
        )
        _need(
            self.near_duplicates in ("on", "turned", "off"),
            f"near_duplicates must be 'on', 'turned' or 'off', not {self.near_duplicates!r}.",
        )
        _need(self.time_limit_seconds >= 0, "time_limit_seconds must not be negative.")
        _need(self.num_seeds >= 1, f"num_seeds must be at least 1, not {self.num_seeds}.")


@dataclasses.dataclass(frozen=True)
class Certificate(Spec):
    """The proof that an exported artifact computes what the model computes.

    Attributes:
        format: "saved_model" or "onnx".
        path: Of the artifact, relative to the certificate.
        sha256: Digest of the artifact (of all files and their names, for a folder).
        runtime: Name and version of what reopened it.
        num_images: Real images compared.
        batch_sizes: Batches they were fed in.
        max_abs_difference, mean_abs_difference: Of probabilities, over everything compared.
        tolerance: Largest difference allowed.
        top1_agreement: Share of images with the same first class, ties below the tolerance counted as the same.
        passed: The verdict.
        problems: One sentence each, empty where it passed.
    """

    what: ClassVar[str] = "certificate"
    format: str
    path: str
    sha256: str
    runtime: str
    num_images: int
    batch_sizes: tuple[int, ...]
    max_abs_difference: float
    mean_abs_difference: float
    tolerance: float
    top1_agreement: float
    passed: bool
    problems: tuple[str, ...] = ()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: Where it is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from None


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise InputError(sentence[0].upper() + sentence[1:])
