"""One training step, compiled once: gradients by micro-batches, checked for NaN, on one device or several."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfxfer.features.activations import Crossing
from tfxfer.methods.fine_tune import make_optimizer
from tfxfer.methods.mixed_precision import LossScale, computing_in
from tfxfer.specs import Stage
from tfxfer.train.batches import Batch
from tfxfer.train.forgetting import LossTerms
from tfxfer.train.replicas import replica_numbers

NUM_SUMS = 5  # loss, images, weighted hits, weighted log loss, weights


class Share(NamedTuple):
    """What one replica gets of a batch; as in `Batch`."""

    activations: Crossing
    targets: np.ndarray
    weights: np.ndarray
    recorded: np.ndarray


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step saw, before it changed the weights.

    Attributes:
        sums: (5,) float64 over the batch: loss, images, weighted hits, weighted log loss, weights.
        finite: Whether loss and gradients were numbers; otherwise no gradient was applied. BatchNorm that trains has
            seen the batch all the same. On several devices the optimizer took a step of zero, which moves its counters
            and decays weights; they stay numbers.
    """

    sums: np.ndarray
    finite: bool


class TrainingStep:
    """Computes loss and gradients of a model that gives logits, and lets the optimizer change its weights.

    The loss of a batch is what Keras' `fit` takes: the weighted cross-entropy summed over the images, divided by their
    number, and the model's own losses (regularisers).

    Args:
        model: Activations, one tensor or a tuple, to logits, which may be the first of several outputs;
            built. Its `trainable` flags stay as they are from now on.
        optimizer: Without clipping of its own.
        smoothing: Of labels, in [0, 1).
        clip_norm: The gradient is scaled down to this norm, that of the whole batch; None: never.
        micro_batches: A batch is computed in so many parts, one after the other, which takes as much less memory;
            the gradient is that of the whole batch where no layer looks across images, as BatchNorm in training does.
        strategy: Where it runs, in whose scope model and optimizer were made; each replica takes its share of the
            batch.
        regularizer: What is added to the loss; the model is of its `attach`.
        precision: What layers compute in: "float32", "bfloat16", or "float16", with a scaled loss.

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
        regularizer: LossTerms | None = None,
        precision: str = "float32",
    ):
        self.precision = precision
        self.model, self.optimizer = model, optimizer
        self.smoothing, self.clip_norm, self.micro_batches = smoothing, clip_norm, micro_batches
        self.regularizer = regularizer
        self.strategy = strategy or tf.distribute.get_strategy()
        self.num_replicas = self.strategy.num_replicas_in_sync
        self.numbers = replica_numbers(self.strategy) if self.num_replicas > 1 else [0]
        with self.strategy.scope():
            optimizer.build(model.trainable_variables)
            self.loss_scale = LossScale() if precision == "float16" else None
        self._summed_again = self.num_replicas
        if hasattr(optimizer, "_all_reduce_sum_gradients"):  # of gradients that are summed already by then
            optimizer._all_reduce_sum_gradients = list
            self._summed_again = 1
        classes = model.outputs[0].shape[-1]
        share = (
            tf.nest.map_structure(lambda tensor: tf.TensorSpec((None, *tensor.shape[1:]), "float32"), _input_of(model)),
            tf.TensorSpec((None, classes), "float32"),
            tf.TensorSpec((None,), "float32"),
            tf.TensorSpec((None, regularizer.num_recorded if regularizer else 0), "float32"),
        )
        count = tf.TensorSpec((), "float32")
        if self.num_replicas == 1:
            self._run = tf.function(self._step, input_signature=(*share, count), reduce_retracing=True)
        else:
            self._run = tf.function(self._everywhere, input_signature=((share,) * len(self.numbers), count))

    def __call__(self, batch: Batch) -> StepResult:
        """Train on one batch; of several workers each gives the whole of it, and takes its shares."""
        shares = shares_of(batch, self.num_replicas)
        return self.on_shares([shares[number] for number in self.numbers], len(batch.rows))

    def on_shares(self, shares: Sequence[Share], count: int) -> StepResult:
        """Train on the shares of this process' devices.

        Args:
            shares: One for each device here.
            count: Images in all shares, those of other workers included.
        """
        given = [tf.nest.map_structure(lambda values: tf.constant(values, tf.float32), tuple(part)) for part in shares]
        values = self._run(*(given[0] if self.num_replicas == 1 else (tuple(given),)), np.float32(count)).numpy()
        values = values.astype(np.float64)
        return StepResult(values[:NUM_SUMS], bool(values[NUM_SUMS]))

    @property
    def variables(self) -> list[Any]:
        """What a step remembers beside the model."""
        own = [] if self.loss_scale is None else [self.loss_scale.value, self.loss_scale.good_steps]
        return [*self.optimizer.variables, *own]

    def push(self) -> None:
        """Take over that the model's variables were set; here they are those that train."""

    def check(self) -> None:
        """Make sure that all copies of the model are alike; here there is one."""

    def _everywhere(self, shares, count):
        def of_replica():
            number = int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))
            activations, targets, weights, recorded = shares[self.numbers.index(number)]
            return self._step(activations, targets, weights, recorded, count)

        return self.strategy.experimental_local_results(self.strategy.run(of_replica))[0]

    def _step(self, activations, targets, weights, recorded, count):
        sums, gradients = self._gradients(activations, targets, weights, recorded, count)
        context = tf.distribute.get_replica_context()
        if self.num_replicas > 1:
            sums, *gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, [sums, *gradients])
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(norm) & tf.math.is_finite(sums[0])
        told = finite
        if self.loss_scale is not None:  # gradients that are too large for float16 cost a step, not the training
            told |= tf.math.is_finite(sums[0]) & (self.loss_scale.value > 1)
            self.loss_scale.update(finite)
        scale = 1.0 if self.clip_norm is None else self.clip_norm / tf.maximum(norm, self.clip_norm)
        gradients = [gradient * (scale / self._summed_again) for gradient in gradients]
        if self.num_replicas > 1:  # a merge across replicas may not stand in a condition
            gradients = [tf.where(finite, gradient, 0.0) for gradient in gradients]
            self.optimizer.apply(gradients)
        else:
            tf.cond(finite, lambda: self._apply(gradients), lambda: False)
        return tf.concat([sums, [tf.cast(told, tf.float32)]], 0)

    def _apply(self, gradients):
        self.optimizer.apply(gradients)
        return True

    def _gradients(self, activations, targets, weights, recorded, count):
        """Sums over this replica's images, and its part of the gradient of the batch's loss."""
        if self.micro_batches == 1:
            return self._of_part(activations, targets, weights, recorded, count, 1.0)
        variables = self.model.trainable_variables
        sums = tf.zeros(NUM_SUMS)
        gradients = [tf.zeros(variable.shape) for variable in variables]
        count_here = tf.shape(targets)[0]
        parts = tf.minimum(self.micro_batches, count_here)
        for part in range(self.micro_batches):
            # Of fewer images than parts the last ones are an image that is there already, with weight zero.
            used = tf.cast(part < parts, tf.float32)
            first = tf.minimum(part * count_here // parts, count_here - 1)
            rows = slice(first, tf.clip_by_value((part + 1) * count_here // parts, first + 1, count_here))
            picked = tf.nest.map_structure(lambda values, rows=rows: values[rows], activations)
            share = used / tf.cast(parts, tf.float32)
            found, more = self._of_part(picked, targets[rows], weights[rows] * used, recorded[rows], count, share)
            sums += found
            gradients = [old + new for old, new in zip(gradients, more, strict=True)]
            with tf.control_dependencies(gradients):  # one part after the other, or no memory is saved
                activations = tf.nest.map_structure(tf.identity, activations)
        return sums, gradients

    def _of_part(self, activations, targets, weights, recorded, count, share):
        variables = [variable.value for variable in self.model.trainable_variables]
        scale = 1.0 if self.loss_scale is None else tf.identity(self.loss_scale.value)
        with tf.GradientTape() as tape:
            with computing_in(self.model, self.precision):
                outputs = self.model(activations, training=True)
            logits, *others = (tf.cast(output, tf.float32) for output in tf.nest.flatten(outputs))
            smooth = targets * (1.0 - self.smoothing) + self.smoothing / targets.shape[-1]
            each = tf.nn.softmax_cross_entropy_with_logits(smooth, logits)
            own = tf.add_n(self.model.losses) if self.model.losses else tf.constant(0.0)
            if self.regularizer is not None:
                each += self.regularizer.of_images(others, recorded)
                own += self.regularizer.of_weights()
            each *= weights
            loss = tf.reduce_sum(each) / count + own * share / self.num_replicas
            scaled = loss * scale
        gradients = tape.gradient(scaled, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        gradients = [tf.convert_to_tensor(gradient) / scale for gradient in gradients]
        hits = tf.cast(tf.argmax(targets, -1) == tf.argmax(logits, -1), tf.float32)
        plain = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
        images = count * share / self.num_replicas
        sums = [loss * count, images, tf.reduce_sum(hits * weights), tf.reduce_sum(plain * weights)]
        return tf.stack([*sums, tf.reduce_sum(weights)]), gradients


def make_step(
    model: keras.Model,
    stage: Stage,
    factors: Mapping[str, float] | None = None,
    strategy: tf.distribute.Strategy | None = None,
    regularizer: LossTerms | None = None,
    precision: str = "float32",
) -> TrainingStep:
    """The step of a stage.

    Args:
        model: As `TrainingStep` takes it.
        stage: Solver, smoothing, clipping, parts.
        factors: Of the learning rate, by layer; see `blockwise_factors`.
        strategy: In whose scope the model was made.
        regularizer: What is added to the loss.
        precision: What layers compute in.
    """
    with (strategy or tf.distribute.get_strategy()).scope():
        optimizer = make_optimizer(stage, factors)
    return TrainingStep(
        model, optimizer,
        smoothing=stage.label_smoothing, clip_norm=stage.clip_norm or None, micro_batches=stage.micro_batches,
        strategy=strategy, regularizer=regularizer, precision=precision,
    )  # fmt: skip


def shares_of(batch: Batch, count: int) -> list[Share]:
    """A batch in so many parts, none empty, in sizes that differ by one image at most.

    Of a batch with fewer images than parts some come again, with weight zero.
    """
    if count == 1:
        return [Share(batch.activations, batch.targets, batch.weights, _recorded(batch))]
    size = len(batch.rows)
    rows = np.resize(np.arange(size), max(size, count))
    weights = np.where(np.arange(len(rows)) < size, batch.weights[rows], np.float32(0))
    found, recorded = [], _recorded(batch)
    for picked in np.array_split(np.arange(len(rows)), count):
        activations = tf.nest.map_structure(lambda values, at=rows[picked]: values[at], batch.activations)
        found.append(Share(activations, batch.targets[rows[picked]], weights[picked], recorded[rows[picked]]))
    return found


def _input_of(model: keras.Model):
    """The symbolic input, or the tuple of them."""
    return model.inputs[0] if len(model.inputs) == 1 else tuple(model.inputs)


def _recorded(batch: Batch) -> np.ndarray:
    return np.zeros((len(batch.rows), 0), np.float32) if batch.recorded is None else batch.recorded
