"""Spaces of plans: plain functions from KerasTuner's hyperparameters to a `Plan`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tfxfer.errors import InputError
from tfxfer.specs import Plan, Recipe, Source, Stage

Space = Callable[[Any], Plan]

RATES = (1e-4, 3e-3)
LAYER_DECAYS = (1.0, 0.9, 0.8, 0.65)
WEIGHT_DECAYS = (1e-4, 1e-1)
HEADS = ("convex", "ridge")
AUGMENTS = ("none", "mirror")
MAX_DEPTHS = 10
ALL_KEYS = ("freeze_depth", "learning_rate", "layer_decay", "weight_decay", "dropout", "head", "augment", "image_size")
KEYS = ("freeze_depth", "learning_rate", "layer_decay", "weight_decay", "dropout")


def default_space(plan: Plan, cards: Sequence[Source], *, keys: Sequence[str] = KEYS) -> Space:
    """What is searched unless you say otherwise: freeze depth first of all.

    Args:
        plan: What stays as it is; its fine-tuning stages get the values.
        cards: Sources to choose among; of one, nothing is to be chosen. The first is the default.
        keys: What varies: `freeze_depth` (blocks of the source, at most ten depths from the first block on),
            `learning_rate` (1e-4 to 3e-3, log), `layer_decay` (1, 0.9, 0.8, 0.65), `weight_decay` (1e-4 to 0.1, log),
            `dropout` (0 to 0.5), `head` (how the probe is solved that training starts from: "convex", "ridge"),
            `augment` ("none", "mirror"), `image_size` (the plan's, and three quarters of it in steps of 32 px).

    Returns:
        A function from `keras_tuner.HyperParameters` to a plan. Write your own the same way.

    Raises:
        InputError: Where a key is unknown, a source has no list of blocks, or the plan has no fine-tuning stage.

    Example:
        >>> from tfxfer import Plan, get_recipe, get_source
        >>> import keras_tuner
        >>> space = default_space(Plan("digits_cnn", get_recipe("full"), image_size=32), [get_source("digits_cnn")])
        >>> hp = keras_tuner.HyperParameters()
        >>> space(hp).recipe.stages[-1].freeze_depth in range(5), sorted(hp.values)[0]
        (True, 'dropout')
    """
    unknown = [key for key in keys if key not in ALL_KEYS]
    if unknown:
        raise InputError(f"The default space has no {unknown[0]!r}; there are {', '.join(ALL_KEYS)}.")
    if not any(not stage.is_probe for stage in plan.recipe.stages):
        raise InputError(
            f"Recipe {plan.recipe.name!r} fine-tunes nothing, so there is no depth to search; give 'full'."
        )
    for card in cards:
        if not card.blocks and "freeze_depth" in keys:
            raise InputError(
                f"Source {card.name!r} has no list of blocks to choose a depth from; give a space of your own."
            )
    by_name = {card.name: card for card in cards}

    def space(hp: Any) -> Plan:
        name = next(iter(by_name))
        if len(by_name) > 1:
            name = hp.Choice("source", list(by_name))
            with hp.conditional_scope("source", [name]):
                return _of_source(hp, plan, by_name[name], keys, f"/{name}")
        return _of_source(hp, plan, by_name[name], keys, "")

    return space


def _of_source(hp: Any, plan: Plan, card: Source, keys: Sequence[str], suffix: str) -> Plan:
    stage: dict[str, Any] = {}
    if "freeze_depth" in keys:
        depths = depths_of(card)
        # A number of KerasTuner's has one name; that of a source's blocks goes with the source.
        stage["freeze_depth"] = hp.Choice(f"freeze_depth{suffix}", depths, default=_middle(depths), ordered=True)
    if "learning_rate" in keys:
        stage["learning_rates"] = (hp.Float("learning_rate", *RATES, sampling="log", default=1e-3),)
    if "layer_decay" in keys:
        stage["layer_decay"] = hp.Choice("layer_decay", LAYER_DECAYS, default=1.0, ordered=True)
    if "weight_decay" in keys:
        stage["weight_decay"] = hp.Float("weight_decay", *WEIGHT_DECAYS, sampling="log", default=0.01)
    changes: dict[str, Any] = {"source": card.name}
    if "dropout" in keys:
        changes["dropout"] = hp.Float("dropout", 0.0, 0.5, step=0.1, default=plan.dropout)
    if "augment" in keys:
        changes["augment"] = hp.Choice("augment", AUGMENTS)
    sizes = sizes_of(plan.image_size, card)
    if "image_size" in keys and len(sizes) > 1:
        changes["image_size"] = hp.Choice(f"image_size{suffix}", sizes, default=plan.image_size, ordered=True)
    probe = {"solver": hp.Choice("head", HEADS)} if "head" in keys and plan.recipe.stages[0].is_probe else {}
    return dataclasses.replace(plan, recipe=with_stage(plan.recipe, stage, probe), **changes)


def with_stage(recipe: Recipe, tuned: dict[str, Any], probe: dict[str, Any]) -> Recipe:
    """The recipe with other values in its fine-tuning stages and in its probe; no table decides over them then."""
    stages = tuple(_changed(stage, probe if stage.is_probe else tuned) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages, by_table=False)


def _changed(stage: Stage, values: dict[str, Any]) -> Stage:
    changes: dict[str, Any] = {"find_rate": False, **values} if "learning_rates" in values else values
    return dataclasses.replace(stage, **changes)


def depths_of(card: Source, most: int = MAX_DEPTHS) -> list[int]:
    """Counts of leading blocks that are frozen, from none to all but the last, spread evenly.

    Example:
        >>> from tfxfer import get_source
        >>> depths_of(get_source("mobilenet_v2_imagenet"), 4)
        [0, 6, 12, 18]
    """
    last = len(card.blocks) - 1
    if last <= 0:
        return [0]
    count = min(most, last + 1)
    return sorted({round(index * last / (count - 1)) for index in range(count)}) if count > 1 else [last]


def sizes_of(image_size: int, card: Source) -> list[int]:
    """The plan's size in px, and three quarters of it where the source takes that."""
    smaller = image_size * 3 // 4 // 32 * 32
    fits = smaller >= max(card.min_image_size_px, 32) and not card.fixed_size
    return sorted({image_size, smaller}) if fits else [image_size]


def _middle(depths: Sequence[int]) -> int:
    return depths[len(depths) * 2 // 3]


def describe(values: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters as tables show them: without KerasTuner's own, and without the suffix of a source."""
    return {key.partition("/")[0]: value for key, value in values.items() if not key.startswith("tuner/")}
