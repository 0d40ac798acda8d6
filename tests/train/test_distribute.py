"""Several devices are as one. They are logical CPU devices in a process of their own: see on_two_devices.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from tfxfer.errors import InputError
from tfxfer.train.distribute import choose_devices

HERE = Path(__file__).parent
BEGIN = """
import sys
import tensorflow as tf
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]))
sys.path[:0] = sys.argv[2:]
import on_two_devices
on_two_devices.tell()
"""
CASES = (
    "l2_sp, average, mixup", "lwf, in parts, by blocks", "batch_norm trains, one image over",
    "two tensors cross, clipped", "in bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request):
    command = [sys.executable, "-c", BEGIN, str(request.param), str(HERE), str(HERE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["devices"] == {"strategy": "mirrored", "num_replicas": request.param, "kinds": ["CPU"]}
    return told


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_one_device(found, case):
    """Steps of 1e-3 to 1e-1 differ by the order of float sums; statistics of BatchNorm by a little more."""
    told = found[case]
    assert told["moved"] > (1e-4 if "clipped" in case else 5e-3) and told["epochs"] == 6
    share, loss = (0.2, 5e-3) if "bfloat16" in case else (5e-3, 2e-5)  # its numbers have three digits
    assert told["weights"] < share * told["moved"] and told["losses"] < loss, told


def test_each_replica_drops_out_other_units_and_a_run_again_is_the_same(found):
    told = found["dropout"]
    assert told["again"] == 0.0 and told["from one device"] > 1e-4
    for parts in told["seeds"]:
        seeds, counters = zip(*parts, strict=True)
        assert len(set(seeds)) == len(seeds) and len(set(counters)) == 1


def test_a_resumed_run_is_the_unstopped_one_bit_for_bit(found):
    assert found["resumed"]["weights"] == found["resumed"]["losses"] == 0.0


def test_copies_that_are_not_alike_are_noticed(found):
    assert found["unlike"].startswith("The ") and "are no longer alike after training" in found["unlike"]


def test_one_device_takes_steps_without_a_strategy():
    gpus = len(tf.config.list_physical_devices("GPU"))
    for asked in ("none", tf.distribute.OneDeviceStrategy("CPU:0"), *(["auto"] if gpus < 2 else [])):
        devices = choose_devices(asked)
        assert devices.strategy is None and devices.describe() == {"strategy": "none", "num_replicas": 1}


@pytest.mark.skipif(len(tf.config.list_physical_devices("GPU")) > 1, reason="this machine has several GPUs")
def test_mirrored_without_several_devices_is_refused():
    with pytest.raises(InputError, match=r"'mirrored' wants several devices, and TensorFlow sees \d GPUs"):
        choose_devices("mirrored")


def test_a_cluster_cannot_be_joined_once_tensorflow_is_at_work(monkeypatch):
    tf.constant(1.0)
    told = {"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(told))
    with pytest.raises(InputError, match=r"TF_CONFIG names 2 workers, but TensorFlow is at work here already"):
        choose_devices("auto")
    assert choose_devices("none").strategy is None


def test_what_is_no_strategy_is_refused():
    with pytest.raises(InputError, match=r"strategy must be one of auto, none, mirrored.*, not 'miror'"):
        choose_devices("miror")
