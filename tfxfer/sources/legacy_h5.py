"""Weights from a legacy full-model HDF5, the file that `model.save("x.h5")` writes: read by h5py, nothing is run.

Keras' own `load_weights` stops at a layer that does not fit, or with `skip_mismatch=True` goes on and only warns; with
`by_name=True` it takes whatever has the name. Here each layer's arrays are compared, by name and shape, with the
variables that they are to fill before a number is read, and what was not loaded is listed.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_file
from tfxfer.sources.builders import build_network
from tfxfer.sources.report import LayerReport, LoadReport
from tfxfer.sources.safety import check_finite, check_h5
from tfxfer.sources.stored_weights import attribute_texts, is_own_dataset, variable_name
from tfxfer.specs import Source


def load_matching_weights(model: Any, path: str | Path, *, by: str = "order") -> LoadReport:
    """Load those layers of a legacy .h5 whose shapes fit, and list the others.

    Args:
        model: A built keras.Model; the layers that have weights are what counts.
        path: What `model.save("x.h5")` wrote.
        by: "order": the first layer of the file with weights goes to the first of the model, and so on; both must have
            as many, names do not matter. "name": layers of the same name.

    Returns:
        What became of each layer: matched or renamed (loaded), differs (left as it was), missing in the file, unused of
        the file.

    Raises:
        InputError: Where the file is no such HDF5, the counts of layers differ, or not one layer fits; the model is
            as it was then.

    Example:
        >>> import keras
        >>> path = weights_path("digits_cnn", "digits_cnn.h5")
        >>> from tfxfer.sources.builders import BUILDERS
        >>> backbone = BUILDERS["digits_cnn"](32)
        >>> five_digits = keras.Model(backbone.input, keras.layers.Dense(5, name="output")(backbone.output))
        >>> report = load_matching_weights(five_digits, path)
        >>> report.names("matched", "renamed")
        ('conv1', 'conv2', 'conv3', 'dense1')
        >>> print(str(report).partition(": ")[2])
        121920 of 122245 parameters (99.7 %) loaded: 4 layers matched, 1 differs
          differs: output: kernel (64, 10), bias (10,) in the file; kernel (64, 5), bias (5,) in the model
    """
    import h5py

    path = Path(path)
    if by not in ("order", "name"):
        raise InputError(f"`by` must be 'order' or 'name', not {by!r}.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        why = "there is no such file" if not path.exists() else f"it is not HDF5 ({error})"
        raise InputError(f"Cannot read {path}: {why}.") from None
    with file:
        check_h5(path)
        stored = _stored_layers(file, path)
        layers = _model_layers(model)
        report, fitting = _compare(model, str(path), layers, stored, _pairs(layers, stored, by, path))
        if not fitting:
            raise InputError(f"No layer of {model.name!r} fits {path}, nothing was loaded:\n{report}")
        values = [(weight, dataset.name, dataset[()]) for weight, dataset in fitting]
        check_finite(((name, value) for _, name, value in values), f"The weights in {path}")
        for weight, _, value in values:
            weight.assign(value)
    return report


def load(card: Source, size_px: int, *, weights: bool, include_top: bool, seed: int) -> tuple[Any, LoadReport | None]:
    """Build the network of the card's architecture and load its weights; see `tfxfer.sources`."""
    model = build_network(card, size_px, include_top=include_top, seed=seed)
    if weights:
        load_weights(card, model)
    return model, None


def load_weights(source: Source, model: Any) -> None:
    """Set the weights of `source`, whose .h5 lies beside its card, on `model`, every one of them.

    Args:
        source: Its `weights` name `file` and `sha256`.
        model: What the builder of its architecture made, with or without the top.

    Raises:
        InputError: Where the file is missing, has another SHA-256 or does not fit the model.
    """
    path = weights_path(source.name, source.weights["file"])
    digest = sha256_of_file(path)
    if digest != source.weights["sha256"]:
        raise InputError(
            f"{path} has SHA-256 {digest}, but the card of {source.name!r} says {source.weights['sha256']}: "
            "the file was changed or damaged; install tfxfer again."
        )
    report = load_matching_weights(model, path, by="name")
    if not report.complete:
        raise InputError(f"{path} does not fit the network of {source.name!r}:\n{report}")


def weights_path(name: str, file: str) -> Path:
    """The path of a file beside the card of a source.

    Args:
        name: Of the source.
        file: The file's name in its folder.

    Raises:
        InputError: Where there is no such file.

    Example:
        >>> weights_path("digits_cnn", "digits_cnn.h5").name
        'digits_cnn.h5'
    """
    path = Path(str(resources.files("tfxfer.models"))) / name / file
    if not path.is_file():
        raise InputError(f"{path}, the weights of {name!r}, is missing; install tfxfer again.")
    return path


def _stored_layers(file: Any, path: Path) -> dict[str, list[tuple[str, Any]]]:
    """Variable names and datasets by layer, only layers that have some; no number is read."""
    root = file.get("model_weights", file)
    layers = {}
    try:
        for layer in attribute_texts(root, "layer_names"):
            names = attribute_texts(root[layer], "weight_names")
            entries = [(name, root[layer][name]) for name in names]
            if not all(is_own_dataset(entry, file) for _, entry in entries):
                raise KeyError(layer)
            if entries:
                layers[layer] = entries
    except (KeyError, AttributeError) as error:
        raise InputError(
            f'{path} is not what model.save("x.h5") writes: {error} is not in it. Weights in the newer format end in '
            ".weights.h5 and are loaded by model.load_weights."
        ) from None
    return layers


def _model_layers(model: Any) -> dict[str, list[tuple[str, Any]]]:
    """Variable names and variables by layer, in the order in which Keras writes them."""
    return {
        layer.name: [(weight.path, weight) for weight in [*layer.trainable_weights, *layer.non_trainable_weights]]
        for layer in model.layers
        if layer.weights
    }


def _signature(entries: Sequence[tuple[str, Any]], nested: bool) -> list[str]:
    """Name and shape of each variable, "kernel (3, 3, 3, 32)"; inside a nested model with the layer's name."""
    texts = []
    for name, value in entries:
        parts = variable_name(name).split("/")
        texts.append(f"{'/'.join(parts[-2 if nested else -1 :])} {tuple(value.shape)}")
    return texts


def _pairs(layers: Mapping[str, Any], stored: Mapping[str, Any], by: str, path: Path) -> dict[str, str]:
    """Layer of the model to layer of the file."""
    if by == "name":
        return {name: name for name in layers if name in stored}
    if len(layers) != len(stored):
        raise InputError(
            f"{path} has {len(stored)} layers with weights ({', '.join(stored)}) and the model {len(layers)} "
            f"({', '.join(layers)}), so their order says nothing; build the same network, or give the layers "
            "the file's names and load with by='name'."
        )
    return dict(zip(layers, stored, strict=True))


def _compare(
    model: Any,
    path: str,
    layers: Mapping[str, list[tuple[str, Any]]],
    stored: Mapping[str, list[tuple[str, Any]]],
    pairs: Mapping[str, str],
) -> tuple[LoadReport, list[tuple[Any, Any]]]:
    """The report, and variables with the datasets that fill them."""
    rows, fitting = [], []
    for name, entries in layers.items():
        count = _num_parameters(entries)
        other = pairs.get(name)
        if other is None:
            rows.append(LayerReport(name, "missing", count))
            continue
        nested = hasattr(model.get_layer(name), "layers")
        wanted, given = _signature(entries, nested), _signature(stored[other], nested)
        if wanted != given:
            rows.append(LayerReport(name, "differs", count, _difference(wanted, given)))
            continue
        rows.append(LayerReport(name, *(("matched", count) if name == other else ("renamed", count, f"from {other}"))))
        fitting += [(weight, data) for (_, weight), (_, data) in zip(entries, stored[other], strict=True)]
    unused = [name for name in stored if name not in pairs.values()]
    rows += [LayerReport(name, "unused", _num_parameters(stored[name])) for name in unused]
    return LoadReport(path, tuple(rows)), fitting


def _num_parameters(entries: Sequence[tuple[str, Any]]) -> int:
    return sum(math.prod(value.shape) for _, value in entries)


def _difference(wanted: list[str], given: list[str]) -> str:
    """Where two signatures differ, the first few variables."""
    rows = [row for row in itertools.zip_longest(given, wanted) if row[0] != row[1]]
    there, here = (", ".join([text for text in column if text][:3]) or "nothing" for column in zip(*rows, strict=True))
    return f"{there} in the file; {here} in the model"
