"""AdamW with a learning rate of its own for each block, smaller the further a block is from the head."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import keras
import tensorflow as tf

from tfxfer.errors import InputError
from tfxfer.model.blocks import backbone_of, list_blocks, program_of


@keras.saving.register_keras_serializable(package="tfxfer")
class BlockwiseAdamW(keras.optimizers.AdamW):
    """AdamW that multiplies the learning rate of each variable, and so its weight decay, by the factor of its block.

    It is the update that is scaled. Scaling the gradient does nothing under Adam, which divides by its size again.
    Factors are found by names in a variable's path, which Keras keeps in saved models and under strategies.

    Args:
        learning_rate: A float, schedule or callable, as Keras takes it; that of factor 1.
        factors: Names to factors of at least 0. A name matches a variable where it stands as whole parts in its path:
            "conv" and "conv/kernel" match "conv/kernel" and "net/conv/kernel", not "conv_2/kernel". Of several that
            match, the one that begins first counts, of those the longest; "" matches what nothing else does.
        no_decay: Last parts of the paths of variables without weight decay, such as "bias". Unlike what
            `exclude_from_weight_decay` sets (it holds too), a saved model keeps them.
        **options: Of `keras.optimizers.AdamW`: weight_decay, clipping, EMA, accumulation.

    Raises:
        InputError: Where a factor is negative or no number; at the first step where a variable matches no name.

    Example:
        >>> optimizer = BlockwiseAdamW(1e-3, factors={"block_1": 0.25, "head": 1.0}, no_decay=["bias"])
        >>> optimizer.factor_of("net/block_1/conv/kernel"), optimizer.factor_of("block_10/kernel")
        (0.25, None)

    Reference:
        Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019.
        Clark, Luong, Le, Manning. ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators.
        ICLR 2020.
        Bao, Dong, Piao, Wei. BEiT: BERT Pre-Training of Image Transformers. ICLR 2022.
    """

    def __init__(self, learning_rate=1e-3, *, factors: Mapping[str, float], no_decay: Sequence[str] = (), **options):
        super().__init__(learning_rate, **options)
        for name, factor in factors.items():
            if not (isinstance(factor, int | float) and math.isfinite(factor) and factor >= 0):
                raise InputError(f"The factor of {name!r} must be a number of at least 0, not {factor!r}.")
        self.factors = {name: float(factor) for name, factor in factors.items()}
        self.no_decay = tuple(no_decay)

    def factor_of(self, path: str) -> float | None:
        """The factor of a variable's path; None where no name matches."""
        return _factor_of(path, self.factors)

    def build(self, var_list):
        if not self.built:
            paths = [getattr(variable, "path", variable.name) for variable in var_list]
            self._factor_at = tuple(self.factor_of(path) for path in paths)
            self._decays_at = tuple(re.split("[/.]", path)[-1] not in self.no_decay for path in paths)
        super().build(var_list)

    def update_step(self, gradient, variable, learning_rate):
        # A strategy hands over one replica's tf.Variable, which has no path: the index tells which it is.
        index = self._get_variable_index(variable)
        rate = keras.ops.cast(learning_rate, variable.dtype) * self._factor_at[index]
        if self.weight_decay and self._decays_at[index] and self._use_weight_decay(variable):
            self.assign_sub(variable, variable * keras.ops.cast(self.weight_decay, variable.dtype) * rate)
        super().update_step(gradient, variable, rate)

    def _clip_gradients(self, grads):
        """Clips the sum over replicas. Keras clips each replica's part of it, which under two is another training."""
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        clips = any((self.clipnorm, self.clipvalue, self.global_clipnorm))
        if num_replicas == 1 or not clips or tf.distribute.in_cross_replica_context():
            return super()._clip_gradients(grads)
        total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, list(grads))
        # Each replica now has the whole and Keras will sum once more.
        return [gradient / num_replicas for gradient in super()._clip_gradients(total)]

    def _apply_weight_decay(self, variables):
        """Called once before the updates; the decay itself is in `update_step`, which knows the rate."""
        for variable in variables:
            if self._factor_at[self._get_variable_index(variable)] is None:
                path = getattr(variable, "path", variable.name)
                raise InputError(f'No name in factors matches the variable {path!r}; add one, or "" for all others.')

    def get_config(self):
        return {**super().get_config(), "factors": dict(self.factors), "no_decay": list(self.no_decay)}


def blockwise_factors(model: keras.Model, decay: float) -> dict[str, float]:
    """Factors for `BlockwiseAdamW`: 1 for the head, `decay` for the last trained block, its square for the one before.

    So it is in BEiT: the head counts as the layer behind the last block. Frozen blocks do not count.

    Args:
        model: Of `build_model`, after `freeze`. The factors also serve the suffix of a cut model, whose variables are
            the same. Where no backbone is nested in a model, its last trained block is taken for the head.
        decay: In (0, 1]; BEiT fine-tunes with 0.65 and more.

    Returns:
        Names of trained layers to factors; paths of variables where a layer's name does not tell them.

    Raises:
        InputError: Where `decay` is out of range, or two variables of different blocks have the same path.

    Example:
        >>> layers = [keras.layers.Dense(2, name=name) for name in ("a", "b", "head")]
        >>> blockwise_factors(keras.Sequential([keras.Input((4,)), *layers]), 0.5)
        {'a': 0.25, 'b': 0.5, 'head': 1.0}

    Reference:
        Clark, Luong, Le, Manning. ELECTRA. ICLR 2020; Bao, Dong, Piao, Wei. BEiT. ICLR 2022.
    """
    if not 0 < decay <= 1:
        raise InputError(f"decay must lie in (0, 1], not {decay}.")
    moving = {id(variable) for variable in model.trainable_variables}
    groups = [[(name, v) for name, v in group if id(v) in moving] for group in _named_groups(model)]
    groups = [group for group in groups[:-1] if group] + groups[-1:]
    if not groups[-1]:
        groups.pop()
    factors: dict[str, float] = {}
    wanted: dict[str, float] = {}
    for index, group in enumerate(groups):
        factor = decay ** (len(groups) - 1 - index)
        for name, variable in group:
            factors.setdefault(name, factor)
            if wanted.setdefault(variable.path, factor) != factor:
                raise InputError(f"Variables of different blocks have the same path {variable.path!r}; rename a layer.")
    # A layer that another one of the same name contains, and variables whose paths lack their layer's name.
    factors |= {path: factor for path, factor in wanted.items() if _factor_of(path, factors) != factor}
    return factors


def _named_groups(model: keras.Model) -> Iterator[list[tuple[str, keras.Variable]]]:
    """(layer's name, variable) of each block from the input on; last those of the head, which may be none."""
    backbone = backbone_of(model)
    holder = program_of(backbone)
    if holder is not None:  # one layer, whose name would not tell the blocks apart
        yield from ([(v.path, v) for v in variables] for variables in holder.variable_blocks.values())
    else:
        for block in list_blocks(backbone):
            yield [(name, v) for name in block.layers for v in backbone.get_layer(name).weights]
    outside = [] if backbone is model else [layer for layer in model.layers if layer is not backbone]
    yield [(layer.name, v) for layer in outside for v in layer.weights]


def _factor_of(path: str, factors: Mapping[str, float]) -> float | None:
    parts = path.split("/")
    found = []
    for name in factors:
        named = name.split("/")
        starts = (at for at in range(len(parts)) if parts[at : at + len(named)] == named)
        found += [(-at, len(named), name) for at in starts]
    return factors[max(found)[2]] if found else factors.get("")
