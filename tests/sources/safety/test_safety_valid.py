"""Odd but sound files pass, and really load afterwards."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import valid_keras
import valid_legacy
import valid_others
from conftest import judge

from tfxfer.sources.safety import extract_archive
from tfxfer.sources.torch_checkpoint import read_checkpoint

GROUPS = (
    valid_keras.KERAS,
    valid_keras.WEIGHTS,
    valid_legacy.LEGACY,
    valid_others.SAVED_MODELS,
    valid_others.ARCHIVES,
    valid_others.TORCH,
    valid_others.SAFETENSORS,
)
BUILDERS = {name: build for group in GROUPS for name, build in group.items()}


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    home = tmp_path_factory.mktemp("sound")
    files = {}
    for name, build in BUILDERS.items():
        (home / name).mkdir()
        files[name] = build(home / name)
    return files


@pytest.fixture(scope="module")
def sound_verdicts(sound_files):
    return judge(sound_files)


@pytest.mark.parametrize("name", BUILDERS)
def test_sound_file_passes(name, sound_verdicts):
    verdict = sound_verdicts["verdicts"][name]
    assert verdict["kind"] == "passed", verdict
    assert verdict["seconds"] < 5


def test_there_are_enough_of_them(sound_verdicts):
    assert len(BUILDERS) >= 30 and sum(map(len, GROUPS)) == len(BUILDERS)
    assert sound_verdicts["imported"] == []


@pytest.mark.parametrize("name", valid_keras.KERAS)
def test_keras_loads_what_passed(name, sound_files):
    model = keras.models.load_model(sound_files[name], compile="compiled" in name)
    assert model.layers


@pytest.mark.parametrize("name", valid_legacy.LEGACY)
def test_keras_2_loads_what_passed(name, sound_files):
    import tf_keras

    if name == "h5_of_keras_2_weights":
        valid_legacy.nested().load_weights(sound_files[name])
    else:
        assert tf_keras.models.load_model(sound_files[name]).layers


@pytest.mark.parametrize("name", valid_others.SAVED_MODELS)
def test_tensorflow_loads_what_passed(name, sound_files):
    loaded = tf.saved_model.load(str(sound_files[name]))
    assert loaded.signatures["serving_default"].structured_outputs


@pytest.mark.parametrize("name", valid_others.ARCHIVES)
def test_tensorflow_loads_what_was_unpacked(name, sound_files, tmp_path):
    folder = extract_archive(sound_files[name], tmp_path / "model")
    assert tf.saved_model.load(str(folder)).signatures["serving_default"].structured_outputs


@pytest.mark.parametrize("name", ["torch_old", "torch_old_protocol_4"])
def test_the_reader_reads_what_passed(name, sound_files):
    state = read_checkpoint(sound_files[name].read_bytes())
    np.testing.assert_array_equal(state["fc.weight"], valid_others.KERNEL)
    np.testing.assert_array_equal(state["fc.transposed"], valid_others.KERNEL.T)
