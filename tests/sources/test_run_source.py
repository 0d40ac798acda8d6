"""A run of ours as the source of the next: its backbone, its preprocessing, and its recorded digest."""

import json

import keras
import numpy as np
import pytest
from keras_networks import normalised, photos

import tfxfer
from tfxfer.errors import InputError
from tfxfer.model.build import build_original
from tfxfer.runtime.files import sha256_of_file
from tfxfer.sources.catalog import get_source, load_backbone, load_with_report


@pytest.fixture
def run_folder(tmp_path):
    """A folder as `tfxfer train` leaves it, as far as a source is concerned."""
    model = tfxfer.build_model("digits_cnn", ["no", "yes"])
    model.get_layer("logits").set_weights([np.random.default_rng(0).normal(size=(64, 2)), np.zeros(2)])
    model.save(tmp_path / "model.keras")
    info = {
        "model": {"file": "model.keras", "sha256": sha256_of_file(tmp_path / "model.keras")},
        "data": {"classes": ["no", "yes"]},
        "source": {"name": "digits_cnn", "licence": "Apache-2.0"},
        "plan": {"image_size": 32},
    }
    (tmp_path / "run.json").write_text(json.dumps(info))
    return model, tmp_path


def test_a_run_gives_its_backbone_back(run_folder):
    model, folder = run_folder
    card = get_source(f"run:{folder}")
    ours = get_source("digits_cnn")
    np.testing.assert_allclose(card.scale, ours.scale, rtol=1e-6)
    assert (card.offset, card.image_size_px, card.licence) == (ours.offset, 32, "Apache-2.0")
    assert card.class_names == ("no", "yes") and card.num_classes == 2
    network, report = load_with_report(card)
    assert report.complete and network.name == "digits_cnn"
    assert [block.name for block in tfxfer.list_blocks(network)] == list(ours.blocks)
    images = photos()
    inside = keras.Model(model.input, model.get_layer("logits").input)
    np.testing.assert_allclose(
        load_backbone(card).predict(normalised(card, images), verbose=0), inside.predict(images, verbose=0), atol=1e-5
    )
    np.testing.assert_allclose(
        build_original(card).predict(images, verbose=0), model.predict(images, verbose=0), atol=1e-6
    )
    again = tfxfer.build_model(card, 3)  # and is a source for the next model
    assert "/" not in again.name and again.output_shape == (None, 3)


def test_a_run_that_was_tampered_with_is_refused(run_folder):
    _, folder = run_folder
    with pytest.raises(InputError, match=r"rescales pixels inside; drop --input-range"):
        get_source(f"run:{folder}", input_range="0..1")
    content = bytearray((folder / "model.keras").read_bytes())
    content[-1] ^= 1
    (folder / "model.keras").write_bytes(content)
    with pytest.raises(InputError, match=r"model.keras"):
        get_source(f"run:{folder}")
    (folder / "model.keras").unlink()
    with pytest.raises(InputError, match=r"has no model.keras; it is no finished run"):
        get_source(f"run:{folder}")
    (folder / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"run.json is damaged or of a run that was not finished"):
        get_source(f"run:{folder}")
    with pytest.raises(InputError, match=r"nowhere is not a run"):
        get_source("run:nowhere")


def test_a_run_with_another_models_file_is_refused(run_folder):
    _, folder = run_folder
    tfxfer.build_model("digits_cnn", 2, weights=False).save(folder / "model.keras")
    with pytest.raises(InputError, match=r"model.keras has SHA-256 \w+, but the run recorded"):
        get_source(f"run:{folder}")
