"""Blocks: the runs of layers of a backbone that freeze as one."""

import keras

from tfxfer.errors import InputError
from tfxfer.sources.catalog import list_sources
from tfxfer.specs import Block, depth_of


def backbone_of(model: keras.Model) -> keras.Model:
    """The backbone inside a model of `build_model`; a model without a nested model is its own backbone.

    Raises:
        InputError: Where two nested models leave it open which one is meant.
    """
    nested = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    if len(nested) > 1:
        names = ", ".join(layer.name for layer in nested)
        raise InputError(f"Model {model.name!r} holds several nested models ({names}); pass the one to freeze.")
    return nested[0] if nested else model


def list_blocks(model: keras.Model) -> tuple[Block, ...]:
    """The blocks of a model's backbone, from the input to the head.

    Args:
        model: Of `build_model` or `load_backbone`, or any `keras.Model`. An architecture that has a card has the
            blocks of the card; in any other, each layer with weights but BatchNorm begins one.

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
    names = next((card.blocks for card in list_sources() if card.architecture == backbone.name), ())
    groups = _by_name(layers, names) if names else _by_weights(layers)
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


def _by_weights(layers):
    groups: list[tuple[str, list]] = []
    for layer in layers:
        if not groups or (layer.weights and not isinstance(layer, keras.layers.BatchNormalization)):
            groups.append((layer.name, [layer]))
        else:
            groups[-1][1].append(layer)
    return groups


def resolve_depth(blocks: tuple[Block, ...], depth: int | str) -> int:
    """The number of leading blocks that `depth` names; see `tfxfer.specs.depth_of`.

    Example:
        >>> resolve_depth((Block("stem", ("stem",), 1), Block("top", ("top",), 1)), "stem")
        1
    """
    return depth_of([block.name for block in blocks], depth)
