import keras
import numpy as np
import onnxruntime
import pytest
from small_networks import norm_model

import tfxfer
from tfxfer.data import load_data
from tfxfer.errors import InputError
from tfxfer.model.build import build_model
from tfxfer.runtime.predictor import OnnxPredictor
from tfxfer.specs import Recipe, Stage

QUICK = {"baseline": "none", "formats": ()}


def test_a_model_of_one_s_own_is_what_is_trained(digits_folder, tmp_path):
    data = load_data(digits_folder, image_size=32)
    model = build_model("digits_cnn", data, dropout=0.3)
    kernel = model.get_layer("digits_cnn").get_layer("conv1").kernel
    kernel.assign(kernel * 1.1)  # no longer the source's
    changed = kernel.numpy().copy()
    run = tfxfer.fit(model, data, recipe="probe", out=tmp_path / "run", **QUICK)
    assert run.info["plan"]["source"] == "digits_cnn" and run.info["plan"]["image_size"] == 32
    np.testing.assert_array_equal(run.model.get_layer("digits_cnn").get_layer("conv1").kernel, changed)
    images = data.pixels("test", 32)
    np.testing.assert_allclose(run.model.predict(images, verbose=0), model.predict(images, verbose=0), atol=1e-6)
    accuracy = (model.predict(images, verbose=0).argmax(1) == data.part("test").labels).mean()
    assert run.metrics["test"]["accuracy"]["value"] == pytest.approx(accuracy) and accuracy > 0.7


def test_arrays_and_a_recipe_of_one_s_own(digits, tmp_path):
    images, labels = digits
    own = Recipe("own", (Stage("head", freeze_depth="all", epochs=30, learning_rates=(1e-2,), min_steps=False),))
    run = tfxfer.fit("digits_cnn", (images[:200], labels[:200]), own, out=tmp_path / "run", augment="none", **QUICK)
    assert run.info["chosen"] == "fine_tune" and run.info["freeze_audit"]["freeze_depth"] == 4
    assert run.metrics["validation"]["accuracy"]["value"] > 0.8 and run.metrics["test"]["accuracy"]["value"] > 0.8
    assert {row["stage"] for row in run.history} >= {"head"}
    assert run.class_names == tuple(map(str, range(10)))
    assert not (run.path / "exports").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"data": None}, r"fit needs data"),
        ({"model": "digits_cn"}, r"Unknown source 'digits_cn'"),
        ({"method": "distil"}, r"Unknown method 'distil'"),
        ({"freeze_depth": 9}, r"Freeze depth 9 is out of range: there are 4 blocks"),
        ({"freeze_depth": "conv9"}, r"No block is named 'conv9'.*conv1, conv2"),
        ({"image_size": 64}, r"digits_cnn takes images of 32 px only"),
        ({"formats": ("tflite",)}, r"Unknown export format 'tflite'"),
    ],
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(arguments, sentence, digits_folder, tmp_path):
    options = {"data": digits_folder, "model": "digits_cnn", "out": tmp_path / "run"} | arguments
    with pytest.raises(InputError, match=sentence):
        tfxfer.fit(options.pop("model"), options.pop("data"), **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"image_size": 48}, r"image_size 48 was given, but the model was built for 32; drop one of the two"),
        ({"freeze_depth": 9}, r"Freeze depth 9 is out of range"),
        ({"head": 3}, r"The model has 3 outputs, the data 10 classes; build it with the data"),
        ({"foreign": True}, r"It is not known from which source the model 'small' was built"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_a_folder_is_made(arguments, sentence, digits_folder, tmp_path):
    model = build_model("digits_cnn", arguments.pop("head", 10), weights=False)
    if arguments.pop("foreign", False):
        model = keras.models.clone_model(norm_model(10))
    with pytest.raises(InputError, match=sentence):
        tfxfer.fit(model, digits_folder, out=tmp_path / "run", **QUICK, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_data_that_lack_a_part_are_refused_before_training(digits, tmp_path):
    images, labels = digits
    for fractions in ({"test_fraction": 0.0}, {"val_fraction": 0.0}):
        data = load_data((images[:100], labels[:100]), **fractions)
        with pytest.raises(InputError, match=r"has no part '(test|val)'"):
            tfxfer.fit("digits_cnn", data, out=tmp_path / "run", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_exported_with_its_names(tmp_path):
    model = build_model("digits_cnn", ["cat", "dog", "cow"])
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    (certificate,) = tfxfer.export(
        model, tmp_path / "out", formats=("onnx",), samples=images, class_names=["cat", "dog", "cow"]
    )
    assert certificate.format == "onnx" and certificate.passed and certificate.max_abs_difference <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    (found,) = session.run(["probabilities"], {"images": images})
    np.testing.assert_allclose(found, model.predict(images, verbose=0), atol=1e-4)
    assert OnnxPredictor(tmp_path / "out" / "model.onnx").class_names == ("cat", "dog", "cow")


def test_a_run_is_exported_again_elsewhere(run_copy, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}
    (certificate,) = tfxfer.export(run_copy, tmp_path / "again", formats=["onnx"])
    assert certificate.passed
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"model.onnx", "certificate.json", "samples.npz"}
    assert before == {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}
    old, new = (
        np.load(folder / "samples.npz", allow_pickle=False) for folder in (run_copy / "exports", tmp_path / "again")
    )
    np.testing.assert_array_equal(old["images"], new["images"])


def test_an_export_without_samples_is_refused(run_copy, tmp_path):
    model = build_model("digits_cnn", 3, weights=False)
    with pytest.raises(InputError, match=r"give `out` and `samples`"):
        tfxfer.export(model, tmp_path / "out")
    (run_copy / "exports" / "samples.npz").unlink()
    with pytest.raises(InputError, match=r"keeps no samples to verify with"):
        tfxfer.export(run_copy)
    with pytest.raises(InputError, match=r"not probabilities"):
        logits = build_model("digits_cnn", 3, weights=False, logits=True)
        tfxfer.export(logits, tmp_path / "out", formats=("onnx",), samples=np.zeros((2, 32, 32, 3), np.uint8))
    assert not (tmp_path / "out").exists()
    assert isinstance(model, keras.Model)


def test_a_model_keeps_the_card_that_it_was_built_from(digits, tmp_path):
    images, labels = digits
    network = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Conv2D(4, 3, name="a"), keras.layers.Conv2D(4, 3, name="b"),
         keras.layers.GlobalAveragePooling2D()]
    )  # fmt: skip
    model = tfxfer.build_model(network, [str(digit) for digit in range(10)], input_range="0..1")
    run = tfxfer.fit(model, (images[:120], labels[:120]), method="probe", out=tmp_path / "run", **QUICK)
    assert run.info["source"]["licence"] == "unknown" and len(run.info["source"]["sha256"]) == 64
    assert run.model.get_layer("normalise").scale[0] == pytest.approx(1 / 255)


def test_weights_that_are_not_finite_are_refused(digits, tmp_path):
    network = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3), keras.layers.Flatten()])
    network.layers[0].kernel.assign(np.full((3, 3, 3, 2), np.nan))
    with pytest.raises(InputError, match="hold NaN or infinity"):
        tfxfer.build_model(network, 3, input_range="0..1")
