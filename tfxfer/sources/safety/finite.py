"""NaN and infinity in weights: what a network with them computes is no prediction."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tfxfer.errors import InputError

# Numbers looked at together: bounds the memory beside the weights themselves.
_BLOCK = 2**22


def check_finite(named_arrays: Mapping[str, Any] | Iterable[tuple[str, Any]], what: str = "The weights") -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        named_arrays: Arrays by name, or pairs of both; anything that `np.asarray` takes. Whole numbers and texts
            pass.
        what: What the message calls them, say "The weights in 'a.h5'".

    Raises:
        InputError: With the name of the variable, and how many of its numbers are not finite.

    Example:
        >>> check_finite({"dense/kernel": np.ones((2, 3))})
        >>> try:
        ...     check_finite([("dense/bias", np.array([0.0, np.nan]))])
        ... except InputError as error:
        ...     print(str(error).partition(";")[0])
        The weights hold NaN or infinity in 'dense/bias' (1 of 2 numbers)
    """
    pairs = named_arrays.items() if isinstance(named_arrays, Mapping) else named_arrays
    for name, values in pairs:
        array = np.asarray(values)
        if array.dtype.kind in "biuSUO":
            continue
        flat = array.reshape(-1)
        bad = sum(int((~np.isfinite(flat[at : at + _BLOCK])).sum()) for at in range(0, flat.size, _BLOCK))
        if bad:
            raise InputError(
                f"{what} hold NaN or infinity in {name!r} ({bad:,} of {flat.size:,} numbers); "
                "use a checkpoint from before the training diverged."
            )
