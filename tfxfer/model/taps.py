"""Several blocks of a backbone read at once: their outputs pooled and concatenated, as one wide vector of features."""

import dataclasses

import keras

from tfxfer.model.blocks import backbone_of, list_blocks, program_of
from tfxfer.model.graph import TAP, tensors_behind


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A model whose head reads several blocks; all layers but the taps and the head are those of the model it is of.

    Attributes:
        model: As of `build_model`; its backbone ends in the concatenated taps, the old features last.
        blocks: Names of the blocks read, in the order of the network, the last one included.
        widths: Features of each.
    """

    model: keras.Model
    blocks: tuple[str, ...]
    widths: tuple[int, ...]


def tap_model(model: keras.Model, blocks: tuple[str, ...] | None = None) -> Tapped | None:
    """A model of `build_model` with a fresh head that reads the pooled outputs of several blocks.

    Args:
        model: Of `build_model`; unchanged, and its layers are shared.
        blocks: Names of those to read, beside the last; all that one tensor leaves by default.

    Returns:
        The tapped model, its head all zeros; None where nothing but the last block can be read (a loaded program).

    Reference:
        Evci, Dumoulin, Larochelle, Mozer. Head2Toe: Utilizing Intermediate Representations for Better Transfer
        Learning. ICML 2022.
    """
    backbone = backbone_of(model)
    if program_of(backbone) is not None or len(backbone.output.shape) != 2:
        return None
    if any(layer.name.startswith(TAP) for layer in backbone.layers):
        return None  # it is tapped already
    parts = list_blocks(backbone)
    layers: set[str] = set()
    taps, names = [], []
    for block in parts[:-1]:
        layers |= set(block.layers)
        crossing = tensors_behind(backbone, layers) if blocks is None or block.name in blocks else None
        pooled = _pooled(crossing[0], block.name) if crossing and len(crossing) == 1 else None
        if pooled is not None:
            taps.append(pooled)
            names.append(block.name)
    if not taps:
        return None
    taps.append(backbone.output)
    wide = keras.layers.Concatenate(name=f"{TAP}all")(taps)
    # The name of the backbone is that of its architecture: by it its blocks are found.
    tapped = keras.Model(backbone.input, wide, name=backbone.name)
    images = keras.Input(model.input_shape[1:], name="images", dtype="float32")
    x = tapped(model.get_layer("normalise")(model.get_layer("adapt_image")(images)))
    x = keras.layers.Dropout(model.get_layer("dropout").rate, name="dropout")(x)
    logits = keras.layers.Dense(
        model.get_layer("logits").units, kernel_initializer="zeros", dtype="float32", name="logits"
    )
    outputs = keras.layers.Activation("softmax", dtype="float32", name="probabilities")(logits(x))
    whole = keras.Model(images, outputs, name=model.name)
    if hasattr(model, "source_card"):
        whole.source_card = model.source_card
    return Tapped(whole, (*names, parts[-1].name), tuple(int(tap.shape[-1]) for tap in taps))


def _pooled(tensor, name: str):
    """(N, C) of a block's output: the average over its places."""
    pools = {4: keras.layers.GlobalAveragePooling2D, 3: keras.layers.GlobalAveragePooling1D}
    rank = len(tensor.shape)
    if rank in pools:
        return pools[rank](name=f"{TAP}{name}")(tensor)
    return tensor if rank == 2 else None
