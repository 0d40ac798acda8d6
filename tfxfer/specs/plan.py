"""Everything about a training that a search may vary."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from tfxfer.specs.base import Spec, need
from tfxfer.specs.recipe import Recipe

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
METRICS = ("accuracy", "macro_f1", "balanced_accuracy")
AUGMENT = ("auto", "mirror", "rand", "none")
MAX_VIEWS = 100


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
        drop_class: Classes of the run that is continued (source "run:PATH") that the data no longer has.
        method: The entry of `tfxfer.methods.METHODS`.
        image_size: Side in pixels that images are resized to.
        dropout: Rate before the head while it is fine-tuned, in [0, 1).
        batch_size: Images a step.
        metric: What is selected for: "accuracy", "macro_f1" or "balanced_accuracy".
        features: What a probe reads: "last" (the last block), "multi" (several blocks pooled) or "auto" (several where
            held-out images say that it is better).
        augment: "mirror" (train on plain and left-right mirrored images), "rand" (RandAugment and mirrored), "none", or
            "auto" (mirror unless the probe gets worse by it).
        views: With "rand" and something frozen: views of each image that are computed once, the plain one counted.
        precision: What fine-tuning computes in: "float32", "bfloat16" or (on GPUs) "float16"; or "auto", the quickest
            by measurement, where its losses are the same. Weights, scores and exports are float32 in any case.
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
    features: str = "auto"
    augment: str = "auto"
    views: int = 4
    precision: str = "auto"
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
    drop_class: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.recipe, Mapping):
            object.__setattr__(self, "recipe", Recipe.from_dict(self.recipe))
        need(isinstance(self.recipe, Recipe), f"recipe must be a table with name and stages, not {self.recipe!r}.")
        need(
            isinstance(self.seed, int) and 0 <= self.seed < 2**31,
            f"seed must be a whole number from 0 to {2**31 - 1}, not {self.seed!r}.",
        )
        need(self.image_size >= 1, f"the image size must be at least 1 pixel, not {self.image_size}.")
        need(0 <= self.dropout < 1, f"dropout must lie in [0, 1), not {self.dropout}.")
        need(self.batch_size >= 1, f"the batch size must be at least 1, not {self.batch_size}.")
        need(self.metric in METRICS, f"metric must be one of {', '.join(METRICS)}, not {self.metric!r}.")
        need(
            self.features in ("last", "multi", "auto"),
            f"features must be 'last', 'multi' or 'auto', not {self.features!r}.",
        )
        need(
            self.augment in AUGMENT,
            f"augment must be 'auto', 'mirror', 'rand' or 'none', not {self.augment!r}.",
        )
        need(
            isinstance(self.views, int) and 2 <= self.views <= MAX_VIEWS,
            f"views must be a whole number from 2 (the plain image and one more) to {MAX_VIEWS}, not {self.views!r}.",
        )
        need(
            self.precision in PRECISIONS,
            f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}.",
        )
        need(0 < self.val_fraction < 1, f"the validation fraction must lie between 0 and 1, not {self.val_fraction}.")
        need(
            self.baseline in ("quick", "scratch", "none"),
            f"baseline must be 'quick', 'scratch' or 'none', not {self.baseline!r}.",
        )
        need(
            self.near_duplicates in ("on", "turned", "off"),
            f"near_duplicates must be 'on', 'turned' or 'off', not {self.near_duplicates!r}.",
        )
        need(self.time_limit_seconds >= 0, "time_limit_seconds must not be negative.")
        need(self.num_seeds >= 1, f"the number of seeds must be at least 1, not {self.num_seeds}.")
