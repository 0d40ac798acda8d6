"""State dicts of torch for Keras networks: files in three formats, names, layouts, and what became of every layer."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import InputError
from tfxfer.sources.report import LayerReport, LoadReport, check_fit
from tfxfer.sources.torch_pickle import floats_from_bfloat16, read_checkpoint, read_zipped_checkpoint

# What a state dict calls an array, and what Keras calls it.
LEAVES = {"running_mean": "moving_mean", "running_var": "moving_variance"}
# What a .safetensors file calls numbers, and NumPy.
SAFETENSORS_ITEMS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "?",
}
# What wrappers of a network put before every name.
PREFIXES = ("module.", "model.")


def read_state_dict(path: str | Path, content: bytes | None = None) -> dict[str, np.ndarray]:
    """Read a state dict in any of the formats, after the gate.

    Args:
        path: .safetensors, or what `torch.save` wrote, before or since version 1.6.
        content: The bytes of the file, where they have been read already.

    Returns:
        Arrays by their name, floats as float32, in torch's layout.

    Raises:
        InputError: Where the gate refuses the file, or it is damaged.
    """
    from tfxfer.sources.safety import check_safetensors, check_torch

    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}; give a state dict in .pth, .pt, .bin or .safetensors.")
    if path.suffix.lower() == ".safetensors":
        check_safetensors(path)
        return read_safetensors(path.read_bytes() if content is None else content, str(path))
    check_torch(path)
    content = path.read_bytes() if content is None else content
    return (read_zipped_checkpoint if content.startswith(b"PK") else read_checkpoint)(content, str(path))


def read_safetensors(content: bytes, name: str = "the file") -> dict[str, np.ndarray]:
    """Read a .safetensors file: the length of a header, the header in JSON, the numbers.

    Args:
        content: The bytes of the file.
        name: What errors call it.

    Raises:
        InputError: Where an array leaves the file, or the header is none.

    Example:
        >>> header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> read_safetensors(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1, 2))
        {'a': array([1., 2.], dtype=float32)}
    """
    try:
        (length,) = struct.unpack_from("<Q", content)
        if length > len(content) - 8:
            raise ValueError(f"its header of {length} bytes leaves the file")
        header, numbers = json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]
        header.pop("__metadata__", None)
        return {str(key): _safetensor(entry, numbers) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise InputError(f"{name} cannot be read as a .safetensors file: {error}.") from error


def _safetensor(entry: Mapping[str, Any], numbers: memoryview) -> np.ndarray:
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if not 0 <= begin <= end <= len(numbers):
        raise ValueError(f"an array in bytes {begin} to {end} leaves the {len(numbers)} that are there")
    if entry["dtype"] not in SAFETENSORS_ITEMS:
        raise ValueError(f"the numbers of kind {entry['dtype']!r} are not known")
    found = np.frombuffer(numbers[begin:end], SAFETENSORS_ITEMS[entry["dtype"]]).reshape(shape)
    if entry["dtype"] == "BF16":
        return floats_from_bfloat16(found)
    return found.astype("<f4", copy=False) if found.dtype.kind == "f" else found


def load_state_dict(
    model: Any, state: Mapping[str, np.ndarray], modules: Mapping[str, str], path: str | Path, *, partial: bool = False
) -> LoadReport:
    """Set the weights of a network from a state dict and say what became of every layer.

    Args:
        model: A built keras.Model.
        state: Of `read_state_dict`. Where all names begin with "module." or "model." that is left out.
        modules: The layer of each torch module.
        path: What the report calls the file.
        partial: Load what fits.

    Returns:
        What became of each layer with weights; "matched" is the layer of the module that the architecture says.

    Raises:
        InputError: Where nothing fits, not everything does and `partial` is not given, or weights are not finite; the
            model is as it was then.
    """
    from tfxfer.sources.safety import check_finite

    state = _without_prefix(state, modules)
    stored = _by_module(state)
    places = {layer: module for module, layer in modules.items()}
    entries, values = [], []
    for layer in (layer for layer in model.layers if layer.weights):
        module = places.get(layer.name, "")
        found = _keras_arrays(stored[module]) if module in stored else None
        wanted = {weight.name: weight for weight in layer.weights}
        row = _compared(layer, module, wanted, found)
        entries.append(row)
        if row.state == "matched" and found is not None:
            values += [(f"{layer.name}/{name}", weight, found[name]) for name, weight in wanted.items()]
    used = {places.get(entry.layer) for entry in entries}
    entries += [
        LayerReport(module, "unused", sum(array.size for array in leaves.values()))
        for module, leaves in stored.items()
        if module not in used
    ]
    report = LoadReport(str(path), tuple(entries))
    check_fit(report, model.name, partial=partial)
    check_finite(((name, array) for name, _, array in values), f"The weights in {str(path)!r}")
    for _, weight, array in values:
        weight.assign(array)
    return report


def to_keras(state: Mapping[str, np.ndarray], modules: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Rename and transpose the arrays of a state dict.

    Args:
        state: From `read_state_dict`.
        modules: The layer of each torch module.

    Returns:
        Arrays by "layer/variable", in Keras' layout.

    Raises:
        InputError: Where a module has no layer, or a layer no arrays.

    Example:
        >>> state = {"fc.weight": np.zeros((10, 64), "float32"), "fc.bias": np.zeros(10, "float32")}
        >>> {name: array.shape for name, array in to_keras(state, {"fc": "logits"}).items()}
        {'logits/kernel': (64, 10), 'logits/bias': (10,)}
    """
    arrays = {}
    for key, array in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "num_batches_tracked":
            continue
        if module not in modules:
            raise InputError(f"The checkpoint has {key!r}, which no layer of the architecture takes.")
        variable = _variable(leaf, normalises=f"{module}.running_mean" in state)
        if variable is None:
            raise InputError(f"The checkpoint has {key!r}, which neither a convolution nor Dense nor BatchNorm has.")
        arrays[f"{modules[module]}/{variable}"] = _keras_layout(array)
    lacking = set(modules.values()) - {name.partition("/")[0] for name in arrays}
    if lacking:
        raise InputError(f"The checkpoint has no arrays for {', '.join(sorted(lacking))}.")
    return arrays


def assign(model: Any, arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Set every weight of `model` from `arrays` by "layer/variable".

    Raises:
        InputError: Where one is missing or has another shape; nothing has been set then.
    """
    pairs = [(f"{layer.name}/{weight.name}", weight) for layer in model.layers for weight in layer.weights]
    for name, weight in pairs:
        if name not in arrays:
            raise InputError(f"{what} lack {name!r}, which the network {model.name!r} needs.")
        if tuple(weight.shape) != arrays[name].shape:
            raise InputError(
                f"{what} have {name!r} in shape {arrays[name].shape}; "
                f"the network {model.name!r} needs {tuple(weight.shape)}."
            )
    for name, weight in pairs:
        weight.assign(arrays[name])


def _variable(leaf: str, *, normalises: bool) -> str | None:
    """What Keras calls an array of a module; None where neither convolution nor Dense nor BatchNorm has one."""
    return LEAVES.get(leaf) or {
        ("weight", True): "gamma",
        ("bias", True): "beta",
        ("weight", False): "kernel",
        ("bias", False): "bias",
    }.get((leaf, normalises))


def _by_module(state: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    stored: dict[str, dict[str, np.ndarray]] = {}
    for key, array in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf != "num_batches_tracked":
            stored.setdefault(module, {})[leaf] = array
    return stored


def _without_prefix(state: Mapping[str, np.ndarray], modules: Mapping[str, str]) -> Mapping[str, np.ndarray]:
    for prefix in PREFIXES:
        if not any(module.startswith(prefix) for module in modules) and all(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): array for key, array in state.items()}
    return state


def _keras_arrays(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a module by Keras' names, in Keras' layout; those it has no name for by their own."""
    normalises = "running_mean" in leaves
    return {_variable(leaf, normalises=normalises) or leaf: _keras_layout(array) for leaf, array in leaves.items()}


def _compared(
    layer: Any, module: str, wanted: Mapping[str, Any], found: Mapping[str, np.ndarray] | None
) -> LayerReport:
    if found is None:
        detail = f"no {module!r} in the file" if module else ""
        return LayerReport(layer.name, "missing", layer.count_params(), detail)
    here = {name: tuple(weight.shape) for name, weight in wanted.items()}
    there = {name: array.shape for name, array in found.items()}
    if here == there:
        return LayerReport(layer.name, "matched", layer.count_params(), f"from {module}")
    names = [name for name in {**there, **here} if here.get(name) != there.get(name)]
    sides = (", ".join(f"{name} {side[name]}" for name in names if name in side) or "nothing" for side in (there, here))
    detail = "{} in the file; {} in the model".format(*sides)
    return LayerReport(layer.name, "differs", layer.count_params(), detail)


def _keras_layout(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:  # Dense: (out, in)
        return np.ascontiguousarray(array.T)
    if array.ndim == 4 and array.shape[1] == 1:  # depthwise: (channels, 1, height, width)
        return np.ascontiguousarray(array.transpose(2, 3, 0, 1))
    if array.ndim == 4:  # convolution: (out, in, height, width)
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return array
