import json
import shutil

import keras
import numpy as np
import pytest
from PIL import Image
from small_networks import spoil

from tfxfer import fit
from tfxfer.errors import CheckError, InputError
from tfxfer.train.lock import training_lock
from tfxfer.workflow import training
from tfxfer.workflow.run import new_run_folder

OPTIONS = {
    "epochs": 6, "learning_rate": 2e-3, "freeze_depth": "conv1", "seed": 3, "baseline": "none", "formats": (),
    "checkpoint_seconds": 0.0,
}  # fmt: skip


class Fail(keras.callbacks.Callback):
    """Raise at the end of the nth batch that it sees, once."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the power failed")


def weights(run) -> list[np.ndarray]:
    return run.model.get_weights()


@pytest.fixture(scope="module")
def whole(digits_folder, tmp_path_factory):
    return fit("digits_cnn", digits_folder, out=tmp_path_factory.mktemp("whole") / "run", **OPTIONS)


@pytest.fixture
def broken(digits_folder, tmp_path):
    """A run that failed in its refit: the folder, with the probe and the runs before in its journal."""
    return broken_at(digits_folder, tmp_path / "run", 12)


def broken_at(data, out, batches: int):
    with pytest.raises(RuntimeError, match="the power failed"):
        fit("digits_cnn", data, out=out, callbacks=[Fail(batches)], **OPTIONS)
    return out


@pytest.mark.parametrize("batches", [3, 12])
def test_a_run_that_broke_goes_on_to_the_same_weights(digits_folder, tmp_path, whole, batches):
    out = broken_at(digits_folder, tmp_path / "run", batches)
    assert json.loads((out / "run.json").read_text())["status"] == "training" and (out / "model.keras").is_file()
    run = fit("digits_cnn", digits_folder, out=out, resume=True, **OPTIONS)
    assert run.info["status"] == "complete" and run.info["chosen"] == whole.info["chosen"]
    assert all(np.array_equal(a, b) for a, b in zip(weights(run), weights(whole), strict=True))
    assert run.history == whole.history and run.metrics == whole.metrics
    told = run.info["resumed"]
    assert "probe, 1 views" in told and any("epoch" in name and "batch" in name for name in told), told
    assert not (out / "checkpoints").exists() and not (out / ".lock").exists()


def test_a_complete_run_is_not_done_again(whole, digits_folder, monkeypatch):
    monkeypatch.setattr(training, "run_stages", None)
    run = fit("digits_cnn", digits_folder, out=whole.path, resume=True, **OPTIONS)
    assert run.info == whole.info


def test_another_plan_is_refused_naming_what_differs(broken, digits_folder):
    with pytest.raises(InputError, match=r"begun with another recipe and seed; resume it without"):
        fit("digits_cnn", digits_folder, out=broken, resume=True, **{**OPTIONS, "seed": 4, "epochs": 7})


def test_other_images_are_refused(broken, digits_folder, tmp_path):
    data = tmp_path / "changed"
    shutil.copytree(digits_folder, data)
    path = sorted((data / "train" / "one").iterdir())[0]
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=r"The images are no longer those that .* was begun with"):
        fit("digits_cnn", data, out=broken, resume=True, **OPTIONS)
    assert (broken / "checkpoints").is_dir()


def test_what_cannot_be_resumed_is_refused(digits_folder, tmp_path):
    with pytest.raises(InputError, match=r"There is no folder"):
        fit("digits_cnn", digits_folder, out=tmp_path / "none", resume=True, **OPTIONS)
    with pytest.raises(InputError, match=r"name the run's folder"):
        fit("digits_cnn", digits_folder, resume=True, **OPTIONS)


def test_a_folder_at_work_is_refused_naming_who_works_there(broken, digits_folder):
    with training_lock(broken):
        for resume in (True, False):
            with pytest.raises(InputError, match=r"Another training is at work in .*: process \d+, since"):
                fit("digits_cnn", digits_folder, out=broken, resume=resume, **OPTIONS)


def test_an_unfinished_run_says_that_it_can_be_resumed(broken):
    with pytest.raises(InputError, match=r"is already a run; go on with it by --resume, give another --out"):
        new_run_folder(broken, "x")


def test_a_source_that_gives_nan_for_a_picture_names_it_and_keeps_the_probe(digits_folder, tmp_path, monkeypatch):
    """The activations of one image are spoilt once the probe is there."""
    from tfxfer.train import stages

    tune = stages.Tuner.tune

    def spoilt(self):
        spoil(self.extracted, int(self.splits[0][0][0]))
        tune(self)

    monkeypatch.setattr(stages.Tuner, "tune", spoilt)
    with pytest.raises(
        CheckError, match=r"The input of training was not a number at step \d+, in the batch of "
    ) as error:
        fit("digits_cnn", digits_folder, out=tmp_path / "run", augment="none", **OPTIONS)
    assert "digit_" in str(error.value)
    run = training.Run(tmp_path / "run", json.loads((tmp_path / "run" / "run.json").read_text()))
    assert all(np.isfinite(value).all() for value in weights(run))
