"""Put input adaptation, backbone and head together."""

import keras

from tfxfer.errors import InputError
from tfxfer.model.head import as_head, attach_head
from tfxfer.model.preprocess import AdaptImage
from tfxfer.sources import catalog
from tfxfer.specs import Source


def build_model(
    source: str | Source,
    head,
    *,
    image_size: int | None = None,
    dropout: float = 0.2,
    logits: bool = False,
    weights: bool = True,
    seed: int = 0,
) -> keras.Model:
    """A model from a pretrained source and a new head, ready for `freeze`, `compile` and `fit`.

    Args:
        source: Name of a source, or its card.
        head: `Classes(names)`, a number of classes, class names, or a Dataset whose classes are taken.
        image_size: Side in pixels that images are resized to inside the graph; the source's own by default.
        dropout: Rate before the head, in [0, 1).
        logits: Output logits instead of probabilities.
        weights: Load the pretrained weights; False leaves random ones.
        seed: Of random weights of the backbone.

    Returns:
        A functional `keras.Model`: images (N, H, W, C), any H and W, C in 1..4, uint8 or float in 0..255, to
        (N, number of classes) float32 probabilities that sum to one.

    Raises:
        InputError: Where the source is unknown or the image size is smaller than it can take.

    Example:
        >>> model = build_model("digits_cnn", ["cat", "dog"])  # doctest: +SKIP
        >>> model.predict(images)  # doctest: +SKIP
    """
    card = catalog.get_source(source) if isinstance(source, str) else source
    backbone = catalog.load_backbone(card, image_size=image_size, weights=weights, seed=seed)
    return assemble(backbone, card, head, dropout=dropout, logits=logits)


def assemble(backbone: keras.Model, card: Source, head, *, dropout: float, logits: bool = False) -> keras.Model:
    """Wrap a backbone with the card's preprocessing before it and a head behind it."""
    inputs = keras.Input((None, None, None), name="images", dtype="float32")
    features = backbone(preprocess(inputs, card, backbone.input_shape[1]))
    outputs = attach_head(features, as_head(head), dropout=dropout, logits=logits)
    return keras.Model(inputs, outputs, name=card.name)


def build_original(source: str | Source, *, image_size: int | None = None) -> keras.Model:
    """The source with its original output: images as in `build_model` to (N, original classes) probabilities."""
    card = catalog.get_source(source) if isinstance(source, str) else source
    network = catalog.load_backbone(card, image_size=image_size, include_top=True)
    inputs = keras.Input((None, None, None), name="images", dtype="float32")
    logits = network(preprocess(inputs, card, network.input_shape[1]))
    outputs = keras.layers.Activation("softmax", dtype="float32", name="probabilities")(logits)
    return keras.Model(inputs, outputs, name=card.name)


def preprocess(images, card: Source, size_px: int | None):
    """Resize, make RGB and normalise as the source was trained: `pixel * scale + offset` per channel."""
    if size_px is None:
        raise InputError(f"The backbone of {card.name!r} has no fixed input size; give image_size.")
    x = AdaptImage(size_px, name="adapt_image")(images)
    return keras.layers.Rescaling(list(card.scale), list(card.offset), name="normalise")(x)
