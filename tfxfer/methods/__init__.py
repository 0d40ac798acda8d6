"""How knowledge moves: each method says which stages of a recipe it runs."""

from tfxfer.specs import Recipe, Stage


def _fine_tune(recipe: Recipe) -> tuple[Stage, ...]:
    return recipe.stages


def _probe(recipe: Recipe) -> tuple[Stage, ...]:
    return tuple(stage for stage in recipe.stages if stage.is_probe) or (Stage("probe", solver="convex"),)


METHODS = {
    "fine_tune": _fine_tune,  # parameter transfer: all stages
    "probe": _probe,  # feature transfer: those that solve a head only
}
