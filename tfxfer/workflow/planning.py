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
from tfxfer.specs import PROBE_SOLVERS, Plan, Recipe, Source, depth_of, pattern_of, read_toml
from tfxfer.train.bit import bit_image_size
from tfxfer.train.recipes import get_recipe
from tfxfer.workflow.continuing import inherited

DEFAULT_SOURCE = "efficientnet_lite0_imagenet"
STAGE_KEYS = ("freeze_depth", "epochs", "learning_rate", "batch_norm", "probe")


def make_plan(config: str | Path | None = None, card: Source | None = None, *, data: Any = None, **given: Any) -> Plan:
    """A complete plan: what is given wins over the file, the file over the defaults.

    Args:
        config: A TOML file with keys of `Plan`, such as a run's config.toml.
        card: Of the source, where it is at hand.
        data: What is trained on: where the recipe goes by the size of images, some of them are looked at.
        **given: Keys of `Plan`, `freeze_depth`, `epochs`, `learning_rate`, `batch_norm` for the fine-tuning stages, and
            `probe`, the solver of the first; `None` stands for not given. `recipe` is a name, a TOML file or a
            `Recipe`.

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
    values = {**inherited(values["source"]), **values}
    recipe = _as_recipe(values.get("recipe", "auto"))
    if "image_size" not in values:
        values["image_size"] = _image_size(card, recipe, data)
    if isinstance(values["image_size"], int):
        check_image_size(card, values["image_size"])
    if "views" in given and values.get("augment") != "rand":
        raise InputError("views says how many views augment 'rand' makes; give --augment rand with it, or drop it.")
    _refuse_what_does_nothing(values, stage, given)
    values["recipe"] = _with_stage_values(recipe, stage, own=isinstance(given.get("recipe"), Recipe))
    plan = Plan.from_dict(values)
    lookup(METHODS, plan.method, "method")
    for each in plan.recipe.stages if card.blocks else ():
        if pattern_of(each.freeze_depth) is None and each.freeze_depth != "auto":
            depth_of(card.blocks, each.freeze_depth)
    if plan.group_by:
        check_pattern(plan.group_by)
    return plan


def _image_size(card: Source, recipe: Recipe, data: Any) -> int:
    """The source's own, or the recipe's rule where the network can take it."""
    if not recipe.by_size or data is None or card.fixed_size:
        return card.image_size_px
    from tfxfer.data.sizes import typical_area

    return max(bit_image_size(typical_area(data)), card.min_image_size_px)


def _refuse_what_does_nothing(values: Mapping[str, Any], stage: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Options for fine-tuning where there is none."""
    recipe = _as_recipe(values.get("recipe", "auto"))
    if values.get("method") == "probe":
        what = "Method 'probe'"
    elif all(each.is_probe for each in recipe.stages):
        what = f"Recipe {recipe.name!r}"
    else:
        return
    idle = [*(key for key in stage if key != "probe"), *(key for key in ("dropout", "precision") if key in given)]
    if given.get("augment") in ("mirror", "rand") and values.get("baseline") != "scratch":
        idle.append(f"augment={given['augment']!r}")
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


def _as_recipe(recipe: Any) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | Path):
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
    solver = stage.get("probe")
    if solver is not None and not (recipe.stages[0].is_probe and solver in PROBE_SOLVERS):
        raise InputError(
            f"probe must be one of {', '.join(PROBE_SOLVERS)}, not {solver!r}."
            if solver not in PROBE_SOLVERS
            else f"Recipe {recipe.name!r} begins with no probe, so probe={solver!r} would do nothing; drop it."
        )
    depths = {each.freeze_depth for each in recipe.stages if not each.is_probe}
    if "freeze_depth" in stage and len(depths) > 1:
        raise InputError(
            f"Recipe {recipe.name!r} says for each of its stages what is frozen, so one freeze depth would undo it; "
            "drop --freeze, or write the stages into a TOML file (--recipe FILE.toml)."
        )
    changes: dict[str, Any] = {key: value for key, value in stage.items() if key not in ("learning_rate", "probe")}
    if "learning_rate" in stage:
        changes |= _rate(stage["learning_rate"])
    if "epochs" in stage:
        changes |= {"min_steps": False, "steps": 0}
    probe = {} if solver is None else {"solver": solver}
    stages = tuple(dataclasses.replace(s, **(probe if s.is_probe else changes)) for s in recipe.stages)
    return dataclasses.replace(recipe, stages=stages)


def _rate(given: Any) -> dict[str, Any]:
    """What a stage has of a learning rate that was asked for."""
    if given == "find":
        return {"find_rate": True}
    try:
        return {"learning_rates": (float(given),), "find_rate": False}
    except (TypeError, ValueError):
        raise InputError(f"The learning rate must be a number or 'find', not {given!r}.") from None
