"""On GPUs, where there are: `pytest -m gpu`. One, several, and in mixed precision."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from on_two_devices import apart, trained

from tfxfer.train.distribute import Devices, choose_devices

GPUS = tf.config.list_physical_devices("GPU")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="TensorFlow sees no GPU on this machine"),
]
several = pytest.mark.skipif(len(GPUS) < 2, reason=f"TensorFlow sees {len(GPUS)} GPUs on this machine, not two")


def test_memory_grows_as_it_is_needed():
    choose_devices("none")
    assert all(tf.config.experimental.get_memory_growth(gpu) for gpu in GPUS)


def test_a_gpu_trains_what_the_cpu_does():
    choose_devices("none")
    _, there, moved = trained(Devices(), {"batch_norm": "frozen"})
    with tf.device("CPU:0"):
        _, here, _ = trained(Devices(), {"batch_norm": "frozen"})
    assert apart(there, here)["weights"] < 0.05 * moved  # convolutions may be in TF32


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_mixed_precision_the_loss_falls_as_in_float32(precision):
    choose_devices("none")
    runs = [trained(Devices(precision=kind), {"epochs": 6})[1] for kind in ("float32", precision)]
    losses = [[entry["loss"] for entry in run.history] for run in runs]
    assert all(value.dtype == np.float32 for value in runs[1].weights)
    assert losses[0] != losses[1]  # or nothing was computed in 16 bits
    assert np.isfinite(losses).all() and losses[1][-1] < losses[1][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.1)


@several
@pytest.mark.parametrize("options", [{"average": 0.8, "mixup": 0.4}, {"batch_norm": "train"}, {"micro_batches": 2}])
def test_several_gpus_train_what_one_does(options):
    devices = choose_devices("auto")
    assert devices.describe() == {"strategy": "mirrored", "num_replicas": len(GPUS), "kinds": ["GPU"]}
    _, many, moved = trained(devices, options)
    _, one, _ = trained(Devices(), options)
    found = apart(many, one)
    assert found["weights"] < 0.05 * moved and found["losses"] < 1e-2


@several
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_several_gpus_in_mixed_precision(precision):
    devices = dataclasses.replace(choose_devices("mirrored"), precision=precision)
    runs = [trained(each, {})[1] for each in (devices, Devices(precision=precision))]
    assert apart(*runs)["losses"] < 0.1
