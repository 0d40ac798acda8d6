"""The variables of a SavedModel, grouped into blocks by their names and their order."""

import re
from collections.abc import Sequence

from tfxfer.sources.hub_anatomy import NAMELESS, Slot

# What names a unit of an architecture in names of variables, the "/" of which are "_" here: block_3_expand,
# conv2_block1_1_conv, block1a_bn, expanded_conv_3_depthwise, block1_unit_2_bottleneck_v2, Mixed_5b_Branch_0, layers_0.
_UNIT = re.compile(
    r"(expanded_conv(?=_[a-z])|block(?:35|17|8)_\d+|.*?(?:blocks?|layers?|stages?|expanded_conv|cell|conv_dw|conv_pw|"
    r"mixed)_?\d+[a-z]?(?:_(?:block|unit)s?_?\d+)?)(?:_|$)",
    re.IGNORECASE,
)


def group_slots(slots: Sequence[Slot]) -> dict[str, list[int]]:
    """Group variables into blocks, by the unit of the architecture in their names and the order they are read in.

    Variables of one unit ("block_3", "conv2_block1") are one block; of those without a unit, a scope ("stem_conv") with
    a kernel begins a block; what has no kernel (a normalisation of its own) belongs to what stands before it.

    Returns:
        Names of blocks, without "/", to indices of `slots`; each once.

    Example:
        >>> names = ["net/stem/kernel", "net/stem_bn/gamma", "net/block_1_conv/kernel", "net/block_1_bn/gamma"]
        >>> group_slots([Slot(name, (), (3, 3) if "kernel" in name else (3,), "float32", True) for name in names])
        {'stem': [0, 1], 'block_1': [2, 3]}
    """
    units = _units(slots)
    with_kernel = {unit for unit, slot in zip(units, slots, strict=True) if unit and len(slot.shape) >= 2}
    groups: dict[str, list[int]] = {}
    before: list[int] = []
    current = ""
    for index, (unit, slot) in enumerate(zip(units, slots, strict=True)):
        if unit in with_kernel:
            current = unit
        elif len(slot.shape) >= 2:
            current = next(name for n in range(1, len(slots) + 1) if (name := f"part_{n}") not in {*groups, *units})
        (groups.setdefault(current, []) if current else before).append(index)
    if before:  # the first kernel
        first = next(iter(groups), "all")
        groups[first] = [*before, *groups.get(first, [])]
    return groups


def _units(slots: Sequence[Slot]) -> list[str]:
    """The unit in each name, or its whole scope; "" where the name says nothing."""
    scopes = [slot.name.split("/")[:-1] for slot in slots]
    shared = 0  # parts that all scopes begin with, such as the name of the model
    while scopes and min(map(len, scopes)) > shared + 1 and len({scope[shared] for scope in scopes}) == 1:
        shared += 1
    found = []
    for slot, scope in zip(slots, scopes, strict=True):
        text = "_".join(scope[shared:])
        unit = _UNIT.match(text)
        nameless = NAMELESS.fullmatch(slot.name.rpartition("/")[2])
        found.append("" if nameless else unit[1] if unit else text)
    return found
