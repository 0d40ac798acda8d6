"""Freezing by blocks, the states of BatchNorm, and the audit that frozen means bit-identical."""

import hashlib

import keras
import numpy as np

from tfxfer.errors import CheckError, InputError, did_you_mean
from tfxfer.model.blocks import backbone_of, list_blocks, resolve_depth
from tfxfer.specs import BATCH_NORM_STATES


def freeze(model: keras.Model, depth: int | str = "all", *, batch_norm: str = "affine") -> keras.Model:
    """Freeze the leading blocks of a model and train the rest. Sets the state: calling it again starts over.

    Args:
        model: Of `build_model` (its head always trains), or a backbone. Changed in place; compile afterwards.
        depth: Number of leading blocks frozen, a block's name (inclusive), or "all".
        batch_norm: What BatchNorm does in the blocks that train:
            "frozen": nothing moves.
            "affine": gamma and beta train, the statistics stay.
            "adapt": the statistics are estimated anew, once, by `adapt_batch_norm`; gamma and beta stay.
            "train": both move.
            In frozen blocks nothing moves, ever.
            Call `freeze` again after loading a saved model: Keras keeps the flags of layers, not those of single
            variables, so "affine" comes back as "frozen".

    Returns:
        The model.

    Raises:
        InputError: Where `depth` matches no block or is out of range, or `batch_norm` is unknown.

    Example:
        >>> import keras
        >>> layers = [keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")]
        >>> net = keras.Sequential([keras.Input((4,)), *layers])
        >>> [layer.name for layer in freeze(net, "a").layers if layer.trainable]
        ['b']
    """
    if batch_norm not in BATCH_NORM_STATES:
        raise InputError(f"Unknown batch_norm {batch_norm!r}. {did_you_mean(batch_norm, BATCH_NORM_STATES)}")
    backbone = backbone_of(model)
    blocks = list_blocks(backbone)
    count = resolve_depth(blocks, depth)
    model.trainable = True
    backbone.trainable = True
    for index, block in enumerate(blocks):
        for name in block.layers:
            layer = backbone.get_layer(name)
            trains = index >= count
            if not isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = trains
                continue
            # A BatchNorm layer that is not trainable runs in inference mode, whatever the training argument says; its
            # gamma and beta are trainable where their own flag says so. Passing training=False to the backbone's
            # call would not do: inside `fit` Keras 3 overrides it.
            layer.trainable = trains and batch_norm == "train"
            for variable in (layer.gamma, layer.beta):  # each time: setting a layer's flag to what it was is no news
                if variable is not None:
                    variable.trainable = trains and batch_norm in ("affine", "train")
    return model


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

    Reference:
        Li, Wang, Shi, Liu, Hou. Revisiting Batch Normalization For Practical Domain Adaptation. ICLR workshop 2017.
    """
    backbone = backbone_of(model)
    blocks = list_blocks(backbone)
    trained = [
        block for block in blocks if any(v.trainable for n in block.layers for v in backbone.get_layer(n).variables)
    ]
    layers = [backbone.get_layer(name) for block in trained for name in block.layers]
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
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
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            moving |= {id(v) for v in layer.non_trainable_variables}
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
