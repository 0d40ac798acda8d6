"""The image networks of keras.applications, by name: `keras:mobilenet_v3_small`, with ImageNet's weights or a file's.

Some of them scale pixels inside. Here all of that is in the card, so that every source sees `pixel * scale + offset`:
where Keras can leave it out it is left out, from EfficientNet (whose constants get lost in an ONNX export) it is cut.
"""

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import InputError, did_you_mean
from tfxfer.runtime.files import sha256_of_file
from tfxfer.sources.application_families import MEMBERS
from tfxfer.sources.fresh import fresh_names_and_seeds
from tfxfer.sources.network import check_digest
from tfxfer.sources.ranges import range_facts
from tfxfer.sources.report import LayerReport, LoadReport
from tfxfer.specs import Source

_NOTES = {
    "": "Keras' network does not scale pixels itself; the card does what its preprocess_input does.",
    "argument": "Keras' network scales pixels inside; it is built without (include_preprocessing=False) and the card "
    "has the numbers.",
    "layers": "Keras' network scales pixels inside; those layers are cut off and the card has their numbers.",
}


def describe(
    spelling: str,
    reference: str,
    *,
    weights: str = "",
    input_range: str = "",
    partial: bool = False,
    trusted: Sequence[str] = (),
) -> Source:
    """The card of a network; see `tfxfer.sources`. Imports neither Keras nor TensorFlow.

    Args:
        spelling: As the user wrote it.
        reference: A name in `MEMBERS`, or the function's in keras.applications.
        weights: A file of weights for this network, .h5, .weights.h5 or .keras; empty: ImageNet's, from Keras' storage.
        input_range: What the file was trained on, where it is not what the network is usually given.
        partial: Whether the file may fit in part only.
        trusted: Not used here.

    Raises:
        InputError: Where there is no such network or no such file.

    Example:
        >>> card = describe("keras:MobileNetV3Small", "MobileNetV3Small")
        >>> card.architecture, card.image_size_px, card.offset
        ('mobilenet_v3_small', 224, (-1.0, -1.0, -1.0))
    """
    name = _name_of(reference)
    family = MEMBERS[name]
    function, size_px = family.members[name]
    facts = range_facts(input_range) if input_range else family.facts
    found: dict[str, str] = {}
    if weights:
        found = _file_facts(weights)
        if family.inside == "layers" and not input_range:
            facts = _facts_inside(Path(found["file"])) or facts
    return Source(
        name=spelling,
        kind="applications",
        title=f"{function} of Keras Applications, {'weights of a file' if weights else 'ImageNet-1k'}",
        reference=reference,
        architecture=name,
        licence="unknown" if weights else family.licence,
        paper=family.paper,
        url="https://keras.io/api/applications/",
        notes=_NOTES[family.inside],
        weights=found,
        image_size_px=size_px,
        min_image_size_px=family.min_image_size_px,
        num_classes=0 if weights else 1000,
        class_names=() if weights else "imagenet",
        partial=partial,
        **facts,
    )


def load(card: Source, size_px: int, *, weights: bool, include_top: bool, seed: int) -> tuple[Any, LoadReport | None]:
    """Build the network and load its weights; see `tfxfer.sources`.

    Raises:
        InputError: Where ImageNet's weights cannot be had, the file has changed since the card was made, or does not
            fit.
    """
    if weights and not card.weights:
        model = _with_imagenet(card, size_px, include_top=include_top)
        layers = [LayerReport(part.name, "matched", part.count_params()) for part in model.layers if part.weights]
        return model, LoadReport("ImageNet weights from Keras' storage", tuple(layers))
    model = build(card.architecture, size_px, include_top=include_top, seed=seed)
    if not weights:
        return model, None
    from tfxfer.sources.weights_file import load_weights_file

    path = Path(card.weights["file"])
    check_digest(path, card.weights["sha256"])
    return model, load_weights_file(model, path, partial=card.partial)


def build(name: str, size_px: int, *, include_top: bool, seed: int = 0, weights: str | None = None) -> Any:
    """A network of keras.applications without what it does to pixels itself.

    Args:
        name: In `MEMBERS`.
        size_px: Side of the input, at least the family's smallest.
        include_top: End with logits; otherwise with pooled features.
        seed: Of random weights.
        weights: "imagenet", or None for random ones.

    Returns:
        A functional model. Its layers have the same names however often it was built in this process.

    Example:
        >>> build("mobilenet_v3_small", 32, include_top=False).output_shape
        (None, 576)
    """
    import keras

    family = MEMBERS[name]
    options: dict[str, Any] = {"include_preprocessing": False} if family.inside == "argument" else {}
    options |= {"classifier_activation": None} if include_top else {"pooling": "avg"}
    function = getattr(keras.applications, family.members[name][0])
    with fresh_names_and_seeds(seed):
        model = function(include_top=include_top, weights=weights, input_shape=(size_px, size_px, 3), **options)
        return _without_scaling(model) if family.inside == "layers" else model


def _name_of(reference: str) -> str:
    """The entry of `MEMBERS` behind a spelling, the function's own included."""
    if reference in MEMBERS:
        return reference
    plain = {entry.replace("_", ""): entry for entry in MEMBERS}
    found = plain.get(reference.replace("_", "").replace("-", "").lower())
    if found is None:
        raise InputError(f"Keras Applications has no {reference!r}. {did_you_mean(reference.lower(), MEMBERS)}")
    return found


def _file_facts(weights: str) -> dict[str, str]:
    path = Path(weights)
    if not path.is_file():
        raise InputError(f"There is no file {weights}; give weights for this network in .h5, .weights.h5 or .keras.")
    return {"file": weights, "sha256": sha256_of_file(path)}


def _with_imagenet(card: Source, size_px: int, *, include_top: bool) -> Any:
    family = MEMBERS[card.architecture]
    trained_px = family.members[card.architecture][1]
    if include_top and family.fixed_top and size_px != trained_px:
        raise InputError(f"The old output of {card.name!r} takes images of {trained_px} px only, not of {size_px} px.")
    # Keras gives the old output's weights at the trained size only.
    first_px = trained_px if include_top else size_px
    try:
        # Keras tells of downloads on stdout, which is the user's.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            # That weights for another side are taken is as it should be.
            warnings.simplefilter("ignore")
            model = build(card.architecture, first_px, include_top=include_top, weights="imagenet")
    except Exception as error:  # Keras raises a bare Exception where a download fails
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The ImageNet weights of {card.name!r} could not be had from Keras' storage ({reason}); go online, or "
            "give a file with them (--weights FILE)."
        ) from error
    if first_px == size_px:
        return model
    other = build(card.architecture, size_px, include_top=include_top)
    other.set_weights(model.get_weights())
    return other


def _without_scaling(model: Any) -> Any:
    """The network from behind the Rescaling and Normalization layers it begins with."""
    import keras

    tensor = model.input
    for layer in model.layers[1:]:
        if not isinstance(layer, keras.layers.Rescaling | keras.layers.Normalization):
            break
        tensor = layer.output
    return keras.Model(tensor, model.output, name=model.name)


def _facts_inside(path: Path) -> dict[str, Any] | None:
    """What the Normalization layer in a file of EfficientNet's weights does to pixels; None where it has none.

    ImageNet's weights have the standard deviation where the layer wants its square, and Keras' network for them divides
    by the root once more. (pixel / 255 - mean) / std comes out.
    """
    found = _stored_normalization(path)
    if found is None:
        return None
    mean, variance = found
    imagenet = range_facts("imagenet")
    std = tuple(1 / (255 * scale) for scale in imagenet["scale"])
    if all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(variance, std, strict=True)):
        return imagenet
    deviation = [max(math.sqrt(value), 1e-7) for value in variance]  # as the layer
    scale = tuple(1 / (255 * value) for value in deviation)
    offset = tuple(-one / value for one, value in zip(mean, deviation, strict=True))
    return {"scale": scale, "offset": offset, "channel_order": "rgb"}


def _stored_normalization(path: Path) -> tuple[list[float], list[float]] | None:
    """Mean and variance of the layer `normalization` in a file of weights."""
    from tfxfer.sources.stored_weights import open_stored
    from tfxfer.sources.weights_file import checked_file

    with open_stored(checked_file(path)) as stored:
        names = ("mean", "variance") if stored.legacy else ("vars/0", "vars/1")
        for unit in stored.units:
            if re.fullmatch(r"normalization(_\d+)?", unit.name) and all(
                np.prod(unit.shapes().get(name, ())) == 3 for name in names
            ):
                arrays = dict(unit.entries)
                mean, variance = ([float(value) for value in arrays[name][()].ravel()] for name in names)
                return mean, variance
    return None
