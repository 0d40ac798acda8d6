"""The ONNX predictor against arithmetic done by hand."""

import io
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from tfxfer.errors import InputError
from tfxfer.runtime.images import ImageError
from tfxfer.runtime.predictor import OnnxPredictor

KERNEL = np.array([[0.02, 0.0, -0.01, 0.0], [0.0, 0.03, 0.0, 0.0], [-0.01, 0.0, 0.02, 0.001]], np.float32)
NAMES = ["red", "green", "blue", "grün"]
SIZE_PX = 6


def want(pixels: np.ndarray) -> np.ndarray:
    logits = pixels.astype(np.float64).mean(axis=(1, 2)) @ KERNEL
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """softmax(mean colour @ KERNEL), with what an export of ours says about itself."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "kernel"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "mean_colour",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 4])],
        [onnx.numpy_helper.from_array(KERNEL, "kernel"), onnx.numpy_helper.from_array(np.array([1, 2]), "axes")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(proto, {"class_names": json.dumps(NAMES), "image_size": str(SIZE_PX), "source": "by hand"})
    file = tmp_path_factory.mktemp("predictor") / "model.onnx"
    onnx.save(proto, file)
    return file


@pytest.fixture
def predictor(path):
    return OnnxPredictor(path, batch_size=4)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (11, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_what_the_file_says_about_itself(predictor):
    assert predictor.class_names == tuple(NAMES)
    assert predictor.image_size_px == SIZE_PX
    assert predictor.metadata["source"] == "by hand"


@pytest.mark.parametrize("count", [1, 4, 11])
def test_arrays(predictor, pixels, count):
    got = predictor.predict(pixels[:count])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want(pixels[:count]), atol=1e-6)


def test_paths_bytes_and_arrays_mixed_in_order(predictor, pixels, tmp_path):
    items: list = list(pixels)
    for row in (0, 5, 10):
        items[row] = png(pixels[row])
    for row in (2, 3, 9):
        (tmp_path / f"{row}.png").write_bytes(png(pixels[row]))
        items[row] = tmp_path / f"{row}.png"
    items[3] = str(items[3])
    np.testing.assert_allclose(predictor.predict(items), want(pixels), atol=1e-6)


def test_other_sizes_and_channels_are_fitted(predictor):
    grey = np.full((9, 4), 200, np.uint8)
    clear = np.dstack([np.zeros((5, 30, 3), np.uint8), np.full((5, 30), 0, np.uint8)])  # transparent: white
    got = predictor.predict([grey, png(clear)])
    flat = np.stack([np.full((1, 1, 3), 200), np.full((1, 1, 3), 255)])
    np.testing.assert_allclose(got, want(flat), atol=1e-6)


def test_no_images(predictor):
    assert predictor.predict([]).shape == (0, 4)


def test_top(predictor):
    probabilities = np.array([[0.1, 0.6, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert predictor.top(probabilities, k=2) == [[("green", 0.6), ("grün", 0.2)], [("red", 0.25), ("green", 0.25)]]
    assert len(predictor.top(probabilities, k=9)[0]) == 4
    with pytest.raises(InputError, match="k must be at least 1"):
        predictor.top(probabilities, k=0)


def test_bad_input_gets_one_sentence(predictor, path, tmp_path, pixels):
    (tmp_path / "text.jpg").write_text("hello, this is text")
    with pytest.raises(ImageError, match=r"text\.jpg cannot be read: it is text"):
        predictor.predict([pixels[0], tmp_path / "text.jpg"])
    with pytest.raises(InputError, match="uint8"):
        predictor.predict(pixels.astype(np.float32))
    with pytest.raises(InputError, match="list of images"):
        predictor.predict("photo.jpg")
    with pytest.raises(InputError, match="no ONNX file"):
        OnnxPredictor(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="not an ONNX file that onnxruntime can run"):
        OnnxPredictor(tmp_path / "text.jpg")
    with pytest.raises(InputError, match="batch_size"):
        OnnxPredictor(path, batch_size=0)
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="no export of tfxfer"):
        OnnxPredictor(tmp_path / "foreign.onnx")


def test_it_answers_without_tensorflow(path, pixels, tmp_path):
    (tmp_path / "photo.png").write_bytes(png(pixels[0]))
    code = f"""
import sys
from tfxfer.runtime.predictor import OnnxPredictor
predictor = OnnxPredictor({str(path)!r})
print(predictor.top(predictor.predict([{str(tmp_path / "photo.png")!r}]), k=1)[0][0][0])
assert not {{"tensorflow", "keras", "onnx"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == NAMES[want(pixels[:1]).argmax()]
