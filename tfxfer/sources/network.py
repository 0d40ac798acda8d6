"""A whole Keras model as a source: graph, start and end read from its config, and the backbone between them built."""

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_file
from tfxfer.sources.keras_graph import Graph, Head, Node, find_head, has_fixed_size, read_graph
from tfxfer.sources.leading import Leading, Statistics, card_facts, find_leading
from tfxfer.specs import Source

IMAGE_SIDE_PX = 224  # where the network takes images of any side
MIN_IMAGE_SIDE_PX = 32


@dataclasses.dataclass(frozen=True)
class Network:
    """A whole model that was read: its graph, its start and its end."""

    graph: Graph
    leading: Leading
    head: Head

    @property
    def body(self) -> tuple[Node, ...]:
        """What the backbone is made of."""
        return self.graph.between(self.leading.behind, self.head.features)


def read_network(config: Mapping[str, Any], statistics: Statistics, what: str) -> Network:
    """Graph, leading operations and head of a model's config."""
    graph = read_graph(config, what)
    return Network(graph, find_leading(graph, statistics), find_head(graph))


def network_facts(network: Network, input_range: str, what: str) -> dict[str, Any]:
    """What a card says about a network that was read.

    Raises:
        InputError: Where its range of pixels is unknown, or its shape can only take images that are not square.
    """
    height, width, *_ = network.graph.shape
    fixed = has_fixed_size(network.graph, network.body)
    if fixed and not network.leading.size_px and height != width:
        raise InputError(f"{what} takes images of {width} x {height} px only; sources here take square ones.")
    side = network.leading.size_px or max(height or 0, width or 0) or IMAGE_SIDE_PX
    classes = network.head.num_classes
    return {
        "image_size_px": side,
        "min_image_size_px": side if fixed else min(MIN_IMAGE_SIDE_PX, side),
        "fixed_size": fixed,
        "num_classes": classes if classes > 1 else 0,
        **card_facts(network.leading, input_range, what),
    }


def build(
    card: Source,
    network: Network,
    size_px: int,
    *,
    include_top: bool,
    seed: int | None,
    classes: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, str]]:
    """The backbone, or with `include_top` the network to its logits, with random weights.

    Args:
        card: Whose `trusted` modules may be imported for custom classes.
        network: That was read.
        size_px: Side of the images.
        include_top: Keep the classifier, without softmax.
        seed: Of random weights; None: what the config says.
        classes: Custom classes by name that are at hand.

    Returns:
        The model, and the original path of each layer that had to be called otherwise.

    Raises:
        InputError: Where a layer cannot be built, or there is no classifier to keep.
    """
    from tfxfer.sources.keras_body import build_body

    if include_top and network.head.num_classes < 2:
        raise InputError(f"{card.name} has no classifier at its end, so there is no original output to look at.")
    return build_body(
        network.graph, network.leading, network.head, size_px,
        include_top=include_top, seed=seed, reserved_names=_reserved(network),
        custom_objects={**custom_objects(card.trusted), **(classes or {})},
    )  # fmt: skip


def check_digest(path: Path, sha256: str) -> None:
    """Refuse a file that is not what it was."""
    if not path.is_file():
        raise InputError(f"There is no file {path} any more; it was there when its source was named.")
    actual = sha256_of_file(path)
    if actual != sha256:
        raise InputError(
            f"{path} has SHA-256 {actual}, but {sha256} was recorded: the file was changed or damaged; get it again."
        )


def custom_objects(trusted: Sequence[str]) -> dict[str, Any]:
    """The classes and functions of the user's own modules, by name.

    Raises:
        InputError: Where a module cannot be imported.
    """
    found: dict[str, Any] = {}
    for name in trusted:
        module = own_module(name, f"The module {name!r} of --trust-custom-objects")
        found |= {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == name}
    return found


def own_module(name: str, what: str) -> ModuleType:
    """Import a module of the user's own, which may lie in the current folder.

    Raises:
        InputError: Where there is none, or it fails.
    """
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{what} cannot be imported: there is no module {error.name!r}; it is looked for in {here} and in what is "
            "installed."
        ) from None
    except Exception as error:
        raise InputError(f"{what} cannot be imported: {type(error).__name__}: {error}.") from error


def _reserved(network: Network) -> tuple[str, ...]:
    """Names of architectures whose blocks this body does not have, so that it may not be called by them."""
    from tfxfer.sources.catalog import list_sources

    layers = [node.layer.rpartition("/")[2] for node in network.body]
    return tuple(
        card.architecture
        for card in list_sources()
        if not all(any(layer == block or layer.startswith(f"{block}_") for block in card.blocks) for layer in layers)
    )
