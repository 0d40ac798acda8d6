"""KerasHub's presets as sources: folders, folders as Hugging Face has them, names from a cache; needs keras-hub."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tfxfer import export
from tfxfer.errors import InputError
from tfxfer.features.cut import cut_model
from tfxfer.model.blocks import backbone_of, list_blocks
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze, frozen_variables
from tfxfer.sources.catalog import get_source, load_backbone, load_with_report
from tfxfer.sources.safety import check_model_file

INSTALLED = importlib.util.find_spec("keras_hub") is not None
needs_keras_hub = pytest.mark.skipif(not INSTALLED, reason="keras-hub is not installed: pip install 'tfxfer[kerashub]'")
SCALE, OFFSET = [1 / 58.4, 1 / 57.1, 1 / 57.4], [-2.1, -2.0, -1.8]
SIZE_PX = 64


def tiny(kind):
    """A small random backbone of KerasHub."""
    import keras_hub

    keras.utils.set_random_seed(3)
    if kind == "vit":
        return keras_hub.models.ViTBackbone(
            image_shape=(SIZE_PX, SIZE_PX, 3), patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
        )
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[2, 2],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
    )
    backbone(np.random.default_rng(0).normal(size=(8, SIZE_PX, SIZE_PX, 3)), training=True)  # moves BatchNorm
    return backbone


def saved(backbone, folder, *, converter=True):
    import keras_hub

    backbone.save_to_preset(folder)
    if converter:
        keras_hub.layers.ImageConverter(image_size=(SIZE_PX, SIZE_PX), scale=SCALE, offset=OFFSET).save_to_preset(
            folder
        )
    return folder


@pytest.fixture(scope="module", params=["resnet", "vit"])
def preset(request, tmp_path_factory):
    """(kind, KerasHub's backbone, its folder)."""
    if not INSTALLED:
        pytest.skip("keras-hub is not installed")
    backbone = tiny(request.param)
    return request.param, backbone, saved(backbone, tmp_path_factory.mktemp("presets") / request.param)


@pytest.fixture(scope="module")
def model(preset):
    return build_model(f"kerashub:{preset[2]}", 3, image_size=SIZE_PX, dropout=0.0)


def pixels(count=4):
    return np.random.default_rng(1).integers(0, 256, (count, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)


def features_of(kind, backbone, images):
    maps = np.asarray(backbone(images, training=False))
    return maps[:, 0] if kind == "vit" else maps.mean((1, 2))


def test_features_are_those_of_keras_hub(preset):
    import keras_hub

    kind, backbone, folder = preset
    card = get_source(f"kerashub:{folder}")
    assert card.image_size_px == SIZE_PX and card.fixed_size == (kind == "vit")
    network, report = load_with_report(card)
    assert report.complete and report.num_parameters("matched") == network.count_params() == backbone.count_params()
    converted = keras_hub.layers.ImageConverter.from_preset(str(folder))(pixels().astype("float32"))
    expected = features_of(kind, backbone, converted)
    found = network(pixels() * np.float32(card.scale) + np.float32(card.offset), training=False)
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_blocks_hold_every_layer_once_and_can_be_cut(model):
    backbone, blocks = backbone_of(model), list_blocks(model)
    held = [layer for block in blocks for layer in block.layers]
    if blocks[0].name == "vit_patching_and_embedding":
        assert len(blocks) == 4 and all(name.startswith("vi_t_backbone/") for name in held)
    else:
        expected = [layer.name for layer in backbone.layers if not isinstance(layer, keras.layers.InputLayer)]
        assert sorted(held) == sorted(expected)
    assert sum(block.num_parameters for block in blocks) == backbone.count_params()
    assert len(blocks) >= 2 and all(block.num_parameters for block in blocks)
    images = pixels().astype("float32")
    for depth in range(len(blocks) + 1):
        cut = cut_model(model, depth)
        if cut is None:  # a transformer is held whole
            assert 0 < depth < len(blocks) and blocks[1].name == "vit_encoder_transformer_block_1"
            continue
        logits = cut.suffix(cut.prefix(images, training=False), training=False)
        np.testing.assert_allclose(keras.ops.softmax(logits), model(images, training=False), atol=1e-5)


def test_the_first_block_can_be_frozen(model):
    freeze(model, 1)
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", run_eagerly=True)
    held, before = frozen_variables(model), {v.path: v.numpy().copy() for v in model.weights}
    assert held
    model.train_on_batch(pixels().astype("float32"), np.array([0, 1, 2, 0]))
    moved = {v.path for v in model.weights if v.numpy().tobytes() != before[v.path].tobytes()}
    assert moved and not moved & held.keys()


def test_a_saved_model_passes_the_gate_for_keras_hub_and_comes_back_where_it_is_imported(model, tmp_path):
    path = tmp_path / "model.keras"
    model.save(path)
    check_model_file(path, trusted=("keras_hub",))
    images = pixels().astype("float32")
    again = keras.models.load_model(path, compile=False)
    np.testing.assert_allclose(again(images, training=False), model(images, training=False), atol=1e-6)
    modules = "keras_hub, keras, tfxfer.model.preprocess, tfxfer.sources.kerashub_layer"
    code = f"import {modules}; keras.models.load_model({str(path)!r}, compile=False)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_exports_are_what_predict_says(preset, model, tmp_path):
    # tf2onnx 1.17 has no Erfc, which TensorFlow makes of the exact GELU.
    formats = ("saved_model", "onnx") if preset[0] == "resnet" else ("saved_model",)
    certificates = export(model, tmp_path / "out", formats=formats, samples=pixels(8), class_names=["a", "b", "c"])
    assert tuple(certificate.format for certificate in certificates) == formats
    assert all(certificate.passed and certificate.max_abs_difference < 1e-4 for certificate in certificates)


def test_random_weights_follow_the_seed(preset):
    _, backbone, folder = preset
    one, same, other = (
        load_backbone(f"kerashub:{folder}", weights=False, seed=seed).get_weights() for seed in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    differ = [not np.array_equal(a, b) for a, b in zip(one, other, strict=True)]
    assert any(differ) and len(one) == len(backbone.weights)


def test_a_changed_file_and_a_fixed_size_are_refused(preset, tmp_path):
    kind, _, folder = preset
    copy = shutil.copytree(folder, tmp_path / "copy")
    card = get_source(f"kerashub:{copy}")
    if kind == "vit":
        with pytest.raises(InputError, match=r"takes images of 64 px only, not of 96 px"):
            load_backbone(card, image_size=96)
    else:
        assert load_backbone(card, image_size=96).input_shape == (None, 96, 96, 3)
    content = bytearray((copy / "model.weights.h5").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.weights.h5").write_bytes(content)
    with pytest.raises(InputError, match=r"a file was changed or damaged"):
        load_backbone(card)


@needs_keras_hub
def test_without_a_converter_the_range_must_be_given(tmp_path):
    folder = saved(tiny("vit"), tmp_path / "plain", converter=False)
    with pytest.raises(InputError, match=r"does not say what its pixels were scaled to .* give --input-range"):
        get_source(f"kerashub:{folder}")
    assert get_source(f"kerashub:{folder}", input_range="-1..1").offset == (-1.0, -1.0, -1.0)


@needs_keras_hub
def test_what_is_no_image_preset_is_refused(tmp_path):
    import keras_hub

    text = keras_hub.models.BertBackbone(
        vocabulary_size=10, num_layers=1, num_heads=1, hidden_dim=4, intermediate_dim=4, max_sequence_length=4
    )
    with pytest.raises(InputError, match=r"is a BertBackbone, which takes no RGB images"):
        get_source(f"kerashub:{saved(text, tmp_path / 'text', converter=False)}")
    with pytest.raises(InputError, match=r"is no folder"):
        get_source(f"kerashub:{tmp_path}/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config.json"):
        get_source(f"kerashub:{tmp_path}/empty")
    with pytest.raises(InputError, match=r"has weights of its own"):
        get_source("kerashub:vit_base", weights="x.h5")
    hostile = tmp_path / "hostile"
    saved(tiny("vit"), hostile)
    config = json.loads((hostile / "config.json").read_text())
    config["config"]["dtype"] = {"module": "os", "class_name": "system", "config": {}, "registered_name": None}
    (hostile / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"hostile/config.json"):
        get_source(f"kerashub:{hostile}")


# --- Folders as Hugging Face has them, and names -------------------------------------------------------------------

HF = {
    "model_type": "vit",
    "architectures": ["ViTModel"],
    "image_size": 32,
    "patch_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "qkv_bias": True,
}
HF_PREPROCESSOR = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "rescale_factor": 1 / 255, "resample": 2, "size": {"height": 32, "width": 32}, "image_processor_type": "ViT",
}  # fmt: skip


def hf_weights():
    random, width, inner = np.random.default_rng(0), HF["hidden_size"], HF["intermediate_size"]
    shapes = {
        "embeddings.patch_embeddings.projection.weight": (width, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 5, width),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for number in range(HF["num_hidden_layers"]):
        place = f"encoder.layer.{number}."
        dense = {f"attention.attention.{part}": (width, width) for part in ("query", "key", "value")}
        dense |= {"attention.output.dense": (width, width)}
        dense |= {"intermediate.dense": (inner, width), "output.dense": (width, inner)}
        for name, shape in dense.items():
            shapes |= {f"{place}{name}.weight": shape, f"{place}{name}.bias": shape[:1]}
        for name in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{place}{name}.weight": (width,), f"{place}{name}.bias": (width,)}
    return {f"vit.{name}": random.normal(0, 0.3, shape).astype("float32") for name, shape in shapes.items()}


def numpy_vit(weights, images):
    """The paper's network by hand, in torch's layout: the class token behind the last normalisation."""

    def at(name):
        return weights[f"vit.{name}"].astype(float)

    def dense(x, name):
        return x @ at(f"{name}.weight").T + at(f"{name}.bias")

    def normed(x, name):
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return (x - x.mean(-1, keepdims=True)) / deviation * at(f"{name}.weight") + at(f"{name}.bias")

    def attended(x, place):
        count, tokens, width = x.shape
        q, k, v = (
            dense(x, f"{place}attention.attention.{part}").reshape(count, tokens, 2, width // 2).transpose(0, 2, 1, 3)
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // 2))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        return dense(mixed.transpose(0, 2, 1, 3).reshape(count, tokens, width), f"{place}attention.output.dense")

    def gelu(x):
        from scipy.special import erf

        return x * (1 + erf(x / np.sqrt(2))) / 2

    count = len(images)
    patches = images.reshape(count, 2, 16, 2, 16, 3).transpose(0, 1, 3, 5, 2, 4).reshape(count, 4, -1)
    kernel = at("embeddings.patch_embeddings.projection.weight")
    x = patches @ kernel.reshape(len(kernel), -1).T + at("embeddings.patch_embeddings.projection.bias")
    x = np.concatenate([np.repeat(at("embeddings.cls_token"), count, 0), x], 1) + at("embeddings.position_embeddings")
    for number in range(2):
        place = f"encoder.layer.{number}."
        x = x + attended(normed(x, f"{place}layernorm_before"), place)
        x = x + dense(
            gelu(dense(normed(x, f"{place}layernorm_after"), f"{place}intermediate.dense")), f"{place}output.dense"
        )
    return normed(x, "layernorm")[:, 0]


def hf_folder(folder):
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(HF))
    (folder / "preprocessor_config.json").write_text(json.dumps(HF_PREPROCESSOR))
    save_file(hf_weights(), folder / "model.safetensors")
    return folder


def check_hf_source(source):
    card = get_source(source)
    assert card.image_size_px == 32 and card.architecture == "ViTBackbone"
    np.testing.assert_allclose(card.scale, [1 / 127.5] * 3, rtol=1e-6)
    np.testing.assert_allclose(card.offset, [-1.0] * 3, rtol=1e-6)
    images = np.random.default_rng(2).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = load_backbone(card)(images * np.float32(card.scale) + np.float32(card.offset), training=False)
    np.testing.assert_allclose(found, numpy_vit(hf_weights(), images / 127.5 - 1), atol=1e-4)


@needs_keras_hub
def test_a_folder_of_hugging_face_computes_what_the_paper_says(tmp_path):
    pytest.importorskip("safetensors")
    folder = hf_folder(tmp_path / "vit")
    check_hf_source(f"kerashub:{folder}")
    content = bytearray((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(InputError, match=r"model.safetensors"):
        get_source(f"kerashub:{folder}")


@needs_keras_hub
def test_a_name_comes_from_the_cache_of_hugging_face(tmp_path):
    """Filled as its library fills it, with links; the library reads where its cache is when it is imported."""
    pytest.importorskip("safetensors")
    files = hf_folder(tmp_path / "vit")
    repo = tmp_path / "hub" / "models--someone--tiny-vit"
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for file in files.iterdir():
        shutil.move(file, repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import test_kerashub as t; "
        "t.check_hf_source('kerashub:hf://someone/tiny-vit'); t.check_hf_source('kerashub:hf://someone/tiny-vit')\n"
        "try: t.get_source('kerashub:hf://someone/other')\n"
        "except t.InputError as e: assert 'could not be had' in str(e) and '\\n' not in str(e), e\n"
        "else: raise AssertionError"
    )
    environment = {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TFXFER_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache" / "kerashub").iterdir())) == 1


@needs_keras_hub
def test_offline_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TFXFER_CACHE", str(tmp_path))
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    for name in ("resnet_18_imagenet", "no_such_preset"):
        with pytest.raises(InputError, match=rf"preset 'kerashub:{name}' could not be had .*; go online, or") as caught:
            get_source(f"kerashub:{name}")
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "kerashub").iterdir())


@pytest.mark.skipif(INSTALLED, reason="keras-hub is installed")
def test_without_keras_hub_the_command_is_told():
    with pytest.raises(
        InputError, match=r"needs KerasHub, which is not installed; run: pip install 'tfxfer\[kerashub\]'"
    ):
        get_source("kerashub:resnet_18_imagenet")
