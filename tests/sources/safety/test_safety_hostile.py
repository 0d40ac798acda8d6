"""Every hostile or damaged file is refused: quickly, in little memory, with file and reason, and without running it."""

import pickle
import re

import hostile_files
import hostile_h5
import hostile_keras
import hostile_saved_model
import hostile_saved_model_edited
import pytest

GROUPS = (hostile_keras, hostile_h5, hostile_saved_model, hostile_saved_model_edited, hostile_files)
CASES = {name: reason for module in GROUPS for name, (_, reason) in module.CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_hostile_file_is_refused(name, hostile, verdicts):
    path, canary = hostile[name]
    verdict = verdicts["verdicts"][name]
    assert verdict["kind"] == "refused", verdict
    message = verdict["message"]
    assert repr(str(path)) in message and "\n" not in message and message.endswith(".")
    assert re.search(CASES[name], message), message
    assert verdict["seconds"] < 5 and verdict["memory_bytes"] < 512 * 2**20
    assert not canary.exists()


def test_the_gate_imports_no_framework(verdicts):
    assert len(CASES) >= 60 and sum(len(module.CASES) for module in GROUPS) == len(CASES)
    assert verdicts["imported"] == []


def test_the_corpus_bites(hostile, tmp_path):
    """What the gate refuses would have run: otherwise a missing canary proves nothing."""
    import keras
    import tensorflow as tf

    path, canary = hostile["torch_bare_pickle"]
    pickle.loads(path.read_bytes())
    assert canary.exists()
    canary.unlink()
    path, canary = hostile["lambda_flat"]
    keras.models.load_model(path, safe_mode=False, compile=False)(tf.ones([1, 4]))
    assert canary.exists()
    canary.unlink()
    for name in ("sm_write_file", "sm_write_nested", "sm_write_in_branch", "sm_print_to_file"):
        path, canary = hostile[name]
        tf.saved_model.load(str(path)).signatures["serving_default"](tf.ones([1, 3]))
        assert canary.exists(), name
        canary.unlink()
    path, canary = hostile["sm_write_in_initializer"]
    tf.saved_model.load(str(path))
    assert canary.exists()
    canary.unlink()
