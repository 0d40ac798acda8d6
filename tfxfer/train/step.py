"""One training step, compiled once: gradients by micro-batches, checked for NaN, on one device or several."""

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfxfer.train.batches import Batch

NUM_SUMS = 5  # loss, images, weighted hits, weighted log loss, weights


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step saw, before it changed the weights.

    Attributes:
        sums: (5,) float64 over the batch: loss, images, weighted hits, weighted log loss, weights.
        finite: Whether loss and gradients were numbers; otherwise nothing was changed. On several devices the optimizer
            took a step of zero then, which moves its counters and decays weights; all stay numbers.
    """

    sums: np.ndarray
    finite: bool


class TrainingStep:
    """Computes loss and gradients of a model that gives logits, and lets the optimizer change its weights.

    The loss of a batch is what Keras' `fit` takes: the weighted cross-entropy summed over the images, divided by their
    number, and the model's own losses (regularisers).

    Args:
        model: Activations to logits; built. Its `trainable` flags stay as they are from now on.
        optimizer: Without clipping of its own.
        smoothing: Of labels, in [0, 1).
        clip_norm: The gradient is scaled down to this norm, that of the whole batch; None: never.
        micro_batches: A batch is computed in so many parts, one after the other, which takes as much less memory;
            the gradient is that of the whole batch where no layer looks across images, as BatchNorm in training does.
        strategy: Where it runs; each replica takes its share of the batch.

    Example:
        >>> net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        >>> step = TrainingStep(net, keras.optimizers.SGD(0.1))
        >>> x, y = np.eye(2, dtype="float32"), np.eye(2, dtype="float32")
        >>> step(Batch(np.arange(2), x, y, np.ones(2, "float32"))).finite
        True
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        smoothing: float = 0.0,
        clip_norm: float | None = 1.0,
        micro_batches: int = 1,
        strategy: tf.distribute.Strategy | None = None,
    ):
        self.model, self.optimizer = model, optimizer
        self.smoothing, self.clip_norm, self.micro_batches = smoothing, clip_norm, micro_batches
        self.strategy = strategy or tf.distribute.get_strategy()
        self.num_replicas = self.strategy.num_replicas_in_sync
        with self.strategy.scope():
            optimizer.build(model.trainable_variables)
        classes = model.output_shape[-1]
        signature = (
            tf.TensorSpec((None, *model.input_shape[1:]), "float32"),
            tf.TensorSpec((None, classes), "float32"),
            tf.TensorSpec((None,), "float32"),
            tf.TensorSpec((), "float32"),
        )
        if self.num_replicas == 1:
            self._run = tf.function(self._step, input_signature=signature, reduce_retracing=True)
        else:
            self._run = tf.function(self._everywhere, reduce_retracing=True)

    def __call__(self, batch: Batch) -> StepResult:
        """Train on one batch."""
        count = np.float32(len(batch.rows))
        if self.num_replicas == 1:
            found = self._run(tf.constant(batch.activations, tf.float32), batch.targets, batch.weights, count)
        else:
            whole = self._filled(batch)
            found = self._run(*map(self._shares, (whole.activations, whole.targets, whole.weights)), count)
        values = found.numpy().astype(np.float64)
        return StepResult(values[:NUM_SUMS], bool(values[NUM_SUMS]))

    def _filled(self, batch: Batch) -> Batch:
        """A batch of which each replica gets the same number of images: some come again, with weight zero."""
        lacking = -len(batch.rows) % self.num_replicas
        again = np.resize(np.arange(len(batch.rows)), lacking)
        weights = np.concatenate([batch.weights, np.zeros(lacking, batch.weights.dtype)])
        rows = np.concatenate([batch.rows, batch.rows[again]])
        activations = np.concatenate([batch.activations, batch.activations[again]])
        return Batch(rows, activations, np.concatenate([batch.targets, batch.targets[again]]), weights)

    def _shares(self, values: np.ndarray) -> Any:
        share = len(values) // self.num_replicas

        def of_replica(context):
            start = context.replica_id_in_sync_group * share
            return tf.constant(values[start : start + share], tf.float32)

        return self.strategy.experimental_distribute_values_from_function(of_replica)

    def _everywhere(self, activations, targets, weights, count):
        found = self.strategy.run(self._step, args=(activations, targets, weights, count))
        return self.strategy.reduce(tf.distribute.ReduceOp.MEAN, found, axis=None)

    def _step(self, activations, targets, weights, count):
        sums, gradients = self._gradients(activations, targets, weights, count)
        context = tf.distribute.get_replica_context()
        if self.num_replicas > 1:
            sums, *gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, [sums, *gradients])
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(norm) & tf.math.is_finite(sums[0])
        scale = 1.0 if self.clip_norm is None else self.clip_norm / tf.maximum(norm, self.clip_norm)
        # The optimizer sums over replicas what is the same on all of them by now.
        gradients = [gradient * (scale / self.num_replicas) for gradient in gradients]
        if self.num_replicas > 1:  # a merge across replicas may not stand in a condition
            gradients = [tf.where(finite, gradient, 0.0) for gradient in gradients]
            self.optimizer.apply(gradients)
        else:
            tf.cond(finite, lambda: self._apply(gradients), lambda: False)
        return tf.concat([sums, [tf.cast(finite, tf.float32)]], 0)

    def _apply(self, gradients):
        self.optimizer.apply(gradients)
        return True

    def _gradients(self, activations, targets, weights, count):
        """Sums over this replica's images, and its part of the gradient of the batch's loss."""
        if self.micro_batches == 1:
            return self._of_part(activations, targets, weights, count, 1.0)
        variables = self.model.trainable_variables
        sums = tf.zeros(NUM_SUMS)
        gradients = [tf.zeros(variable.shape) for variable in variables]
        size = -(-tf.shape(activations)[0] // self.micro_batches)
        for part in range(self.micro_batches):
            rows = slice(part * size, (part + 1) * size)
            found, more = self._of_part(
                activations[rows], targets[rows], weights[rows], count, 1.0 / self.micro_batches
            )
            sums += found
            gradients = [old + new for old, new in zip(gradients, more, strict=True)]
            with tf.control_dependencies(gradients):  # one part after the other, or no memory is saved
                activations = tf.identity(activations)
        return sums, gradients

    def _of_part(self, activations, targets, weights, count, share):
        variables = [variable.value for variable in self.model.trainable_variables]
        with tf.GradientTape() as tape:
            logits = tf.cast(self.model(activations, training=True), tf.float32)
            smooth = targets * (1.0 - self.smoothing) + self.smoothing / targets.shape[-1]
            each = tf.nn.softmax_cross_entropy_with_logits(smooth, logits) * weights
            own = tf.add_n(self.model.losses) if self.model.losses else tf.constant(0.0)
            loss = tf.reduce_sum(each) / count + own * share / self.num_replicas
        gradients = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        hits = tf.cast(tf.argmax(targets, -1) == tf.argmax(logits, -1), tf.float32)
        plain = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
        images = count * share / self.num_replicas
        sums = [loss * count, images, tf.reduce_sum(hits * weights), tf.reduce_sum(plain * weights)]
        return tf.stack([*sums, tf.reduce_sum(weights)]), gradients
