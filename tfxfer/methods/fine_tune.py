"""Parameter transfer: what the unfrozen suffix of a model is trained with, and the blend with where it began."""

from collections.abc import Mapping

import keras
import numpy as np

from tfxfer.methods.optimizers import BlockwiseAdamW
from tfxfer.specs import Stage

NO_DECAY = ("bias", "gamma", "beta")


def make_optimizer(stage: Stage, factors: Mapping[str, float] | None = None) -> keras.optimizers.Optimizer:
    """AdamW, or SGD with momentum 0.9, with decoupled weight decay of kernels only.

    Args:
        stage: Solver and weight decay, which is none beside "l2_sp".
        factors: Of AdamW's learning rate, by layer, as `blockwise_factors` gives them; None: one rate for all.

    Reference:
        Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019.
    """
    decay = 0.0 if stage.regularizer == "l2_sp" and stage.strength else stage.weight_decay
    if factors is not None:
        return BlockwiseAdamW(1e-3, factors=factors, no_decay=NO_DECAY, weight_decay=decay)
    if stage.solver == "sgd":
        optimizer = keras.optimizers.SGD(1e-3, momentum=0.9, weight_decay=decay or None)
    else:
        optimizer = keras.optimizers.AdamW(1e-3, weight_decay=decay)
    optimizer.exclude_from_weight_decay(var_names=list(NO_DECAY))
    return optimizer


def interpolate(first: list[np.ndarray], second: list[np.ndarray], share: float) -> list[np.ndarray]:
    """`(1 - share) * first + share * second`, weight by weight.

    Args:
        first: Weights of the start, such as the probe.
        second: Weights of the fine-tuned model.
        share: In [0, 1].

    Reference:
        Wortsman et al. Robust fine-tuning of zero-shot models (WiSE-FT). CVPR 2022.
    """
    return [((1 - share) * a + share * b).astype(a.dtype) for a, b in zip(first, second, strict=True)]
