"""Freezing by blocks, the states of BatchNorm, and the audit that frozen means bit-identical."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np

from tfxfer.data.values import refuse_unit_range
from tfxfer.errors import CheckError, InputError, did_you_mean
from tfxfer.model.blocks import backbone_of, list_blocks, program_of, resolve_depth
from tfxfer.specs import BATCH_NORM_STATES, PARAMETERS, pattern_of

AFFINE = ("bias", "biases", "gamma", "beta", "scale", "offset")  # as Keras and the programs of TF Hub name them

Depth = int | float | str | re.Pattern | Callable[[keras.layers.Layer], bool]


def freeze(
    model: keras.Model, depth: Depth = "all", *, batch_norm: str = "affine", parameters: str = "all"
) -> keras.Model:
    """Freeze blocks or layers of a model and train the rest. Sets the state: calling it again starts over.

    Args:
        model: Of `build_model` (its head always trains), or a backbone. Changed in place; compile afterwards. A copy of
            it, or the source model it was made from, has flags of its own: freeze what you train.
        depth: What is frozen. Leading blocks: their number, a share of them strictly between 0 and 1, the name of the
            last one, or "all". Or any layers, gaps allowed: a compiled regular expression (or "re:PATTERN") searched in
            the names of blocks and layers, or a function of a layer.
        batch_norm: What BatchNorm does where it is not frozen:
            "frozen": nothing moves.
            "affine": gamma and beta train, the statistics stay.
            "adapt": the statistics are estimated anew, once, by `adapt_batch_norm`; gamma and beta stay.
            "train": both move.
            In frozen blocks nothing moves, ever.
        parameters: What trains where it is not frozen: "all", or "affine", of each layer its bias, and the gamma and
            beta of normalisations (those of BatchNorm as `batch_norm` has it): `freeze(model, 0, parameters="affine")`
            is tuning by those alone.

            Call `freeze` again after loading a saved model: Keras keeps the flags of layers, not those of single
            variables, so an "affine" BatchNorm comes back as "frozen", and kernels that `parameters` held still come
            back trainable; and a frozen SpectralNormalization, which by itself assigns its kernel anew in each training
            step, is held still by `freeze` alone.

    Returns:
        The model.

    Raises:
        InputError: Where `depth` matches nothing or is out of range, `batch_norm` or `parameters` is unknown, or
            "affine" parameters are asked for where there are none.

    Example:
        >>> import keras
        >>> layers = [keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")]
        >>> net = keras.Sequential([keras.Input((4,)), *layers])
        >>> [layer.name for layer in freeze(net, "a").layers if layer.trainable]
        ['b']
        >>> [layer.name for layer in freeze(net, re.compile("b")).layers if layer.trainable]
        ['a']
        >>> [variable.path[-6:] for variable in freeze(net, 0, parameters="affine").trainable_variables]
        ['a/bias', 'b/bias']

    Reference:
        Zaken, Goldberg, Ravfogel. BitFit. ACL 2022. Frankle, Schwab, Morcos. Training BatchNorm and Only BatchNorm.
        ICLR 2021.
    """
    if parameters not in PARAMETERS:
        raise InputError(f"Unknown parameters {parameters!r}. {did_you_mean(parameters, PARAMETERS)}")
    if batch_norm not in BATCH_NORM_STATES:
        raise InputError(f"Unknown batch_norm {batch_norm!r}. {did_you_mean(batch_norm, BATCH_NORM_STATES)}")
    backbone = backbone_of(model)
    frozen = frozen_units(backbone, depth)
    model.trainable = True
    backbone.trainable = True
    backbone.frozen_units = frozen  # for `adapt_batch_norm`: flags alone do not tell frozen from waiting
    holder = program_of(backbone)
    if holder is not None:
        holder.freeze_blocks(frozen, batch_norm=batch_norm)
        if parameters == "affine":
            _hold_kernels(v for group in holder.variable_blocks.values() for v in group)
            _refuse_nothing(backbone, frozen)
        return model
    for name, layer in units_of(backbone):
        trains = name not in frozen
        layer.trainable = False  # setting a flag to what it was is no news, to variables that were held by themselves
        layer.trainable = trains
        hold_spectral_norms(layer, not trains)
        if parameters == "affine":
            _hold_kernels(layer.trainable_variables)
        for norm in _norms(layer):
            # A BatchNorm layer that is not trainable runs in inference mode, whatever the training argument says; its
            # gamma and beta are trainable where their own flag says so. Passing training=False to the backbone's
            # call would not do: inside `fit` Keras 3 overrides it.
            norm.trainable = trains and batch_norm == "train"
            for variable in (norm.gamma, norm.beta):  # each time: setting a layer's flag to what it was is no news
                if variable is not None:
                    variable.trainable = trains and batch_norm in ("affine", "train")
    if parameters == "affine":
        _refuse_nothing(backbone, frozen)
    return model


def _refuse_nothing(backbone: keras.Model, frozen: frozenset[str]) -> None:
    if not backbone.trainable_variables and any(unit.weights and unit.name not in frozen for unit in _units(backbone)):
        raise InputError(
            f"No variable of {backbone.name!r} that is not frozen is a bias, gamma or beta by its name, so "
            "parameters='affine' would train nothing of it; give 'all', or batch_norm='affine'."
        )


def _hold_kernels(variables: Iterable[keras.Variable]) -> None:
    """All but vectors that are added or multiplied to each channel: in Keras' layers, and by name in programs."""
    for variable in variables:
        if re.split("[/.]", variable.path)[-1] not in AFFINE:  # dots part the names in programs
            variable.trainable = False


def hold_spectral_norms(layer: keras.layers.Layer, held: bool) -> None:
    """SpectralNormalization assigns its kernel anew in each training step, trainable or not: let it assign the same."""
    for norm in layer._flatten_layers():
        if isinstance(norm, keras.layers.SpectralNormalization):
            if held:
                norm.normalized_weights = lambda norm=norm: (norm.vector_u.value, norm.kernel.value)
            else:
                vars(norm).pop("normalized_weights", None)


def units_of(backbone: keras.Model, prefix: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """What can be frozen by itself: the layers, those of nested models by "model/layer"; names and layers in order."""
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        if isinstance(layer, keras.Model):
            yield from units_of(layer, f"{prefix}{layer.name}/")
        else:
            yield f"{prefix}{layer.name}", layer


class _Unit(NamedTuple):
    """What can be frozen by itself: a layer, or a block of a loaded program (then `layer` is the program's)."""

    name: str
    block: str
    layer: keras.layers.Layer
    weights: Sequence[keras.Variable]


def _units(backbone: keras.Model) -> list[_Unit]:
    holder = program_of(backbone)
    if holder is not None:
        return [_Unit(name, name, holder, variables) for name, variables in holder.variable_blocks.items()]
    block_of = {layer: block.name for block in list_blocks(backbone) for layer in block.layers}
    return [_Unit(name, block_of[name.partition("/")[0]], layer, layer.weights) for name, layer in units_of(backbone)]


def frozen_units(model: keras.Model, depth: Depth) -> frozenset[str]:
    """The names of what `freeze(model, depth)` freezes: units of `units_of`, or blocks of a loaded program.

    Raises:
        InputError: Where `depth` matches nothing or is out of range.
    """
    backbone = backbone_of(model)
    units = _units(backbone)
    pattern = pattern_of(depth)
    if pattern is not None:
        found = frozenset(unit.name for unit in units if pattern.search(unit.name) or pattern.search(unit.block))
    elif callable(depth):
        if program_of(backbone) is not None:
            raise InputError(
                "A loaded program has no layers to ask a function about; freeze its blocks by number or name."
            )
        found = frozenset(unit.name for unit in units if depth(unit.layer))
    else:
        assert not isinstance(depth, re.Pattern)
        blocks = list_blocks(backbone)
        leading = {block.name for block in blocks[: resolve_depth(blocks, depth)]}
        return frozenset(unit.name for unit in units if unit.block in leading)
    if not found:
        what = "The function" if pattern is None else f"The pattern {pattern.pattern!r}"
        raise InputError(f"{what} matches no layer of {backbone.name!r}; list_blocks and `--dry-run` show their names.")
    return found


@dataclasses.dataclass(frozen=True)
class LayerState:
    """A layer, or a block of a loaded program, as it is frozen now.

    Attributes:
        layer: Its name; inside a nested model "model/layer".
        block: The block it belongs to.
        num_parameters: Numbers in all its weights.
        num_trainable: Those that training moves, BatchNorm statistics included where they move.
    """

    layer: str
    block: str
    num_parameters: int
    num_trainable: int


def list_layers(model: keras.Model) -> tuple[LayerState, ...]:
    """What of a model is frozen, layer by layer; layers without weights are left out.

    Args:
        model: Of `build_model`, a backbone, or any other model; what lies behind the backbone is block "head".

    Example:
        >>> import keras
        >>> layers = [keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")]
        >>> net = keras.Sequential([keras.Input((4,)), *layers])
        >>> [(state.layer, state.num_parameters, state.num_trainable) for state in list_layers(freeze(net, "a"))]
        [('a', 15, 0), ('b', 8, 8)]
    """
    backbone = backbone_of(model)
    still = set(frozen_variables(model))
    groups = [(unit.name, unit.block, unit.weights) for unit in _units(backbone)]
    if backbone is not model:
        moving = {id(variable) for variable in model.trainable_variables}
        outside = [layer for layer in model.layers if layer is not backbone]
        groups += [(layer.name, "head", layer.weights) for layer in outside]
        still |= {v.path for layer in outside for v in layer.weights if id(v) not in moving}
    return tuple(
        LayerState(name, block, _count(weights), _count([v for v in weights if v.path not in still]))
        for name, block, weights in groups
        if _count(weights)
    )


def _count(weights) -> int:
    return sum(int(np.prod(v.shape)) for v in weights if v.dtype.startswith(("float", "bfloat")))


def leading_blocks(model: keras.Model, depth: Depth) -> int:
    """How many leading blocks `freeze(model, depth)` freezes whole: what can be computed once."""
    backbone = backbone_of(model)
    frozen = frozen_units(backbone, depth)
    names = [block.name for block in list_blocks(backbone)]
    moving = {unit.block for unit in _units(backbone) if unit.weights and unit.name not in frozen}
    return next((index for index, name in enumerate(names) if name in moving), len(names))


def _norms(layer: keras.layers.Layer) -> list[keras.layers.BatchNormalization]:
    """BatchNorm in a layer, itself included, however deep."""
    return [part for part in layer._flatten_layers() if isinstance(part, keras.layers.BatchNormalization)]


def unfreeze(model: keras.Model, *, batch_norm: str = "affine") -> keras.Model:
    """Train every block: `freeze(model, 0)`."""
    return freeze(model, 0, batch_norm=batch_norm)


def adapt_batch_norm(model: keras.Model, images, *, batch_size: int = 64) -> keras.Model:
    """Estimate the statistics of BatchNorm in trained blocks anew, as averages over one pass of target images.

    Args:
        model: After `freeze(model, depth, batch_norm="adapt")`.
        images: (N, H, W, C) array of what the model takes.
        batch_size: Images a batch; the statistics are the mean of the batches' statistics.

    Returns:
        The model, in place; gamma, beta and all else stay.

    Raises:
        InputError: Where the images are floats in 0..1 and the model takes 0..255, or it is a loaded program.

    Reference:
        Li, Wang, Shi, Liu, Hou. Revisiting Batch Normalization For Practical Domain Adaptation. ICLR workshop 2017.
    """
    backbone = backbone_of(model)
    if any(layer.name == "adapt_image" for layer in model.layers):  # a whole model takes pixels, a suffix does not
        refuse_unit_range(images[start : start + batch_size] for start in range(0, len(images), batch_size))
    if program_of(backbone) is not None:
        raise InputError(
            "The statistics inside a loaded program cannot be estimated anew; use another batch_norm state."
        )
    units, frozen = _units(backbone), getattr(backbone, "frozen_units", None)
    if frozen is None:  # a loaded model: blocks in which nothing trains count as frozen
        moving = {id(variable) for variable in model.trainable_variables}
        trained = {unit.block for unit in units if any(id(v) in moving for v in unit.weights)}
        frozen = {unit.name for unit in units if unit.block not in trained}
    norms = [norm for unit in units if unit.name not in frozen for norm in _norms(unit.layer)]
    kept = [(layer.momentum, layer.trainable) for layer in norms]
    try:
        for layer in norms:
            layer.trainable = True  # only then does training=True use the batch
        for step, start in enumerate(range(0, len(images), batch_size)):
            for layer in norms:
                layer.momentum = step / (step + 1)  # a running mean of all batches
            model(images[start : start + batch_size], training=True)
    finally:
        for layer, (momentum, trainable) in zip(norms, kept, strict=True):
            layer.momentum, layer.trainable = momentum, trainable
    return model


def frozen_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """The variables that training must not move in the model's present state, by path."""
    backbone = backbone_of(model)
    moving = {id(v) for v in model.trainable_variables}
    for layer in _norms(backbone):
        if layer.trainable:
            moving |= {id(v) for v in layer.non_trainable_variables}
    holder = program_of(backbone)
    if holder is not None and holder.moves_statistics:
        moving |= {id(v) for v in holder.variables}
    return {v.path: v for v in backbone.weights if id(v) not in moving}


def digest_frozen(model: keras.Model) -> dict[str, str]:
    """The SHA-256 of each frozen variable's bytes; taken before training for `audit_frozen` after it."""
    return {path: _digest(variable) for path, variable in frozen_variables(model).items()}


def digest_backbone(model: keras.Model) -> dict[str, str]:
    """As `digest_frozen`, of every variable of the backbone: what must hold where only the head was trained."""
    return {v.path: _digest(v) for v in backbone_of(model).weights}


def audit_frozen(model: keras.Model, before: dict[str, str]) -> dict:
    """Prove that what was frozen is bit-identical to what it was.

    Args:
        model: The trained model.
        before: Of `digest_frozen`, taken before training.

    Returns:
        `bit_identical` (True), `num_variables`, `num_parameters`, `sha256` over all digests.

    Raises:
        CheckError: Where a frozen variable has moved; names the first.
    """
    variables = {v.path: v for v in backbone_of(model).weights}
    moved = [path for path, digest in before.items() if _digest(variables[path]) != digest]
    if moved:
        raise CheckError(
            f"The freeze audit failed: {len(moved)} of {len(before)} frozen variables changed during training, "
            f"the first is {moved[0]}."
        )
    joined = "".join(f"{path}\0{digest}\n" for path, digest in sorted(before.items()))
    return {
        "bit_identical": True,
        "num_variables": len(before),
        "num_parameters": int(sum(np.prod(variables[path].shape) for path in before)),
        "sha256": hashlib.sha256(joined.encode()).hexdigest(),
    }


def _digest(variable) -> str:
    return hashlib.sha256(np.ascontiguousarray(variable.numpy()).tobytes()).hexdigest()
