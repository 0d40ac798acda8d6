"""Lookup in the literal tables by which sources, methods, exporters and readers are found."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from tfxfer.errors import InputError, did_you_mean

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry `name` of `table`.

    Args:
        table: A plain dict, name to entry.
        name: What the user asked for.
        what: The singular noun used in the error ("source kind", "method").

    Returns:
        The entry.

    Raises:
        InputError: Where there is no such entry; names near matches.

    Example:
        >>> lookup({"fine_tune": 1}, "fine_tune", "method")
        1
    """
    try:
        return table[name]
    except KeyError:
        raise InputError(f"Unknown {what} {name!r}. {did_you_mean(name, table)}") from None


def merge(pairs: Iterable[tuple[str, T]], what: str) -> dict[str, T]:
    """A table of `pairs`; a name given twice is an error.

    Raises:
        InputError: Where a name comes twice.

    Example:
        >>> merge([("a", 1), ("b", 2)], "source")
        {'a': 1, 'b': 2}
    """
    table: dict[str, T] = {}
    for name, value in pairs:
        if name in table:
            raise InputError(f"Two entries are named {name!r} among the {what}s; rename one.")
        table[name] = value
    return table
