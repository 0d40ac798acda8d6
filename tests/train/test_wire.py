import json

import keras
import numpy as np
import pytest

from tfxfer.runtime.files import write_json
from tfxfer.train.crew import packed_share, unpacked_share
from tfxfer.train.replicas import Replicas, describe
from tfxfer.train.step import Share
from tfxfer.train.wire import packed, unpacked


def test_a_message_arrives_as_it_was_sent():
    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],  # not contiguous
        "scalar": np.array(7, np.uint32),
        "none": np.zeros((0, 5), np.float64),
    }
    facts, found = unpacked(packed({"do": "step", "rate": 0.1, "none": None}, arrays) + b"\0" * 9)
    assert facts == {"do": "step", "rate": 0.1, "none": None} and list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape


def test_numbers_of_numpy_in_a_message_are_those_of_run_json(tmp_path):
    facts = {"rate": np.float32(0.1), "steps": np.int64(7), "yes": np.bool_(True), "losses": np.array([0.5, 2.0])}
    found, _ = unpacked(packed(facts, {}))
    assert found == {"rate": 0.10000000149011612, "steps": 7, "yes": True, "losses": [0.5, 2.0]}
    write_json(tmp_path / "run.json", facts)
    assert found == json.loads((tmp_path / "run.json").read_text())
    with pytest.raises(TypeError, match="object has no JSON form"):
        packed({"what": object()}, {})


@pytest.mark.parametrize("crossing", [np.ones((2, 3), np.float32), (np.ones((2, 3)), np.zeros((2, 4, 4)))])
def test_a_share_arrives_as_it_was_sent(crossing):
    share = Share(crossing, np.eye(2), np.arange(2.0), np.zeros((2, 0)))
    arrays = packed_share(Share(crossing, np.eye(2) * 5, np.ones(2), np.zeros((2, 0))), 0) | packed_share(share, 1)
    found = unpacked_share(unpacked(packed({}, arrays))[1], 1)
    assert isinstance(found.activations, tuple) == isinstance(crossing, tuple)
    for ours, theirs in zip(found[1:], share[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_network_that_cannot_be_made_anew_is_refused():
    import tensorflow as tf

    from tfxfer.errors import InputError

    class Secret(keras.layers.Layer):
        def __init__(self, number, **options):
            super().__init__(**options)

        def call(self, inputs):
            return inputs

    net = keras.Sequential([keras.Input((3,)), Secret(5, name="secret"), keras.layers.Dense(2)], name="net")
    with pytest.raises(InputError, match=r"cannot be copied onto several devices: .*give strategy 'none'"):
        Replicas(describe(net), tf.distribute.get_strategy())
