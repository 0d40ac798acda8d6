"""The rules of the gate one by one: trust, finite weights, bounds for loaders, unpacking, what is checked how."""

import json
import shutil

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from hostile_files import tarred
from hostile_keras import edited, put_activation, relabelled, rewritten
from hostile_saved_model import sound

from tfxfer.errors import InputError
from tfxfer.sources import safety
from tfxfer.sources.safety.keras_config import check_config
from tfxfer.sources.safety.keras_names import CLASSES


@keras.saving.register_keras_serializable(package="photos")
class Doubled(keras.layers.Layer):
    """A user's own layer; its module is this test."""

    def call(self, x):
        return 2 * x


@pytest.fixture
def own(tmp_path):
    """A model with a layer of the user's own, in both formats."""
    model = keras.Sequential([keras.Input((4,)), Doubled(name="own"), keras.layers.Dense(2)])
    model.save(tmp_path / "own.keras")
    model.save(tmp_path / "own.h5")
    return tmp_path


@pytest.mark.parametrize("name", ["own.keras", "own.h5"])
def test_a_trusted_module_may_stand_in_a_config(own, name):
    with pytest.raises(InputError, match=r"photos>Doubled.*--trust-custom-objects"):
        safety.check_model_file(own / name)
    with pytest.raises(InputError, match="photos>Doubled"):
        safety.check_model_file(own / name, trusted=("other", "test_safety", "Doubled"))
    safety.check_model_file(own / name, trusted=(Doubled.__module__,))
    assert keras.models.load_model(own / name).get_layer("own")


def test_trust_never_lets_code_through(tmp_path):
    path = edited(put_activation)(tmp_path, tmp_path / "canary")
    for trusted in ("keras", "keras.layers", "builtins", "os", "evil", ""):
        with pytest.raises(InputError, match="__lambda__"):
            safety.check_model_file(path, trusted=(trusted,))
    disguised = {"module": "mine", "class_name": "Lambda", "registered_name": "mine>Lambda"}
    path = relabelled(**disguised)(tmp_path, None)
    with pytest.raises(InputError, match="Lambda"):
        safety.check_model_file(path, trusted=("mine",))
    path = relabelled(module="mine", class_name="Own", registered_name="tfxfer>HubLayer")(tmp_path, None)
    with pytest.raises(InputError, match="HubLayer"):
        safety.check_model_file(path, trusted=("mine",))


@pytest.mark.parametrize("module", ["os", "subprocess", "keras", "tensorflow", "builtins"])
def test_libraries_cannot_be_trusted(tmp_path, module):
    path = relabelled(module=f"{module}.path", class_name="Own", registered_name="Own")(tmp_path, None)
    with pytest.raises(InputError, match="not on the list"):
        safety.check_model_file(path, trusted=(module, f"{module}.path"))


def test_every_public_layer_is_on_the_list_or_left_out_on_purpose():
    left_out = {"Lambda", "TFSMLayer", "JaxLayer", "FlaxLayer", "TorchModuleWrapper", "InputSpec"}
    public = {name for name in dir(keras.layers) if isinstance(getattr(keras.layers, name), type)}
    assert public - CLASSES["keras.layers"] <= left_out
    assert not left_out & CLASSES["keras.layers"]


def test_keras_hub_classes_pass_by_name(tmp_path):
    backbone = {
        "module": "keras_hub.src.models.vit.vit_backbone",
        "class_name": "ViTBackbone",
        "registered_name": "keras_hub>ViTBackbone",
        "config": {"name": "vit", "num_layers": 2, "activation": "gelu_approximate"},
    }
    check_config(json.dumps(backbone).encode(), tmp_path, "config")
    for change in ({"module": "keras_hub_evil.src.models"}, {"class_name": "ViTBackbon"}, {"registered_name": None}):
        with pytest.raises(InputError, match="not on the list"):
            check_config(json.dumps({**backbone, **change}).encode(), tmp_path, "config")
    tokenizer = {
        "module": "keras_hub.src.models.bert.bert_tokenizer",
        "class_name": "BertTokenizer",
        "registered_name": "keras_hub>BertTokenizer",
        "config": {"name": "words", "vocabulary": "/etc/passwd"},
    }
    with pytest.raises(InputError, match="/etc/passwd"):
        check_config(json.dumps(tokenizer).encode(), tmp_path, "config")


def test_nan_and_infinity_are_named():
    safety.check_finite({"a": np.ones(3), "b": np.arange(3), "c": np.ones(2, ml_dtypes.bfloat16)})
    for bad in (np.nan, np.inf, -np.inf):
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            with pytest.raises(InputError, match=r"'head/kernel' \(1 of 4 numbers\)"):
                safety.check_finite([("a", np.ones(3)), ("head/kernel", np.array([[1, bad], [0, 1]], dtype))])


def test_a_loader_gets_no_more_than_its_model_takes(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["a/kernel"], file["b/kernel"] = np.ones((4, 3), "float32"), np.ones((100,), "float32")
    with h5py.File(tmp_path / "w.h5") as file:
        assert sorted(name for name, _ in safety.bounded_datasets(file, 448)) == ["a/kernel", "b/kernel"]
        with pytest.raises(InputError, match="'b/kernel' declare 448 bytes, and the model takes 447"):
            list(safety.bounded_datasets(file, 447))


def test_a_refused_archive_leaves_nothing(tmp_path):
    path = tarred(("z/../../../canary", b"ran"))(tmp_path, tmp_path / "canary")
    with pytest.raises(InputError, match="outside"):
        safety.extract_archive(path, tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("canary"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(InputError, match="not an empty folder"):
        safety.extract_archive(path, tmp_path / "used")


def test_the_name_decides_since_loaders_go_by_it(tmp_path):
    h5 = tmp_path / "model.keras"
    with h5py.File(h5, "w") as file:
        file["a"] = np.ones(3)
    with pytest.raises(InputError, match="not a zip"):
        safety.check_model_file(h5)
    safety.check_model_file(shutil.copy(h5, tmp_path / "model.H5"))
    safety.check_model_file(shutil.copy(h5, tmp_path / "without_suffix"))
    archive = rewritten(tmp_path)
    safety.check_model_file(shutil.copy(archive, tmp_path / "download"))
    with pytest.raises(InputError, match="not HDF5"):
        safety.check_model_file(shutil.copy(archive, tmp_path / "archive.h5"))


def test_folders_are_checked_whole(tmp_path):
    preset = tmp_path / "preset"
    preset.mkdir()
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(preset / "model.weights.h5")
    config = {"module": "keras", "class_name": "Sequential", "config": {"layers": []}, "registered_name": None}
    (preset / "config.json").write_text(json.dumps(config))
    (preset / "tokenizer.json").write_text('{"model": {"vocab": {"class": 1}}}')
    safety.check_model_file(preset)
    (preset / "task.json").write_text(json.dumps({"class_name": "Lambda", "config": {}}))
    with pytest.raises(InputError, match=r"task\.json.*Lambda"):
        safety.check_model_file(preset)


def test_bad_paths_are_said_plainly(tmp_path):
    (tmp_path / "notes.txt").write_text("hello, this is no model")
    for path, reason in ((tmp_path / "none.keras", "does not exist"), (tmp_path / "notes.txt", "is no model file")):
        with pytest.raises(InputError, match=reason):
            safety.check_model_file(path)
    with pytest.raises(InputError, match="is no model file"):
        safety.check_model_file(tmp_path)
    safety.check_model_file(sound(tmp_path))
