"""Put input adaptation, backbone and head together."""

import re

import keras

from tfxfer.errors import InputError
from tfxfer.model.channels import card_for_channels, with_channels
from tfxfer.model.head import as_head, attach_head
from tfxfer.model.preprocess import AdaptImage
from tfxfer.sources import catalog
from tfxfer.sources.own import source_from_model
from tfxfer.specs import Source


def build_model(
    source: str | Source | keras.Model,
    head,
    *,
    image_size: int | None = None,
    input_range: str = "",
    dropout: float = 0.2,
    logits: bool = False,
    weights: bool = True,
    seed: int = 0,
    channels: int = 3,
) -> keras.Model:
    """A model from a pretrained source and a new head, ready for `freeze`, `compile` and `fit`.

    Args:
        source: Name of a source, its card, or a `keras.Model` of your own. A model is copied with its weights and never
            changed; the copy has flags of its own, so `source_model.trainable = False` freezes nothing of the result:
            call `freeze` on that.
        head: `Classes(names)`, a number of classes, class names, or a Dataset whose classes are taken.
        image_size: Side in pixels that images are resized to inside the graph; the source's own by default.
        input_range: What the source wants pixels scaled to, see `tfxfer.sources.ranges`; where it is not known.
        dropout: Rate before the head, in [0, 1).
        logits: Output logits instead of probabilities.
        weights: Load the pretrained weights; False leaves random ones.
        seed: Of random weights of the backbone.
        channels: Of the images, where they are not RGB, such as 5 of a multispectral camera: the first convolution is
            made to fit (see `tfxfer.model.channels`). Grey and RGBA images need none of this.

    Returns:
        A functional `keras.Model`: images (N, H, W, C), any H and W, C in 1..4, uint8 or float in 0..255, to
        (N, number of classes) float32 probabilities that sum to one. With `channels` C is just that.

    Raises:
        InputError: Where the source is unknown or the image size is smaller than it can take.

    Example:
        >>> model = build_model("digits_cnn", ["cat", "dog"])  # doctest: +SKIP
        >>> model.predict(images)  # doctest: +SKIP
    """
    if isinstance(source, keras.Model):
        card = source_from_model(source, input_range=input_range)
    else:
        card = catalog.get_source(source, input_range=input_range) if isinstance(source, str) else source
    backbone = catalog.load_backbone(card, image_size=image_size, weights=weights, seed=seed)
    if channels != 3:
        backbone, card = with_channels(backbone, channels), card_for_channels(card, channels)
    return assemble(backbone, card, head, dropout=dropout, logits=logits)


def assemble(backbone: keras.Model, card: Source, head, *, dropout: float, logits: bool = False) -> keras.Model:
    """Wrap a backbone with the card's preprocessing before it and a head behind it."""
    inputs = keras.Input((None, None, None), name="images", dtype="float32")
    features = backbone(preprocess(inputs, card, backbone.input_shape[1]))
    outputs = attach_head(features, as_head(head), dropout=dropout, logits=logits)
    model = keras.Model(inputs, outputs, name=_model_name(card))
    model.source_card = card  # for `fit`; a saved model does not keep it
    return model


def build_original(source: str | Source, *, image_size: int | None = None) -> keras.Model:
    """The source with its original output: images as in `build_model` to (N, original classes) probabilities."""
    card = catalog.get_source(source) if isinstance(source, str) else source
    network = catalog.load_backbone(card, image_size=image_size, include_top=True)
    inputs = keras.Input((None, None, None), name="images", dtype="float32")
    logits = network(preprocess(inputs, card, network.input_shape[1]))
    outputs = keras.layers.Activation("softmax", dtype="float32", name="probabilities")(logits)
    return keras.Model(inputs, outputs, name=_model_name(card))


def preprocess(images, card: Source, size_px: int | None):
    """Resize, make RGB and normalise as the source was trained: `pixel * scale + offset` per channel."""
    if size_px is None:
        raise InputError(f"The backbone of {card.name!r} has no fixed input size; give image_size.")
    layer = AdaptImage(size_px, channel_order=card.channel_order, channels=len(card.scale), name="adapt_image")
    x = layer(images)
    return keras.layers.Rescaling(list(card.scale), list(card.offset), name="normalise")(x)


def _model_name(card: Source) -> str:
    """The source's name, as far as Keras and TensorFlow take it: paths and prefixes have other characters."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", card.name).strip("_.-") or "model"
