"""Mixed precision of a training step: weights and losses in float32, layers in 16 bits while the step is traced.

Reference:
    Micikevicius et al. Mixed Precision Training. ICLR 2018. Kalamkar et al. A Study of BFLOAT16 for Deep Learning
    Training. 2019.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf


def reduced_precision(capabilities: list[str] | None = None, cpu_flags: str | None = None) -> str | None:
    """The 16-bit type that this machine's device has units for; None where it has none.

    Args:
        capabilities: Compute capabilities of the GPUs, such as "8.0"; by default those that TensorFlow finds.
        cpu_flags: What a CPU says of itself; by default /proc/cpuinfo.

    Example:
        >>> reduced_precision(["8.0"]), reduced_precision(["7.5"]), reduced_precision(["6.1"])
        ('bfloat16', 'float16', None)
        >>> reduced_precision([], "avx2 avx512_bf16 amx_bf16"), reduced_precision([], "avx2")
        ('bfloat16', None)
    """
    if capabilities is None:
        capabilities = _capabilities()
    if capabilities:
        oldest = min(float(capability) for capability in capabilities)
        return "bfloat16" if oldest >= 8 else "float16" if oldest >= 7 else None
    if cpu_flags is None:
        path = Path("/proc/cpuinfo")
        cpu_flags = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return "bfloat16" if "amx_bf16" in cpu_flags else None


@contextlib.contextmanager
def computing_in(model: keras.Model, precision: str) -> Iterator[None]:
    """While a step is traced, the layers compute in another precision; those that give the outputs stay float32.

    Example:
        >>> net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(2)])
        >>> with computing_in(net, "bfloat16"):
        ...     [layer.compute_dtype for layer in net.layers]
        ['bfloat16', 'float32']
        >>> [layer.compute_dtype for layer in net.layers]
        ['float32', 'float32']
    """
    if precision == "float32":
        yield
        return
    last = {id(output._keras_history.operation) for output in model.outputs}
    layers = [
        layer
        for layer in model._flatten_layers(include_self=False)
        if not isinstance(layer, keras.Model | keras.layers.InputLayer) and id(layer) not in last
    ]
    before = [layer.dtype_policy for layer in layers]
    try:
        for layer in layers:
            layer.dtype_policy = keras.DTypePolicy(f"mixed_{precision}")
        yield
    finally:
        for layer, policy in zip(layers, before, strict=True):
            layer.dtype_policy = policy


class LossScale:
    """The factor that keeps small gradients above float16's smallest number: halved where one overflows, and that step
    is left out; doubled after `GROW_AFTER` steps without.

    Example:
        >>> scale = LossScale()
        >>> scale.update(tf.constant(False))
        >>> float(scale.value) / LossScale.START
        0.5
    """

    START, MOST, GROW_AFTER = 2.0**15, 2.0**24, 2000

    def __init__(self) -> None:
        # Each replica sees the same, and changes its own copy alike.
        kept = {"trainable": False, "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA}
        self.value = tf.Variable(self.START, name="loss_scale", **kept)
        self.good_steps = tf.Variable(0, name="good_steps", **kept)

    def update(self, finite: tf.Tensor) -> None:
        """Take in whether the gradients of a step were numbers."""
        good = tf.where(finite, self.good_steps + 1, 0)
        grown = good >= self.GROW_AFTER
        up = tf.where(grown, tf.minimum(2 * self.value, self.MOST), self.value)
        self.value.assign(tf.where(finite, up, tf.maximum(self.value / 2, 1.0)))
        self.good_steps.assign(tf.where(grown, 0, good))


def _capabilities() -> list[str]:
    found: list[Any] = [
        tf.config.experimental.get_device_details(gpu).get("compute_capability")
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return [f"{capability[0]}.{capability[1]}" for capability in found if capability]
