"""What README's table says of each kind of source: load, blocks, partial freeze, train, reload, SavedModel, ONNX.

Each kind, as a user spells it, goes the whole way of plain Keras with weights that are a small network's own.
"""

import importlib.util
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import tfxfer
from tfxfer.sources import KINDS, PREFIXES, SUFFIXES
from tfxfer.sources.catalog import get_source

sys.path.append(str(Path(__file__).parents[1] / "sources"))  # the small networks of the tests of kinds

NAMES = ["a", "b", "c"]


def _hub(folder):
    import tensorflow as tf
    from hub_modules import Module, images_spec, network

    module = Module(network())
    module.__call__.get_concrete_function(images_spec(), training=False)
    module.__call__.get_concrete_function(images_spec(), training=True)
    tf.saved_model.save(module, str(folder / "module"))
    return f"hub:{folder / 'module'}", {}, 32


def _keras(folder):
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNet(
        weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3), alpha=1.0
    )
    model.save_weights(folder / "mobilenet.weights.h5")
    return "keras:mobilenet", {"weights": folder / "mobilenet.weights.h5"}, 32


def _kerashub(folder):
    keras_hub = pytest.importorskip("keras_hub")
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64], input_conv_kernel_sizes=[3], stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2], block_type="basic_block", image_shape=(32, 32, 3),
    )  # fmt: skip
    backbone.save_to_preset(str(folder / "preset"))
    return f"kerashub:{folder / 'preset'}", {"input_range": "0..1"}, 32


def _file(suffix):
    def make(folder):
        from keras_networks import nested, with_values

        path = folder / f"whole{suffix}"
        with_values(nested()).save(path)
        return str(path), {}, 32

    return make


def _torch(folder):
    from tfxfer.sources.torch_checkpoint import weights_path

    card = get_source("efficientnet_lite0_imagenet")
    if importlib.util.find_spec(card.weights["package"]) is None:
        pytest.skip(f"weights not installed: {card.weights['install']}")
    return "torch:efficientnet_lite0", {"weights": weights_path(card)}, 32


def _own(folder):
    (folder / "own_network.py").write_text(
        "import sys; sys.path.append({!r})\n"
        "from keras_networks import nested, with_values\n"
        "def network():\n    return with_values(nested())\n".format(str(Path(__file__).parents[1] / "sources"))
    )
    sys.path.append(str(folder))
    return "py:own_network:network", {}, 32


def _run(folder):
    from sklearn.datasets import load_digits

    digits = load_digits(n_class=3)
    images = np.repeat(digits.images[..., None] * 15, 3, axis=-1)
    options = {"method": "probe", "baseline": "none", "formats": (), "progress": tfxfer.Progress()}
    tfxfer.fit("digits_cnn", (images[:200], digits.target[:200]), out=folder / "run", **options)
    return f"run:{folder / 'run'}", {}, 32


WAYS = {
    "digits_cnn": lambda folder: ("digits_cnn", {}, 32),
    "hub": _hub,
    "keras": _keras,
    "kerashub": _kerashub,
    ".keras": _file(".keras"),
    ".h5": _file(".h5"),
    "torch": _torch,
    "py": _own,
    "run": _run,
}


def test_every_spelling_has_its_way_and_every_kind_its_module():
    assert {*PREFIXES, *SUFFIXES} == set(WAYS) - {"digits_cnn"}
    for name, module in KINDS.items():
        if name == "kerashub" and importlib.util.find_spec("keras_hub") is None:
            continue
        assert callable(module().load)
        assert name == "keras_h5" or callable(module().describe)


@pytest.mark.parametrize("way", WAYS)
def test_a_source_of_each_kind_goes_the_whole_way(way, tmp_path):
    spelling, options, size_px = WAYS[way](tmp_path)
    card = get_source(spelling, **options)
    model = tfxfer.build_model(card, NAMES, image_size=size_px)
    again = tfxfer.build_model(card, NAMES, image_size=size_px)
    backbone = model.layers[-4] if isinstance(model.layers[-4], keras.Model) else None
    assert backbone is not None
    for one, other in zip(backbone.weights, again.layers[-4].weights, strict=True):  # the source's, not random ones
        np.testing.assert_array_equal(one.numpy(), other.numpy())

    blocks = tfxfer.list_blocks(model)
    assert len(blocks) >= 2 and sum(block.num_parameters for block in blocks) == backbone.count_params()
    assert card.weights == {} or len(card.weights["sha256"]) == 64

    tfxfer.freeze(model, 0.5, batch_norm="affine")
    layers = tfxfer.list_layers(model)
    frozen = {state.layer for state in layers if not state.num_trainable}
    assert frozen and any(state.num_trainable for state in layers if state.block != "head")
    before, digests = {v.path: v.numpy().copy() for v in backbone.weights}, tfxfer.digest_frozen(model)
    images = np.random.default_rng(0).integers(0, 256, (16, 40, 40, 3), np.uint8)
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy")
    model.fit(images, np.arange(16) % 3, epochs=2, verbose=0)
    tfxfer.audit_frozen(model, digests)
    moved = {v.path for v in backbone.weights if not np.array_equal(v.numpy(), before[v.path])}
    assert digests and moved and not moved & set(digests)

    expected = model.predict(images, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(loaded.predict(images, verbose=0), expected, atol=1e-6)

    samples = np.random.default_rng(1).integers(0, 256, (4, size_px, size_px, 3), np.uint8)
    certificates = tfxfer.export(model, tmp_path / "exports", samples=samples, class_names=NAMES)
    assert [(certificate.format, certificate.passed) for certificate in certificates] == [
        ("saved_model", True),
        ("onnx", True),
    ]
