"""The user's own network: what a function of theirs returns (`py:MODULE:FUNCTION`), or a model given in Python."""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import InputError, did_you_mean
from tfxfer.runtime.files import sha256_of_file
from tfxfer.sources.fresh import fresh_names_and_seeds
from tfxfer.sources.network import Network, build, check_digest, network_facts, own_module, read_network
from tfxfer.sources.report import LoadReport
from tfxfer.sources.stored_weights import statistics_of
from tfxfer.sources.weights_file import checked_file, layers_with_weights, load_weights_file
from tfxfer.specs import Source

GIVEN = "given:"


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """A model as it was when it was given: later changes to it do not reach the source."""

    config: Mapping[str, Any]
    arrays: Mapping[str, list[np.ndarray]]  # by path of the layer
    statistics: Mapping[str, Mapping[str, np.ndarray]]
    classes: Mapping[str, type]
    sha256: str


# Models given in Python, by name: the only way from the name in a plan back to an object.
_GIVEN: dict[str, tuple[_Snapshot, Source]] = {}


def source_from_model(
    model: Any, *, name: str | None = None, input_range: str = "", image_size: int | None = None
) -> Source:
    """A source from a Keras model, which is copied with its weights and never changed.

    Args:
        model: Functional or sequential, built; one image input, one output. Its last Dense, where that is a
            classifier, is left out of the backbone.
        name: By which plans find it, in this process; the model's own by default.
        input_range: What it wants pixels scaled to, see `tfxfer.sources.ranges`; needed unless it rescales them itself.
        image_size: Side that images are resized to by default; the model's own by default.

    Returns:
        Its card; `card.name` is a spelling that `fit` and `get_source` take.

    Raises:
        InputError: Where the model has no graph, or its range of pixels is unknown.

    Example:
        >>> import keras
        >>> layers = [keras.layers.Conv2D(4, 3, name="conv"), keras.layers.GlobalAveragePooling2D()]
        >>> net = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), *layers], name="mine")
        >>> source_from_model(net).name
        'py:given:mine'
    """
    name = name or model.name
    snapshot = _snapshot(model, f"The model {model.name!r}")
    facts = network_facts(_network(snapshot, f"The model {model.name!r}"), input_range, f"The model {model.name!r}")
    if image_size is not None:
        facts["image_size_px"] = image_size
    card = Source(
        name=f"py:{GIVEN}{name}", kind="own", reference=GIVEN + name, title=f"Keras model {name}, given in Python",
        licence="unknown", weights={"sha256": snapshot.sha256}, **facts,
    )  # fmt: skip
    _GIVEN[name] = (snapshot, card)
    return card


def describe(
    spelling: str, reference: str, *, weights: str, input_range: str, partial: bool, trusted: Sequence[str]
) -> Source:
    """The card of `py:MODULE:FUNCTION`; see `tfxfer.sources`. The function is called, and so Keras imported.

    Raises:
        InputError: Where module or function is missing, or it returns no model of images.
    """
    if reference.startswith(GIVEN):
        return _given(reference)[1]
    snapshot = _snapshot(_made(spelling, reference, None), spelling)
    file = {"file": str(checked_file(weights, trusted)), "sha256": sha256_of_file(Path(weights))} if weights else {}
    network = _network(snapshot, spelling, file.get("file", ""))
    return Source(
        name=spelling, kind="own", reference=reference, title=f"What {reference} returns", licence="unknown",
        weights=file, partial=partial, trusted=tuple(trusted), **network_facts(network, input_range, spelling),
    )  # fmt: skip


def load(card: Source, size_px: int, *, weights: bool, include_top: bool, seed: int) -> tuple[Any, LoadReport | None]:
    """Build the backbone of the user's network anew, with the network's weights or a file's; see `tfxfer.sources`."""
    if card.reference.startswith(GIVEN):
        snapshot = _given(card.reference)[0]
        if snapshot.sha256 != card.weights["sha256"]:
            raise InputError(f"Another model was given as {card.name} since; give each model a name of its own.")
    else:
        snapshot = _snapshot(_made(card.name, card.reference, size_px), card.name)
    file = card.weights.get("file", "")
    network = _network(snapshot, card.name, file)
    model, renamed = build(
        card, network, size_px,
        include_top=include_top, seed=None if weights else seed, classes=snapshot.classes,
    )  # fmt: skip
    if not weights:
        return model, None
    _copy_weights(snapshot, model, renamed)
    if not file:
        return model, None
    check_digest(Path(file), card.weights["sha256"])
    report = load_weights_file(model, file, partial=card.partial, trusted=card.trusted, original_names=renamed)
    return model, report


def _given(reference: str) -> tuple[_Snapshot, Source]:
    name = reference.removeprefix(GIVEN)
    if name not in _GIVEN:
        raise InputError(
            f"No model was given as {name!r} in this process; give it again by source_from_model(model, "
            f"name={name!r}), or save it and name the .keras file as the source."
        )
    return _GIVEN[name]


def _made(spelling: str, reference: str, size_px: int | None) -> Any:
    """What the user's function returns."""
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise InputError(f"{spelling!r} must be py:MODULE:FUNCTION, such as py:networks:small_resnet.")
    module = own_module(module_name, f"{module_name!r} of the source {spelling!r}")
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(f"{spelling!r}: {module_name!r} has no function {name!r}. {did_you_mean(name, functions)}")
    return _result(spelling, function, size_px)


def _result(spelling: str, function: Any, size_px: int | None) -> Any:
    import keras

    takes_size = "image_size" in inspect.signature(function).parameters
    try:
        with fresh_names_and_seeds(0):  # the same names at each call: weights of a file are found by them
            model = function(image_size=size_px) if takes_size and size_px is not None else function()
    except Exception as error:
        raise InputError(f"{spelling!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, keras.Model):
        raise InputError(f"{spelling!r} must return a keras.Model, not {type(model).__name__}.")
    return model


def _snapshot(model: Any, what: str) -> _Snapshot:
    import keras

    if not isinstance(model, keras.Sequential) and not hasattr(model, "operations"):
        raise InputError(
            f"{what} is a subclassed keras.Model without a graph, so there is nothing to cut its backbone from; "
            "wrap it: keras.Model(inputs, model(inputs))."
        )
    if not model.built:
        raise InputError(f"{what} is not built: its input shape is not known; begin it with keras.Input((H, W, C)).")
    layers = list(layers_with_weights(model))
    arrays = {path: [np.array(value) for value in layer.get_weights()] for path, layer in layers}
    digest = hashlib.sha256()
    for path in sorted(arrays):
        for array in arrays[path]:
            digest.update(f"{path} {array.shape} {array.dtype}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    parts = [part for part in model._flatten_layers() if not type(part).__module__.startswith("keras.")]
    statistics = {
        path: {"mean": np.array(layer.mean), "variance": np.array(layer.variance)}
        for path, layer in layers
        if isinstance(layer, keras.layers.Normalization)
    }
    config = json.loads(model.to_json())
    return _Snapshot(
        config, arrays, statistics, {type(part).__name__: type(part) for part in parts}, digest.hexdigest()
    )


def _network(snapshot: _Snapshot, what: str, file: str = "") -> Network:
    statistics = statistics_of(Path(file)) if file else snapshot.statistics.__getitem__
    return read_network(snapshot.config, statistics, what)


def _copy_weights(snapshot: _Snapshot, model: Any, renamed: Mapping[str, str]) -> None:
    """Set the weights of the layers that the body has of the whole model."""
    for path, layer in layers_with_weights(model, renamed):
        arrays = snapshot.arrays[path]
        here, there = [tuple(value.shape) for value in layer.weights], [value.shape for value in arrays]
        if here != there:
            raise InputError(
                f"The layer {path!r} has weights of the shapes {there} and needs {here} for RGB images of this size."
            )
        layer.set_weights(arrays)
