"""Recipes of a user's own from the file to the run that is kept."""

import keras
import numpy as np
import pytest

import tfxfer
from tfxfer.errors import InputError

QUICK = {"baseline": "none", "formats": (), "augment": "none", "features": "last", "seed": 3}
RECIPE = """
[[stages]]
name = "probe"
solver = "convex"
epochs = 0

[[stages]]
name = "tune"
freeze_depth = "conv1"
epochs = 3
min_steps = false
{}
regularizer = "{}"
"""


def recipe_file(folder, regularizer: str):
    path = folder / f"with_{regularizer}.toml"
    path.write_text(
        RECIPE.format("find_rate = true" if regularizer == "lwf" else "learning_rates = [2e-3]", regularizer),
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("regularizer", ["lwf", "co_tuning"])
def test_the_source_s_own_output_takes_part_and_is_not_kept(digits_folder, tmp_path, regularizer):
    run = tfxfer.fit("digits_cnn", digits_folder, recipe_file(tmp_path, regularizer), out=tmp_path / "run", **QUICK)
    assert run.info["status"] == "complete" and run.info["plan"]["recipe"]["name"] == f"with_{regularizer}"
    assert run.info["plan"]["recipe"]["stages"][1]["regularizer"] == regularizer
    assert (run.path / "lr_find.csv").exists() == (run.path / "lr_find.png").exists() == (regularizer == "lwf")
    again = tfxfer.load_run(run.path).model
    assert not [weight.path for weight in again.weights if "source_logits" in weight.path]
    assert again.count_params() == tfxfer.build_model("digits_cnn", 10, image_size=32).count_params()
    assert run.metrics["test"]["accuracy"]["value"] > 0.8


def test_a_source_without_an_old_output_is_refused_before_anything_is_computed(digits_folder, tmp_path):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(4, 3, strides=2, name="first"), keras.layers.Conv2D(4, 3, strides=2, name="second")]
    source = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), *layers,
                               keras.layers.GlobalAveragePooling2D()])  # fmt: skip
    path = tmp_path / "features.keras"
    source.save(path)
    recipe = tfxfer.Recipe("own", (tfxfer.Stage("tune", freeze_depth="first", regularizer="lwf"),))
    with pytest.raises(
        InputError, match=r"Regularizer 'lwf' of stage 'tune' needs the source's old output, and .* Give"
    ):
        tfxfer.fit(str(path), digits_folder, recipe, image_size=32, out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_user_s_own_is_not_taken_for_its_source(digits_folder, tmp_path):
    model = tfxfer.build_model("digits_cnn", 10, image_size=32)
    backbone = model.get_layer("digits_cnn")
    backbone.set_weights([np.asarray(weight) * 1.5 for weight in backbone.get_weights()])
    recipe = tfxfer.Recipe("own", (tfxfer.Stage("tune", freeze_depth="conv1", regularizer="co_tuning"),))
    with pytest.raises(InputError, match=r"or the model has other weights"):
        tfxfer.fit(model, digits_folder, recipe, out=tmp_path / "run", **QUICK)
