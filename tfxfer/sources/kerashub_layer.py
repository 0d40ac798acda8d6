"""A backbone of KerasHub as one layer, where it cannot be saved and read back layer by layer."""

import re
from typing import Any

import keras

_NUMBERED = re.compile(r"(.*_)?(block|blocks|layer|layers|stage)_\d+")


@keras.saving.register_keras_serializable(package="tfxfer")
class HubBackbone(keras.layers.Layer):
    """Holds a backbone whole. Its vision transformers come back from a file as backbones, not as graphs of layers
    (KerasHub 0.32: ViT, DeiT, Swin, MiT), so blocks are groups of their variables.

    Args:
        backbone: Of KerasHub, built.

    Call arguments:
        images: (N, S, S, 3) float32.

    Returns:
        What the backbone gives: (N, T, D) tokens or (N, H, W, D).
    """

    def __init__(self, backbone: Any, **kwargs):
        super().__init__(**kwargs)
        self.backbone = backbone
        self._trains_at_all = {variable.path for variable in backbone.trainable_variables}
        self.built = True

    def call(self, images, training=None):
        return self.backbone(images, training=training)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.backbone.output.shape[1:])

    def get_config(self):
        return {**super().get_config(), "backbone": keras.saving.serialize_keras_object(self.backbone)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("backbone")), **config)

    @property
    def variable_blocks(self) -> dict[str, list[keras.Variable]]:
        """Variables by block: a layer of the backbone, or where it numbers what is inside ("transformer_block_3"),
        each of those."""
        places = [variable.path.split("/") for variable in self.backbone.weights]
        parted = {place[0] for place in places if _NUMBERED.fullmatch(place[1])}
        blocks: dict[str, list[keras.Variable]] = {}
        for place, variable in zip(places, self.backbone.weights, strict=True):
            name = f"{place[0]}_{place[1]}" if place[0] in parted else place[0]
            blocks.setdefault(name, []).append(variable)
        return blocks

    @property
    def moves_statistics(self) -> bool:
        """Whether training moves what no optimizer moves: never, normalisations of batches stay as they are."""
        return False

    def freeze_blocks(self, frozen: frozenset[str], *, batch_norm: str = "affine") -> None:
        """Freeze these blocks and train the others.

        Args:
            frozen: Names in `variable_blocks`.
            batch_norm: Not used: these backbones normalise by image.
        """
        self.trainable = True
        for layer in self._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
        for name, variables in self.variable_blocks.items():
            for variable in variables:
                variable.trainable = name not in frozen and variable.path in self._trains_at_all
