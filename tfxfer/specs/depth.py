"""Freeze depths as people write them."""

import re
from collections.abc import Sequence
from typing import Any

from tfxfer.errors import InputError


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
