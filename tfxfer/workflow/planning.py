"""From what a user says, and what is left open, to a Plan."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfxfer.data.items import check_pattern
from tfxfer.errors import InputError, did_you_mean
from tfxfer.methods import METHODS
from tfxfer.registry import lookup
from tfxfer.sources.catalog import check_image_size, get_source
from tfxfer.specs import Plan, Recipe, Source, depth_of, pattern_of, read_toml
from tfxfer.train.recipes import get_recipe

DEFAULT_SOURCE = "efficientnet_lite0_imagenet"
AUTO_SHARE = 0.7  # of the blocks of a source that has no card to say how many to freeze
STAGE_KEYS = ("freeze_depth", "epochs", "learning_rate", "batch_norm")


def make_plan(config: str | Path | None = None, card: Source | None = None, **given: Any) -> Plan:
    """A complete plan: what is given wins over the file, the file over the defaults.

    Args:
        config: A TOML file with keys of `Plan`, such as a run's config.toml.
        card: Of the source, where it is at hand.
        **given: Keys of `Plan`, and `freeze_depth`, `epochs`, `learning_rate`, `batch_norm` for the fine-tuning stages;
            `None` stands for not given. `recipe` is a name or a `Recipe`.

    Raises:
        InputError: Where a key or a value is wrong, or a value is given twice.
    """
    given = {key: value for key, value in given.items() if value is not None}
    stage = {key: given.pop(key) for key in STAGE_KEYS if key in given}
    values: dict[str, Any] = read_toml(Path(config)) if config else {}
    known = [field.name for field in dataclasses.fields(Plan)]
    for key in values:
        if key not in known:
            raise InputError(f"{config}: unknown key {key!r}. {did_you_mean(key, known)}")
    values |= given
    values.setdefault("source", DEFAULT_SOURCE)
    if not isinstance(values["source"], str):
        raise InputError(f"source must be a name, not {values['source']!r}.")
    card = card or source_of(values)
    values.setdefault("image_size", card.image_size_px)
    if isinstance(values["image_size"], int):
        check_image_size(card, values["image_size"])
    recipe = values.get("recipe", "auto")
    _refuse_what_does_nothing(values, stage, given)
    values["recipe"] = _with_stage_values(_as_recipe(recipe), stage, own=isinstance(given.get("recipe"), Recipe))
    plan = Plan.from_dict(values)
    lookup(METHODS, plan.method, "method")
    for each in plan.recipe.stages if card.blocks else ():
        if pattern_of(each.freeze_depth) is None and each.freeze_depth != "auto":
            depth_of(card.blocks, each.freeze_depth)
    if plan.group_by:
        check_pattern(plan.group_by)
    return plan


def _refuse_what_does_nothing(values: Mapping[str, Any], stage: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Options for fine-tuning where there is none."""
    recipe = _as_recipe(values.get("recipe", "auto"))
    if values.get("method") == "probe":
        what = "Method 'probe'"
    elif all(each.solver == "convex" for each in recipe.stages):
        what = f"Recipe {recipe.name!r}"
    else:
        return
    idle = [*stage, *(["dropout"] if "dropout" in given else [])]
    if given.get("augment") == "mirror" and values.get("baseline") != "scratch":
        idle.append("augment='mirror'")
    if idle:
        raise InputError(f"{what} has no fine-tuning stage, so {' and '.join(idle)} would do nothing; drop it.")


def source_of(plan: Plan | Mapping[str, Any]) -> Source:
    """The card of a plan's source, with what the plan says about its weights."""
    values = plan.to_dict() if isinstance(plan, Plan) else plan
    return get_source(
        values["source"],
        weights=values.get("weights") or None,
        input_range=values.get("input_range", ""),
        partial=values.get("partial", False),
        trusted=values.get("trust", ()),
    )


def auto_depth(card: Source) -> int | float:
    """What freeze depth "auto" means for a source."""
    return card.fine_tune_depth if card.fine_tune_depth >= 0 else AUTO_SHARE


def _as_recipe(recipe: Any) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return get_recipe(recipe)
    if not isinstance(recipe, Mapping):
        raise InputError(f"recipe must be a name or a table with name and stages, not {recipe!r}.")
    return Recipe.from_dict(recipe)


def _with_stage_values(recipe: Recipe, stage: Mapping[str, Any], *, own: bool) -> Recipe:
    if not stage:
        return recipe
    if own:
        raise InputError(
            f"{' and '.join(stage)} given beside a recipe of your own, {recipe.name!r}; set it in its stages only."
        )
    changes: dict[str, Any] = {key: value for key, value in stage.items() if key != "learning_rate"}
    if "learning_rate" in stage:
        changes["learning_rates"] = (float(stage["learning_rate"]),)
    if "epochs" in stage:
        changes["min_steps"] = False
    stages = tuple(dataclasses.replace(s, **changes) if s.solver != "convex" else s for s in recipe.stages)
    return Recipe(recipe.name, stages)
