"""The weights in a file by layer, with names and declared shapes; a number is read only when it is asked for.

Three layouts: HDF5 of Keras 2 (`model.save("x.h5")`, `save_weights("x.h5")`), which names every variable; HDF5 of Keras
3 (`.weights.h5`), which numbers them and, since 3.11, names the layers; and `.keras`, a zip with the latter inside.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import InputError
from tfxfer.sources.keras_graph import is_model


@dataclasses.dataclass(frozen=True)
class Unit:
    """The variables of one layer.

    Attributes:
        path: Names of the models that hold it and its own, "mobilenet/conv1".
        kind: What layers must share to be taken for one another by their order: the class, or the names of variables.
        entries: Name and dataset or variable, each with a `shape`.
        number: Order in the network.
    """

    path: str
    kind: str
    entries: tuple[tuple[str, Any], ...]
    number: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name of variable."""
        return {name: tuple(value.shape) for name, value in self.entries}

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(shape, dtype=object)) for shape in self.shapes().values())


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file holds: its layers, and whether its variables have names (`legacy`) or numbers."""

    units: tuple[Unit, ...]
    legacy: bool


@contextlib.contextmanager
def open_stored(path: Path, *, leaves: Sequence[str] = ()) -> Iterator[Stored]:
    """Open a weights file or the weights in a model file.

    Args:
        path: .keras, .weights.h5 or .h5.
        leaves: Names of layers that are known to hold no layers of a network: their variables stay together.

    Raises:
        InputError: Where it is missing or none of these.
    """
    import h5py

    path = Path(path)
    with contextlib.ExitStack() as stack:
        try:
            content: Any = path
            if path.suffix.lower() == ".keras":
                content = stack.enter_context(tempfile.TemporaryFile())
                with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as member:
                    shutil.copyfileobj(member, content)
            file = stack.enter_context(h5py.File(content, "r"))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            why = "there is no such file" if not path.exists() else f"it is not HDF5 ({error})"
            raise InputError(f"Cannot read {path}: {why}.") from None
        root = file.get("model_weights", file)
        if "layer_names" in root.attrs or "layer_names0" in root.attrs:
            yield Stored(tuple(_legacy_units(file, root, path, leaves)), legacy=True)
        else:
            yield Stored(tuple(numbered_units(file)), legacy=False)


def statistics_of(path: Path):
    """A function from the path of a Normalization layer to its "mean" and "variance" in a weights file."""

    def read(layer: str) -> Mapping[str, np.ndarray]:
        with open_stored(path) as stored:
            unit = next(unit for unit in stored.units if unit.path == layer or unit.name == layer.rpartition("/")[2])
            names = ("mean", "variance") if stored.legacy else ("vars/0", "vars/1")
            arrays = dict(unit.entries)
            if any(np.prod(arrays[name].shape) > 4096 for name in names):
                raise KeyError(layer)
            return {key: arrays[name][()] for key, name in zip(("mean", "variance"), names, strict=True)}

    def read_or_fail(layer: str) -> Mapping[str, np.ndarray]:
        try:
            return read(layer)
        except StopIteration:
            raise KeyError(layer) from None

    return read_or_fail


def attribute_texts(group: Any, name: str) -> list[str]:
    """A list of names in the attributes of a group; Keras 2 parts long lists into name0, name1, ..."""
    parts = [name] if name in group.attrs else []
    while f"{name}{len(parts)}" in group.attrs:
        parts.append(f"{name}{len(parts)}")
    if not parts:
        raise KeyError(name)
    return [text.decode() if isinstance(text, bytes) else str(text) for part in parts for text in group.attrs[part]]


def is_own_dataset(entry: Any, file: Any) -> bool:
    """Whether `entry` is a dataset whose numbers lie in `file` itself; HDF5 can refer to any other file."""
    import h5py

    return isinstance(entry, h5py.Dataset) and entry.file == file and not entry.external and not entry.is_virtual


def variable_name(path: str) -> str:
    """A variable's path without what Keras 2 wrote otherwise: "conv/depthwise_kernel:0" is "conv/kernel".

    Example:
        >>> variable_name("block_1/depthwise_kernel:0")
        'block_1/kernel'
    """
    return re.sub(r"(?<![^/])depthwise_kernel$", "kernel", path.partition(":")[0])


def _legacy_units(file: Any, root: Any, path: Path, leaves: Sequence[str]) -> Iterator[Unit]:
    """Layers of a Keras 2 file; those of nested models by their own names."""
    nested = _nested_models(file)
    number = 0
    try:
        for layer in attribute_texts(root, "layer_names"):
            groups: dict[str, list[tuple[str, Any]]] = {}
            for text in attribute_texts(root[layer], "weight_names"):
                dataset = root[layer][text]
                if not is_own_dataset(dataset, file):
                    raise KeyError(text)
                parts = variable_name(text).split("/")
                if layer in parts[:-1]:  # Keras 3 may set the names of models before it
                    parts = parts[parts.index(layer) + 1 :]
                inside = layer not in leaves and (layer in nested if nested is not None else len(parts) > 1)
                depth = _depth(parts, leaves) if inside else 0
                groups.setdefault("/".join([layer, *parts[:depth]]), []).append(("/".join(parts[depth:]), dataset))
            for name, entries in groups.items():
                kind = " ".join(sorted(name for name, _ in entries))
                yield Unit(name, kind, tuple(entries), number)
                number += 1
    except (KeyError, AttributeError, OSError) as error:
        raise InputError(f"{path} is not a file of Keras weights: {error} is not in it.") from None


def _depth(parts: Sequence[str], leaves: Sequence[str]) -> int:
    """How many leading parts of a variable's path name its layer inside a nested model."""
    known = [index + 1 for index, part in enumerate(parts[:-1]) if part in leaves]
    return known[0] if known else max(len(parts) - 1, 0)


def _nested_models(file: Any) -> set[str] | None:
    """Names of the nested models by the config in the file; None where it has none."""
    text = file.attrs.get("model_config")
    if text is None:
        return None
    try:
        config = json.loads(text)
        inner = config["config"]
        layers = inner if isinstance(inner, list) else inner["layers"]
        return {spec["config"]["name"] for spec in layers if is_model(spec)}
    except (ValueError, KeyError, TypeError):
        return None


def numbered_units(file: Any) -> Iterator[Unit]:
    """Layers of a Keras 3 file, with the names that it keeps, or else with class and number, "conv2d_1"."""
    import h5py

    found: dict[tuple[str, ...], list[tuple[str, Any]]] = {}
    texts: list[str] = []
    file.visititems(lambda name, item: texts.append(name) if isinstance(item, h5py.Dataset) else None)
    for text in sorted(texts, key=_natural):
        tokens = text.split("/")
        if tokens[0] == "optimizer" or "seed_generator" in tokens or not is_own_dataset(file[text], file):
            continue
        depth = 0
        while depth + 1 < len(tokens) and tokens[depth] == "layers":
            depth += 2
        depth = depth or 1
        found.setdefault(tuple(tokens[:depth]), []).append(("/".join(tokens[depth:]), file[text]))
    for number, (group, entries) in enumerate(found.items()):
        kind = re.sub(r"_\d+$", "", group[-1])
        yield Unit(_named(file, group), kind, tuple(entries), number)


def _named(file: Any, group: Sequence[str]) -> str:
    """The path of a layer by the names that Keras keeps beside its variables."""
    names = []
    for end in range(1, len(group) + 1):
        if group[end - 1] == "layers" and end < len(group):
            continue
        entry = file.get("/".join([*group[:end], "vars"]))
        name = entry.attrs.get("name") if entry is not None else None
        names.append(str(name) if name is not None else group[end - 1])
    return "/".join(names)


def _natural(text: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
