"""Keep what the source knows already: rows of its classifier for classes that the target has too."""

from collections.abc import Sequence

import keras
import numpy as np

from tfxfer.errors import InputError
from tfxfer.sources import catalog
from tfxfer.specs import Source


def keep_source_classes(model: keras.Model, source: str | Source, class_names: Sequence[str]) -> dict[str, str]:
    """Start the head's rows of classes that both tasks share from the source's own classifier.

    Names are compared without regard to case, and with spaces for `_` and `-`. The other rows stay as they are: at
    their random start they are as small as any new head's. `fit` has no use for this, since its probe finds the best
    head for the features; with your own `compile` and `fit` it is a start that knows.

    Args:
        model: Of `build_model` from the same source.
        source: The source, with its weights.
        class_names: K names, in the order of the model's outputs.

    Returns:
        The target's name to the source's, for each class that was taken over.

    Raises:
        InputError: Where no class is shared, or the source's classifier does not act on the backbone's features.

    Example:
        >>> from tfxfer import build_model
        >>> names = ["3", "4", "other"]
        >>> keep_source_classes(build_model("digits_cnn", names), "digits_cnn", names)
        {'3': '3', '4': '4'}
    """
    card = catalog.get_source(source) if isinstance(source, str) else source
    theirs = {_plain(name): (index, name) for index, name in enumerate(catalog.class_names_of(card))}
    shared = {name: theirs[_plain(name)] for name in class_names if _plain(name) in theirs}
    if not shared:
        raise InputError(f"No class of the target is a class of {card.name!r}; nothing can be kept.")
    head = model.get_layer("logits")
    if len(class_names) != head.units:
        raise InputError(f"{len(class_names)} class names were given for the {head.units} outputs of the model.")
    network = catalog.load_backbone(card, include_top=True)
    classifier = _classifier(card, network, head.kernel.shape[0])
    kernel, bias = (value.copy() for value in head.get_weights())
    for row, name in enumerate(class_names):
        if name in shared:
            index = shared[name][0]
            kernel[:, row], bias[row] = classifier[0][:, index], classifier[1][index]
    head.set_weights([kernel, bias])
    return {name: theirs_name for name, (_, theirs_name) in shared.items()}


def source_classifier(card: Source, backbone: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """The source's own output as a function of its features.

    Args:
        card: Of the source.
        backbone: Of the source, with its weights: what it gives for two pictures of noise shows whether the last layer
            acts on the features alone.

    Returns:
        Kernel (F, K) and bias (K,) to logits.

    Raises:
        InputError: Where the source has no old output, or it acts on something else than the features.

    Example:
        >>> from tfxfer.sources.catalog import get_source, load_backbone
        >>> card = get_source("digits_cnn")
        >>> kernel, bias = source_classifier(card, load_backbone(card))
        >>> kernel.shape, bias.shape
        ((64, 10), (10,))
    """
    network = catalog.load_backbone(card, image_size=backbone.input_shape[1], include_top=True)
    kernel, bias = _classifier(card, network, backbone.output_shape[-1])
    images = np.random.default_rng(0).normal(size=(2, *backbone.input_shape[1:])).astype("float32")
    expected = network.predict_on_batch(images)
    found = backbone.predict_on_batch(images) @ kernel + bias
    if not np.allclose(found, expected, atol=1e-3 * max(float(np.abs(expected).max()), 1.0)):
        raise InputError(
            f"The classifier of {card.name!r} is no linear map of the model's features, or the model has other weights."
        )
    return kernel, bias


def _classifier(card: Source, network: keras.Model, num_features: int):
    """Kernel (F, K) and bias (K,) of the source's last layer."""
    last = next((layer for layer in reversed(network.layers) if layer.weights), None)
    if not isinstance(last, keras.layers.Dense) or last.kernel.shape[0] != num_features:
        raise InputError(f"The classifier of {card.name!r} does not act on its features alone, so no row can be kept.")
    kernel, *bias = last.get_weights()
    return kernel, bias[0] if bias else kernel[0] * 0


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
