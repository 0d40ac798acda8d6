"""The recipes that come with tfxfer."""

from tfxfer.registry import lookup
from tfxfer.specs import Recipe, Stage

_PROBE = Stage("probe", solver="convex", freeze_depth="all", epochs=0)

RECIPES = {
    # LP-FT: the probe first, then the last blocks from the probe's solution.
    "auto": Recipe("auto", (_PROBE, Stage("fine_tune"))),
    "probe": Recipe("probe", (_PROBE,)),
    "full": Recipe("full", (_PROBE, Stage("fine_tune", freeze_depth=0))),
}


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        InputError: Where there is none; says near matches.

    Example:
        >>> [stage.name for stage in get_recipe("auto").stages]
        ['probe', 'fine_tune']
    """
    return lookup(RECIPES, name, "recipe")
