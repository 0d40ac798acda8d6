"""Blocks: the runs of layers of a backbone that freeze as one."""

from collections.abc import Sequence

import keras
import numpy as np

from tfxfer.errors import InputError
from tfxfer.model.graph import TAP, grouped
from tfxfer.sources.catalog import list_sources
from tfxfer.specs import Block, depth_of


def backbone_of(model: keras.Model) -> keras.Model:
    """The backbone inside a model of `build_model`; any other model is its own backbone, unless one model nested in it
    holds most of its weights.

    Raises:
        InputError: Where several nested models share the weights, so that it is open which one is meant.
    """
    nested = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    if nested and any(layer.name == "adapt_image" for layer in model.layers):
        return nested[0]
    whole, counts = model.count_params(), [layer.count_params() for layer in nested]
    for layer, count in zip(nested, counts, strict=True):
        if 2 * count > whole:
            return layer
    if len(nested) > 1 and 10 * sum(counts) > 9 * whole:
        names = ", ".join(layer.name for layer in nested)
        raise InputError(f"Model {model.name!r} holds several nested models ({names}); pass the one to freeze.")
    return model


def program_of(backbone: keras.Model) -> keras.layers.Layer | None:
    """The one layer of a backbone that holds a loaded program, whose blocks are groups of its variables; or None.

    Such a layer has `variable_blocks`, names to lists of its variables, and `freeze_blocks`.
    """
    return next((layer for layer in backbone.layers if hasattr(layer, "variable_blocks")), None)


def list_blocks(model: keras.Model) -> tuple[Block, ...]:
    """The blocks of a model's backbone, from the input to the head.

    Args:
        model: Of `build_model` or `load_backbone`, or any `keras.Model`. An architecture that has a card has the
            blocks of the card. In any other a block is a run of layers that one tensor enters and one leaves, named
            after the unit in its layers' names ("block_3") or after its first layer with weights. A layer that holds
            a loaded program (TF Hub) has the blocks of its variables.

    Returns:
        Blocks in the order of the network; together they hold every layer of the backbone but its input, once.

    Example:
        >>> import keras
        >>> net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="a"), keras.layers.ReLU(name="r")])
        >>> list_blocks(net)
        (Block(name='a', layers=('a', 'r'), num_parameters=10),)
    """
    backbone = backbone_of(model)
    layers = [layer for layer in backbone.layers if not isinstance(layer, keras.layers.InputLayer)]
    holder = program_of(backbone)
    if holder is not None:
        return tuple(
            Block(name, (f"{holder.name}/{name}",), sum(int(np.prod(v.shape)) for v in variables))
            for name, variables in holder.variable_blocks.items()
        )
    names = next((card.blocks for card in list_sources() if card.architecture == backbone.name), ())
    taps = [layer for layer in layers if layer.name.startswith(TAP)]
    layers = [layer for layer in layers if layer not in taps]
    groups = _by_name(layers, names) if names else grouped(backbone)
    groups[-1][1].extend(taps)  # what reads several blocks for the head, see `tfxfer.model.taps`
    return tuple(
        Block(name, tuple(layer.name for layer in group), sum(layer.count_params() for layer in group))
        for name, group in groups
    )


def _by_name(layers, names):
    groups = [
        (name, [layer for layer in layers if layer.name == name or layer.name.startswith(name + "_")]) for name in names
    ]
    # A cut model has the later blocks only.
    groups = [(name, group) for name, group in groups if group]
    found = [layer.name for _, group in groups for layer in group]
    stray = [layer.name for layer in layers if layer.name not in found]
    if stray:
        raise InputError(f"Layers {', '.join(stray[:5])} belong to no block of the card; mend its list of blocks.")
    return groups


def resolve_depth(blocks: Sequence[Block], depth: int | float | str) -> int:
    """The number of leading blocks that `depth` names; see `tfxfer.specs.depth_of`.

    Example:
        >>> resolve_depth((Block("stem", ("stem",), 1), Block("top", ("top",), 1)), "stem")
        1
    """
    return depth_of([block.name for block in blocks], depth)
