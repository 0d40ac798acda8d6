"""The artifacts themselves, opened in this process: values, names, metadata, encoded files."""

import importlib.resources
import io
import json

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from PIL import Image
from tiny_network import FAULTS, METADATA, NAMES, SIZE_PX

from tfxfer.errors import InputError
from tfxfer.exporters import EXPORTERS
from tfxfer.exporters.onnx import export_onnx
from tfxfer.exporters.serving import servable
from tfxfer.model.preprocess import AdaptImage
from tfxfer.runtime.images import decode_image


@pytest.fixture(scope="module")
def signatures(certified):
    loaded = tf.saved_model.load(str(certified[0] / "exports/saved_model/1"))
    yield loaded.signatures
    del loaded


@pytest.fixture(scope="module")
def session(certified):
    return onnxruntime.InferenceSession(str(certified[0] / "exports/model.onnx"))


def test_every_format_has_a_program_that_reopens_it():
    programs = {entry.name for entry in importlib.resources.files("tfxfer.exporters").iterdir()}
    assert {f"reopen_{name}.py" for name in EXPORTERS} <= programs


@pytest.mark.parametrize("size", [(SIZE_PX, SIZE_PX), (61, 40), (9, 130), (1, 1)])
def test_both_formats_give_what_predict_gives_at_any_size(model, signatures, session, size):
    batch = np.random.default_rng(0).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    want = model.predict(batch.astype("float32"), verbose=0)
    got_onnx, classes_onnx = session.run(["probabilities", "classes"], {"images": batch})
    got = signatures["serving_default"](images=tf.constant(batch))
    np.testing.assert_allclose(got["probabilities"], want, atol=2e-5)
    np.testing.assert_allclose(got_onnx, want, atol=2e-5)
    names = [NAMES[column] for column in want.argmax(axis=1)]
    assert list(classes_onnx) == names
    assert [label.decode() for label in got["classes"].numpy()] == names


@pytest.mark.parametrize("fault", FAULTS)
def test_the_faults_can_be_seen(model, images, fault):
    """Otherwise the tests that inject them would prove nothing."""
    right = model.predict(images.astype("float32"), verbose=0)
    assert right.std(axis=0).min() > 0.01
    assert len(set(right.argmax(axis=1))) == 4
    statistics = [layer.get_weights() for layer in model.get_layer("backbone").layers]
    wrong = FAULTS[fault](model, images).numpy()
    for layer, values in zip(model.get_layer("backbone").layers, statistics, strict=True):
        layer.set_weights(values)
    assert np.abs(wrong - right).max() > 0.1


def test_onnx_speaks_for_itself(certified, session):
    proto = onnx.load(certified[0] / "exports/model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {opset.domain: opset.version for opset in proto.opset_import}[""] == 18
    assert proto.producer_name == "tfxfer"
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", "height", "width", 3])
    assert {output.name: output.shape for output in session.get_outputs()} == {
        "probabilities": ["batch", 4],
        "classes": ["batch"],
    }
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(NAMES)
    assert metadata["image_size"] == str(SIZE_PX)
    assert metadata.items() >= METADATA.items()
    assert {"preprocessing", "input", "exif_orientation", "tfxfer_version"} <= set(metadata)


def test_saved_model_speaks_for_itself(certified, signatures):
    described = signatures["metadata"]()
    assert [label.decode() for label in described["class_names"].numpy()] == list(NAMES)
    about = json.loads(described["metadata"].numpy().decode())
    file = certified[0] / "exports/saved_model/1/assets.extra/metadata.json"
    assert about == json.loads(file.read_text(encoding="utf-8"))
    assert about.items() >= METADATA.items()
    assert signatures["serving_default"].structured_input_signature[1] == {
        "images": tf.TensorSpec((None, None, None, 3), tf.uint8, name="images")
    }


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photo(size=(90, 70)) -> Image.Image:
    """Smooth, with noise: what JPEG is made for."""
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8))


def test_encoded_files_of_mixed_kinds_and_sizes(model, signatures):
    alpha = photo()
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    deep = Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257)
    files = {
        "jpeg 4:2:0": encode(photo((133, 77)), "JPEG", quality=80),
        "progressive jpeg": encode(photo(), "JPEG", progressive=True, subsampling=0),
        "grey jpeg": encode(photo().convert("L"), "JPEG"),
        "png": encode(photo((20, 301)), "PNG"),
        "png with alpha": encode(alpha, "PNG"),
        "grey png": encode(photo().convert("L"), "PNG"),
        "grey png with alpha": encode(alpha.convert("LA"), "PNG"),
        "palette png": encode(photo().quantize(32), "PNG"),
        "16-bit png": encode(deep, "PNG"),
    }
    got = signatures["serve_bytes"](image_bytes=tf.constant(list(files.values())))
    for row, (kind, content) in enumerate(files.items()):
        pixels = decode_image(content)
        want = model.predict(pixels[None].astype("float32"), verbose=0)[0]
        # Alpha is laid over white here in floating point, by Pillow in 8 bits.
        tolerance = 2e-3 if "alpha" in kind else 1e-4
        np.testing.assert_allclose(got["probabilities"][row], want, atol=tolerance, err_msg=kind)
        assert got["classes"][row].numpy().decode() == NAMES[want.argmax()], kind


@pytest.mark.parametrize("adapted", [True, False], ids=["with AdaptImage", "of fixed size"])
def test_layers_that_leak_training_mode_do_not_reach_the_artifact(parts, tmp_path, adapted):
    """Keras' own preprocessing layers turn on training mode in what follows, where `training` is not given."""
    backbone, head = parts
    statistics = backbone.get_weights()
    inputs = keras.Input((None, None, None) if adapted else (30, 30, 3))
    x = AdaptImage(SIZE_PX)(inputs) if adapted else keras.layers.Resizing(SIZE_PX, SIZE_PX)(inputs)
    x = keras.layers.RandomContrast(0.5)(x)
    x = keras.layers.Rescaling(1 / 127.5, -1.0)(x)
    leaky = keras.Model(inputs, keras.layers.Softmax(dtype="float32")(head(backbone(x))))
    batch = np.random.default_rng(2).integers(0, 256, (6, 30, 30, 3), dtype=np.uint8)
    want = leaky.predict(batch.astype("float32"), verbose=0)
    assert np.abs(leaky(batch.astype("float32")).numpy() - want).max() > 0.01, "the trap is gone"
    backbone.set_weights(statistics)
    served, size_px = servable(leaky)
    assert size_px == (SIZE_PX if adapted else 30)
    path = EXPORTERS["onnx"](leaky, tmp_path, class_names=NAMES, metadata={})
    session = onnxruntime.InferenceSession(str(tmp_path / path))
    np.testing.assert_allclose(session.run(["probabilities"], {"images": batch})[0], want, atol=2e-5)
    larger = batch.repeat(2, axis=1).repeat(3, axis=2)
    want = served.predict(larger.astype("float32"), verbose=0)
    np.testing.assert_allclose(session.run(["probabilities"], {"images": larger})[0], want, atol=2e-5)


def test_no_images_no_export():
    table = keras.Sequential([keras.Input((7,)), keras.layers.Dense(4, activation="softmax")], name="table")
    with pytest.raises(InputError, match=r"'table'.*\(None, 7\)"):
        servable(table)


def test_exact_gelu_converts(tmp_path):
    network = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 64), keras.layers.Conv2D(4, 3),
         keras.layers.Activation("gelu"), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3),
         keras.layers.Softmax()]
    )  # fmt: skip
    export_onnx(network, tmp_path, class_names=["a", "b", "c"], metadata={})
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(["probabilities"], {"images": images})
    np.testing.assert_allclose(found, network.predict(images.astype("float32"), verbose=0), atol=1e-6)
