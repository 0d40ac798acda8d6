"""A pretrained model and its blocks, as a card or a look into a file tells them."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from tfxfer.errors import InputError
from tfxfer.specs.base import Spec


@dataclasses.dataclass(frozen=True)
class Block(Spec):
    """A run of consecutive layers of a backbone that freezes as one.

    Attributes:
        name: Unique in the backbone.
        layers: Names of its layers, in the order of the network.
        num_parameters: All numbers in its weights, BatchNorm statistics included.
    """

    what: ClassVar[str] = "block"
    name: str
    layers: tuple[str, ...]
    num_parameters: int


@dataclasses.dataclass(frozen=True)
class Source(Spec):
    """A pretrained model that can be loaded: what its card in models/ says, or what was found out about a file.

    Attributes:
        name: As the user spells it.
        kind: The entry of `tfxfer.sources.KINDS` that loads it.
        title: One line for tables.
        reference: What stands behind the prefix of the spelling: a path, a handle, the name of an architecture.
        architecture: The builder's name in `tfxfer.sources.builders.BUILDERS`.
        licence: SPDX identifier of the weights.
        paper: Authors, title, venue, year.
        weights: `package` and `file` inside it, or a `file` beside the card; `sha256`; `install`, the command that
            brings the package.
        image_size_px: Side of the square input it was trained at.
        min_image_size_px: The smallest side that it takes.
        fixed_size: Whether it takes no other side (a Flatten inside).
        scale, offset: Per channel; the network sees `pixel * scale + offset` with pixels in 0..255.
        channel_order: "rgb", or "bgr": channels are turned round before scale and offset.
        blocks: Names of its blocks in order. A layer belongs to block B if it is named B or starts with `B_`. Empty:
            found in the network itself.
        fine_tune_depth: Number of leading blocks that recipe `auto` keeps frozen when it fine-tunes; -1: the first
            seven tenths.
        num_classes: Width of the original output.
        class_names: "imagenet", or the names.
        features: Width of the backbone's output; 0: seen when it is loaded.
        num_parameters: Numbers in the weights of the backbone; 0: seen when it is loaded.
        partial: Whether weights may be loaded in part.
        trusted: Modules whose custom objects may be made: the user's own code.
    """

    what: ClassVar[str] = "source card"
    name: str
    kind: str
    title: str
    licence: str
    image_size_px: int
    min_image_size_px: int
    architecture: str = ""
    reference: str = ""
    paper: str = ""
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)
    channel_order: str = "rgb"
    blocks: tuple[str, ...] = ()
    num_classes: int = 0
    class_names: str | tuple[str, ...] = ()
    features: int = 0
    num_parameters: int = 0
    fine_tune_depth: int = -1
    fixed_size: bool = False
    url: str = ""
    notes: str = ""
    partial: bool = False
    trusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.blocks)) != len(self.blocks):
            raise InputError(f"The card of {self.name!r} needs block names, each once.")
        if self.channel_order not in ("rgb", "bgr"):
            raise InputError(f"The card of {self.name!r}: channel_order must be 'rgb' or 'bgr'.")
        if not -1 <= self.fine_tune_depth <= (len(self.blocks) or self.fine_tune_depth):
            raise InputError(f"The card of {self.name!r}: fine_tune_depth must lie in 0..{len(self.blocks)}, or be -1.")
