"""Load a weights file into a network and say what became of every layer: nothing is matched in silence.

Keras' own loaders go wrong without a word: `by_name=True` takes the second convolution's weights for the first where
names were given out by counting, and `.weights.h5` goes into a network with fewer layers or other names.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import InputError
from tfxfer.sources.report import LayerReport, LoadReport, check_fit
from tfxfer.sources.safety import check_finite, check_h5, check_keras_archive
from tfxfer.sources.stored_weights import Stored, Unit, numbered_units, open_stored, variable_name

Setter = Callable[[Any, np.ndarray], None]


def load_weights_file(
    model: Any,
    path: str | Path,
    *,
    partial: bool = False,
    trusted: Sequence[str] = (),
    original_names: Mapping[str, str] | None = None,
) -> LoadReport:
    """Load the weights in a file into a model.

    Layers are matched by name, where a name was chosen: those that Keras gave ("conv2d_5") say only which of its
    class a layer is, so they are matched by that order. What is left is matched by order and shapes within its class,
    as far as that is not open to doubt, and reported as renamed. Names and shapes of variables must agree in any case.

    Args:
        model: A built keras.Model.
        path: .keras, .weights.h5, or the .h5 of a whole model or of weights.
        partial: Load what fits. A first convolution that fits but for its input channels is adapted, see
            `adapt_channels`.
        trusted: Modules of the user's own that the file's config may name.
        original_names: Path in the file of layers that are called otherwise in the model.

    Returns:
        What became of each layer with weights.

    Raises:
        InputError: Where the file is refused or missing, nothing fits, or not everything does and `partial` is not
            given; the model is as it was then.

    Example:
        >>> import keras
        >>> def network(width):
        ...     layers = [keras.layers.Dense(3, name="a"), keras.layers.Dense(width, name="out")]
        ...     return keras.Sequential([keras.Input((4,)), *layers])
        >>> file = Path(tempfile.mkdtemp()) / "trained.weights.h5"
        >>> network(5).save_weights(file)
        >>> load_weights_file(network(2), file, partial=True).names("matched", "differs")
        ('a', 'out')
    """
    if not model.built:
        raise InputError(f"The network {model.name!r} is not built: call it once, or begin it with keras.Input.")
    path = checked_file(path, trusted)
    original_names = original_names or {}
    leaves = [original_names.get(layer.name, layer.name).rpartition("/")[2] for _, layer in layers_with_weights(model)]
    with open_stored(path, leaves=leaves) as stored, _targets(model, stored, original_names) as (wanted, assign):
        pairs = _matched(wanted, stored, _automatic(model))
        report, jobs = _compare(str(path), wanted, stored.units, pairs, adapt=partial)
        check_fit(report, model.name, partial=partial)
        arrays = [(name, target, change(dataset[()])) for name, target, dataset, change in jobs]
        check_finite(((name, array) for name, _, array in arrays), f"The weights in {str(path)!r}")
        for _, target, array in arrays:
            assign(target, array)
    return report


def checked_file(path: str | Path, trusted: Sequence[str] = ()) -> Path:
    """The path of a Keras file that passed the gate.

    Raises:
        InputError: Where there is none, or it is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}; give a .keras, .weights.h5 or .h5 file.")
    if path.suffix.lower() not in (".keras", ".h5"):
        raise InputError(f"{path} is not a Keras file; its name must end in .keras, .weights.h5 or .h5.")
    (check_keras_archive if path.suffix.lower() == ".keras" else check_h5)(path, trusted=trusted)
    return path


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The kernel of a convolution for another number of input channels.

    Every new channel gets the mean over the old ones, scaled by old / new: where all channels show the same the
    convolution gives what it gave, so that activations keep their scale. For one channel (grey) that is the sum over
    the old channels.

    Args:
        kernel: (H, W, channels, filters).
        channels: Of the new input, at least 1.

    Example:
        >>> adapt_channels(np.arange(3.0).reshape(1, 1, 3, 1), 1).ravel()
        array([3.])
        >>> adapt_channels(np.ones((1, 1, 1, 1)), 4).ravel()
        array([0.25, 0.25, 0.25, 0.25])
    """
    old = kernel.shape[-2]
    if old == channels:
        return kernel
    mean = kernel.mean(axis=-2, keepdims=True, dtype=np.float64) * (old / channels)
    return np.repeat(mean, channels, axis=-2).astype(kernel.dtype)


@contextlib.contextmanager
def _targets(
    model: Any, stored: Stored, original_names: Mapping[str, str]
) -> Iterator[tuple[tuple[Unit, ...], Setter]]:
    """The model's layers in the layout of the file, and how a value is set."""
    if stored.legacy:
        yield _named_targets(model, original_names), lambda variable, array: variable.assign(array)
        return
    import h5py

    # Which variable has which number only Keras knows: it writes a file of the model, the numbers in it are
    # exchanged, and Keras reads it again.
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "model.weights.h5"
        model.save_weights(template)
        with h5py.File(template, "r+") as file:
            units = [_renamed(unit, original_names) for unit in numbered_units(file)]
            order = {path: number for number, (path, _) in enumerate(layers_with_weights(model, original_names))}
            units.sort(key=lambda unit: order.get(unit.path, len(order)))
            changed = False

            def assign(dataset: Any, array: np.ndarray) -> None:
                nonlocal changed
                changed = True
                dataset[...] = array

            yield tuple(units), assign
        if changed:
            model.load_weights(template)


def layers_with_weights(
    model: Any, original_names: Mapping[str, str] | None = None, prefix: str = ""
) -> Iterator[tuple]:
    """Path and layer of everything with weights that holds no layers of a network."""
    for layer in model.layers:
        if hasattr(layer, "layers") and hasattr(layer, "output_shape"):
            yield from layers_with_weights(layer, original_names, f"{prefix}{layer.name}/")
        elif layer.weights:
            path = f"{prefix}{layer.name}"
            yield (original_names or {}).get(path, path), layer


def _named_targets(model: Any, original_names: Mapping[str, str]) -> tuple[Unit, ...]:
    units = []
    for number, (path, layer) in enumerate(layers_with_weights(model, original_names)):
        entries = []
        for variable in [*layer.trainable_weights, *layer.non_trainable_weights]:
            if "seed_generator" in variable.path:
                continue
            parts = variable.path.split("/")
            start = max((index for index, part in enumerate(parts) if part == layer.name), default=len(parts) - 2) + 1
            entries.append((variable_name("/".join(parts[start:])), variable))
        units.append(Unit(path, " ".join(sorted(name for name, _ in entries)), tuple(entries), number))
    return tuple(unit for unit in units if unit.entries)


def _renamed(unit: Unit, original_names: Mapping[str, str]) -> Unit:
    return Unit(original_names.get(unit.path, unit.path), unit.kind, unit.entries, unit.number)


def _automatic(model: Any) -> frozenset[str]:
    """How Keras names layers of the classes in a model, "conv2d"."""
    return frozenset(_snake_case(type(layer).__name__) for _, layer in layers_with_weights(model))


def _snake_case(name: str) -> str:
    """
    Example:
        >>> _snake_case("DepthwiseConv2D"), _snake_case("BatchNormalization")
        ('depthwise_conv2d', 'batch_normalization')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _matched(wanted: Sequence[Unit], stored: Stored, automatic: frozenset[str]) -> dict[str, Unit]:
    """Path of the model's layer to the unit of the file."""
    pairs = _by_name(
        [unit for unit in wanted if not _counted(unit, automatic)],
        [unit for unit in stored.units if not _counted(unit, automatic)],
    )
    by_name = bool(pairs)
    here = _by_base([unit for unit in wanted if _counted(unit, automatic)], automatic)
    there = _by_base([unit for unit in stored.units if _counted(unit, automatic)], automatic)
    for base, units in here.items():
        # Counted names say how many were built before, not which layer it is: their order does.
        pairs |= {unit.path: other for unit, other in zip(units, there.get(base, []), strict=False)}
    taken = {id(unit) for unit in pairs.values()}
    left = [unit for unit in wanted if unit.path not in pairs]
    spare = [unit for unit in stored.units if id(unit) not in taken]
    found = _by_order(left, spare, doubtful=by_name)
    return pairs | _in_order(found, pairs, wanted, stored.units)


def _in_order(
    found: dict[str, Unit], pairs: dict[str, Unit], wanted: Sequence[Unit], units: Sequence[Unit]
) -> dict[str, Unit]:
    """Those pairs found by order that do not cross one found by name: what comes later here comes later there."""
    place = {id(unit): index for index, unit in enumerate(units)}
    fixed = [(index, place[id(pairs[unit.path])]) for index, unit in enumerate(wanted) if unit.path in pairs]
    return {
        unit.path: found[unit.path]
        for index, unit in enumerate(wanted)
        if unit.path in found and all((index < here) == (place[id(found[unit.path])] < there) for here, there in fixed)
    }


def _by_name(wanted: Sequence[Unit], units: Sequence[Unit]) -> dict[str, Unit]:
    """By path; else by the layer's own name, where it is there once on both sides."""
    paths = {unit.path: unit for unit in units}
    pairs = {unit.path: paths[unit.path] for unit in wanted if unit.path in paths}
    taken = {id(unit) for unit in pairs.values()}
    left = [unit for unit in wanted if unit.path not in pairs]
    spare = [unit for unit in units if id(unit) not in taken]
    for unit in left:
        found = [other for other in spare if other.name == unit.name]
        if len(found) == 1 and sum(other.name == unit.name for other in left) == 1:
            pairs[unit.path] = found[0]
    return pairs


def _counted(unit: Unit, automatic: frozenset[str]) -> bool:
    """Whether Keras gave the name, by class and number."""
    return re.sub(r"_\d+$", "", unit.name) in automatic


def _by_base(units: Sequence[Unit], automatic: frozenset[str]) -> dict[str, list[Unit]]:
    """Units by the class in their names, in the order in which they were made."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(re.sub(r"_\d+$", "", unit.name), []).append(unit)
    for base, group in found.items():
        group.sort(key=lambda unit: (int(unit.name[len(base) + 1 :] or 0), unit.number))
    return found


def _by_order(wanted: Sequence[Unit], units: Sequence[Unit], *, doubtful: bool) -> dict[str, Unit]:
    """By order among layers of one kind: from the first on while shapes agree, unless names matched others; then where
    a shape is there as often on both sides."""
    pairs: dict[str, Unit] = {}
    taken: set[int] = set()
    for kind in dict.fromkeys(unit.kind for unit in wanted):
        here = [unit for unit in wanted if unit.kind == kind]
        there = [unit for unit in units if unit.kind == kind]
        for unit, other in zip(here, there, strict=False):
            if doubtful or unit.shapes() != other.shapes():
                break
            pairs[unit.path] = other
            taken.add(id(other))
        here = [unit for unit in here if unit.path not in pairs]
        there = [unit for unit in there if id(unit) not in taken]
        for shapes in {str(unit.shapes()): unit.shapes() for unit in here}.values():
            mine, theirs = ([unit for unit in side if unit.shapes() == shapes] for side in (here, there))
            if len(mine) == len(theirs):
                pairs |= {unit.path: other for unit, other in zip(mine, theirs, strict=True)}
    return pairs


def _compare(
    path: str, wanted: Sequence[Unit], units: Sequence[Unit], pairs: Mapping[str, Unit], *, adapt: bool
) -> tuple[LoadReport, list[tuple[str, Any, Any, Callable]]]:
    """The report, and what is to be set: name, target, dataset, and how its value is changed."""
    layers, jobs = [], []
    first = next((unit for unit in wanted if any(len(shape) == 4 for shape in unit.shapes().values())), None)
    for unit in wanted:
        other = pairs.get(unit.path)
        if other is None:
            layers.append(LayerReport(unit.path, "missing", unit.num_parameters))
            continue
        channels = _other_channels(unit, other) if adapt and unit is first else None
        here, there = unit.shapes(), other.shapes()
        if here != there and channels is None:
            layers.append(LayerReport(unit.path, "differs", unit.num_parameters, _difference(there, here)))
            continue
        datasets = dict(other.entries)
        for name, target in unit.entries:
            given, needed = there[name], here[name]
            change = (lambda value, count=needed[-2]: adapt_channels(value, count)) if given != needed else np.asarray
            jobs.append((f"{unit.path}/{name}", target, datasets[name], change))
        details = [] if unit.name == other.name else [f"from {other.path}"]
        details += [f"{channels[0]} input channels made {channels[1]}"] if channels else []
        state = "matched" if unit.name == other.name else "renamed"
        layers.append(LayerReport(unit.path, state, unit.num_parameters, "; ".join(details)))
    used = {id(unit) for unit in pairs.values()}
    layers += [LayerReport(unit.path, "unused", unit.num_parameters) for unit in units if id(unit) not in used]
    return LoadReport(path, tuple(layers)), jobs


def _other_channels(unit: Unit, other: Unit) -> tuple[int, int] | None:
    """Input channels in the file and in the model, where a convolution differs in nothing else."""
    here, there = unit.shapes(), other.shapes()
    if here.keys() != there.keys():
        return None
    rows = [(there[name], here[name]) for name in here if there[name] != here[name]]
    if len(rows) != 1 or len(rows[0][0]) != 4 or len(rows[0][1]) != 4:
        return None
    (old, new) = rows[0]
    same = (*old[:2], old[3]) == (*new[:2], new[3])
    return (old[2], new[2]) if same and old[3] > 1 else None  # a depthwise kernel has 1 there


def _difference(given: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> str:
    """The first few variables that differ, "kernel (64, 10) in the file; kernel (64, 5) in the model"."""
    sides = []
    for one, other in ((given, wanted), (wanted, given)):
        rows = [f"{name} {shape}" for name, shape in one.items() if other.get(name) != shape]
        sides.append(", ".join(rows[:3]) or "nothing")
    return f"{sides[0]} in the file; {sides[1]} in the model"
