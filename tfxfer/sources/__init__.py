"""Pretrained models that can be loaded by name: the cards' catalogue, one file a kind of weights, the architectures."""

from typing import Any

from tfxfer.specs import Source


def _torch_checkpoint(source: Source, model: Any) -> None:
    from tfxfer.sources import torch_checkpoint

    torch_checkpoint.load_weights(source, model)


def _keras_h5(source: Source, model: Any) -> None:
    from tfxfer.sources import legacy_h5

    legacy_h5.load_weights(source, model)


# A kind of source: load the card's weights into the built model.
KINDS = {
    "keras_h5": _keras_h5,
    "torch_checkpoint": _torch_checkpoint,
}
