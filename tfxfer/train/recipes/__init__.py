"""The recipes that come with tfxfer: the TOML files of this folder, and those of one's own."""

from pathlib import Path

from tfxfer.errors import InputError
from tfxfer.registry import lookup
from tfxfer.specs import Recipe, read_toml

FOLDER = Path(__file__).parent
RECIPES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def get_recipe(name: str | Path) -> Recipe:
    """A recipe by name, or one's own from a TOML file.

    Args:
        name: Of a file in this folder without its ending; or a path that ends in .toml. Such a file has the keys of
            `Recipe`, and under `[[stages]]` those of each `Stage`; without `name` it is called as its file.

    Raises:
        InputError: Where there is none, with near matches; or the file is missing, no TOML, or no recipe.

    Example:
        >>> [stage.name for stage in get_recipe("auto").stages]
        ['probe', 'fine_tune']
    """
    own = str(name).endswith(".toml")
    path = Path(name) if own else FOLDER / f"{lookup({known: known for known in RECIPES}, str(name), 'recipe')}.toml"
    try:
        return Recipe.from_dict({"name": path.stem, **read_toml(path)})
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path} is no recipe: {error}") from None
