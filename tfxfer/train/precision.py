"""Whether a training gains by mixed precision, by measurement.

Weights, their averages, losses, scores and everything that is saved or exported stay float32; layers compute in 16 bits
only inside the compiled training step.
"""

import dataclasses
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tfxfer.errors import InputError
from tfxfer.methods.mixed_precision import reduced_precision
from tfxfer.model.blocks import backbone_of, program_of
from tfxfer.train.loop import SuffixTrainer

MIN_GAIN = 1.1  # times as fast, to be worth it
MAX_LOSS_DIFFERENCE = 0.02  # of the loss
TIMED_STEPS = 4  # behind the first, which compiles
WORTH_SECONDS = 60.0  # of training, or measuring would take longer than it can save


@dataclasses.dataclass(frozen=True)
class Precision:
    """What the steps are computed in.

    Attributes:
        used: "float32", "bfloat16" or "float16".
        why: For people and run.json.
        seconds_a_step: Measured, by precision.
        loss_difference: Mean over the batches measured, as a share of the loss; None where that was not measured.
    """

    used: str
    why: str
    seconds_a_step: dict[str, float] = dataclasses.field(default_factory=dict)
    loss_difference: float | None = None


def check_precision(asked: str, model: keras.Model) -> None:
    """Refuse what cannot be.

    Raises:
        InputError: Where float16 is asked for without a GPU, or a network computes as it was saved.
    """
    if asked == "float16" and not tf.config.list_physical_devices("GPU"):
        raise InputError(
            "Precision float16 is for GPUs, and TensorFlow finds none here: a CPU computes convolutions in it hundreds "
            "of times slower; give bfloat16, float32, or auto."
        )
    if asked in ("bfloat16", "float16") and _computes_as_saved(model):
        raise InputError(
            f"The source is a loaded program, which computes as it was saved, so precision {asked} would do nothing; "
            "drop it."
        )


def choose_precision(
    model: keras.Model,
    trainer: SuffixTrainer,
    other: Callable[[str], SuffixTrainer],
    rows: np.ndarray,
    num_steps: int,
    *,
    seed: int,
    too_dear: Callable[[int], str] = lambda num_steps: "",
) -> Precision:
    """Measure a few steps, where the device has 16-bit units and training is long enough for that to pay.

    Args:
        model: That is trained.
        trainer: In float32.
        other: Makes one that computes in another precision.
        rows: Images trained on.
        num_steps: Of the training to come.
        seed: Of shuffle, views and dropout.
        too_dear: Why there is no time for so many steps in each of two precisions; empty where there is.
    """
    reduced = reduced_precision()
    if reduced is None:
        return Precision("float32", "the device has no units for 16-bit types")
    if _computes_as_saved(model):
        return Precision("float32", "a loaded program computes as it was saved")
    dear = too_dear(1 + TIMED_STEPS)
    if dear:
        return Precision("float32", dear)
    seconds, losses = _timed(trainer, rows, seed)
    times = {"float32": seconds}
    if seconds * num_steps < WORTH_SECONDS:
        return Precision("float32", f"training takes less than {WORTH_SECONDS:g} s, too short to measure", times)
    times[reduced], found = _timed(other(reduced), rows, seed)
    return judge_precision(reduced, times, losses, found)


def judge_precision(reduced: str, times: dict[str, float], losses: np.ndarray, found: np.ndarray) -> Precision:
    """The 16-bit type, where it is surely quicker and its losses are those of float32.

    Example:
        >>> judge_precision("bfloat16", {"float32": 1.0, "bfloat16": 0.5}, np.array([2.0]), np.array([2.01])).used
        'bfloat16'
        >>> judge_precision("bfloat16", {"float32": 1.0, "bfloat16": 0.95}, np.array([2.0]), np.array([2.01])).why
        'bfloat16 is 1.05 times as fast, less than 1.1'
    """
    gain = times["float32"] / times[reduced]
    count = min(len(losses), len(found))
    difference = float(np.abs(found[:count] - losses[:count]).mean() / np.abs(losses[:count]).mean())
    if not difference <= MAX_LOSS_DIFFERENCE:
        why = f"the losses in {reduced} differ by {difference:.1%}, more than {MAX_LOSS_DIFFERENCE:.0%}"
    elif gain < MIN_GAIN:
        why = f"{reduced} is {gain:.2f} times as fast, less than {MIN_GAIN:g}"
    else:
        return Precision(reduced, f"{reduced} is {gain:.2f} times as fast", times, difference)
    return Precision("float32", why, times, difference)


def _timed(trainer: SuffixTrainer, rows: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Seconds of a step, and the losses of the first batches under the start weights."""
    losses: list[float] = []
    times = [time.perf_counter()]

    def note(loss: float) -> bool:
        losses.append(loss)
        times.append(time.perf_counter())
        return True

    trainer.try_rates(rows, np.zeros(1 + TIMED_STEPS), seed=seed, goes_on=note)
    return float(np.diff(times)[1:].min(initial=np.inf)), np.asarray(losses)


def _computes_as_saved(model: keras.Model) -> bool:
    return program_of(backbone_of(model)) is not None
