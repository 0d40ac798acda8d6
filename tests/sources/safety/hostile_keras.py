"""Hostile and damaged .keras files: each builder writes one into a folder and returns its path.

`CASES` says of each what the refusal must name. A builder gets the path of a canary; whatever could run would write it.
"""

import copy
import io
import json
import struct
import zipfile
from pathlib import Path

import h5py
import keras
from keras import layers

DENSE = {"module": "keras.layers", "class_name": "Dense", "registered_name": None}


def code(canary: Path):
    """A lambda that writes the canary; its path is a constant of the code, as an attacker would have it."""
    return eval(f"lambda x: __import__('pathlib').Path({str(canary)!r}).write_text('ran') and x")


def dumped(canary: Path) -> dict:
    """The same as Keras writes it into a config."""
    from keras.src.utils.python_utils import func_dump

    return {"class_name": "__lambda__", "config": {"value": func_dump(code(canary))}}


def small() -> keras.Model:
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="deep", activation="relu")], name="inner")
    inputs = keras.Input((4,), name="images")
    model = keras.Model(inputs, layers.Dense(2, name="head")(inner(inputs)), name="small")
    model.compile("adam", "mse", metrics=["mae"])
    return model


def rewritten(folder: Path, change=None, members=None, **options) -> Path:
    """A sound .keras file with its config changed in place, or with other members."""
    sound = folder / "sound.keras"
    if not sound.exists():
        small().save(sound)
    with zipfile.ZipFile(sound) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    if change is not None:
        config = json.loads(content["config.json"])
        change(config)
        content["config.json"] = json.dumps(config).encode()
    content.update(members or {})
    path = folder / "hostile.keras"
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, value in content.items():
            if value is not None:
                archive.writestr(name, value)
    return path


def deep(config) -> dict:
    """The Dense layer of the nested model."""
    return config["config"]["layers"][1]["config"]["layers"][1]


def lambda_layer(function) -> dict:
    return {
        "module": "keras.layers",
        "class_name": "Lambda",
        "registered_name": None,
        "config": {"name": "hidden", "function": function, "arguments": {}},
    }


def saved(folder: Path, canary: Path, build) -> Path:
    """A model with a real Lambda, saved by Keras itself; building it runs the code once."""
    path = folder / "hostile.keras"
    build(layers.Lambda(code(canary), output_shape=(4,), name="hidden")).save(path)
    canary.unlink(missing_ok=True)
    return path


def lambda_flat(folder, canary):
    return saved(folder, canary, lambda layer: keras.Sequential([keras.Input((4,)), layer, layers.Dense(2)]))


def lambda_in_nested_model(folder, canary):
    def build(layer):
        inner = keras.Sequential([keras.Input((4,)), layer])
        return keras.Sequential([keras.Input((4,)), keras.Sequential([keras.Input((4,)), inner]), layers.Dense(2)])

    return saved(folder, canary, build)


def lambda_in_time_distributed(folder, canary):
    return saved(folder, canary, lambda layer: keras.Sequential([keras.Input((3, 4)), layers.TimeDistributed(layer)]))


def lambda_in_wrappers(folder, canary):
    def change(config):
        inner = lambda_layer(dumped(canary))
        for name in ("SpectralNormalization", "TimeDistributed", "Bidirectional"):
            inner = {"module": "keras.layers", "class_name": name, "config": {"name": name, "layer": inner}}
        config["config"]["layers"][1]["config"]["layers"][1] = inner

    return rewritten(folder, change)


def edited(place):
    """A builder that puts a dumped lambda where `place(config, code)` says."""
    return lambda folder, canary: rewritten(folder, lambda config: place(config, dumped(canary)))


def put_activation(config, value):
    deep(config)["config"]["activation"] = value


def put_initializer(config, value):
    deep(config)["config"]["kernel_initializer"] = value


def put_loss(config, value):
    config["compile_config"]["loss"] = {"head": [value]}


def put_metric(config, value):
    config["compile_config"]["metrics"] = [[value]]


def put_call_argument(config, value):
    config["config"]["layers"][1]["inbound_nodes"][0]["kwargs"]["mask"] = {"a": [value]}


def replaced(value):
    """A builder that puts a value in the place of the nested Dense layer."""

    def change(config):
        config["config"]["layers"][1]["config"]["layers"][1] = copy.deepcopy(value)

    return lambda folder, canary: rewritten(folder, change)


def merged(**changes):
    """A builder that changes keys of the nested Dense layer's own config."""
    return lambda folder, canary: rewritten(folder, lambda config: deep(config)["config"].update(changes))


def relabelled(**changes):
    """A builder that changes what the nested Dense layer is called."""
    return lambda folder, canary: rewritten(folder, lambda config: deep(config).update(changes))


def built_in(class_name, **config):
    return replaced({"module": "keras.layers", "class_name": class_name, "config": {"name": "odd", **config}})


def function(module, name):
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def config_text(text):
    return lambda folder, canary: rewritten(folder, members={"config.json": text})


def zip_bombed_config(folder, canary):
    text = b'{"a": "' + b" " * (17 * 2**20) + b'"}'
    return rewritten(folder, members={"config.json": text}, compression=zipfile.ZIP_DEFLATED)


def member(name, content=b"ran"):
    return lambda folder, canary: rewritten(folder, members={name: content})


def symlink_member(folder, canary):
    path = rewritten(folder)
    info = zipfile.ZipInfo("assets")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc")
    return path


def duplicate_config(folder, canary):
    path = rewritten(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(
            "Config.json",
            json.dumps(lambda_layer(dumped(canary))),
        )
    return path


def encrypted_flag(folder, canary):
    content = bytearray(rewritten(folder).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(signature, at + 4)
    return written(folder, bytes(content))


def weights_bomb(folder, canary):
    zeros = io.BytesIO()
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        with zipfile.ZipFile(rewritten(folder)) as sound:
            archive.writestr("config.json", sound.read("config.json"))
        with archive.open("model.weights.h5", "w", force_zip64=True) as file:
            for _ in range(200):
                file.write(bytes(2**20))
    return written(folder, zeros.getvalue())


def lying_size(folder, canary):
    """A deflated member whose list entry declares a small size: the stream goes on."""
    path = rewritten(folder, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    while b"config.json" not in content[at : at + 60]:
        at = content.find(b"PK\x01\x02", at + 4)
    struct.pack_into("<L", content, at + 24, 64)
    return written(folder, bytes(content))


def overlapping(folder, canary):
    """The list names one stored block twice."""
    content = rewritten(folder, members={"assets/a": b"a" * 64, "assets/b": b"a" * 64}).read_bytes()
    first, second = (content.find(b"assets/" + letter, 0) - 30 for letter in (b"a", b"b"))
    at = content.rfind(b"assets/b") - 46
    assert struct.unpack_from("<L", content, at + 42)[0] == second
    changed = bytearray(content)
    struct.pack_into("<L", changed, at + 42, first + 8)
    return written(folder, bytes(changed))


def written(folder: Path, content: bytes, name="hostile.keras") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def truncated(folder, canary):
    content = rewritten(folder).read_bytes()
    return written(folder, content[: len(content) * 2 // 3])


def flipped(at_marker: bytes, offset: int):
    def build(folder, canary):
        content = bytearray(rewritten(folder).read_bytes())
        content[content.find(at_marker) + offset] ^= 0x10
        return written(folder, bytes(content))

    return build


def many_members(folder, canary):
    path = rewritten(folder)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(20_001):
            archive.writestr(f"assets/{number}", b"")
    return path


def weights_with_external_link(folder, canary):
    file = io.BytesIO()
    with h5py.File(file, "w") as weights:
        weights["layers"] = h5py.ExternalLink("/etc/other.h5", "/layers")
    return rewritten(folder, members={"model.weights.h5": file.getvalue()})


def weights_with_shape_bomb(folder, canary):
    file = io.BytesIO()
    with h5py.File(file, "w") as weights:
        weights.create_dataset("layers/dense/vars/0", (2**20, 2**20), "float32")
    return rewritten(folder, members={"model.weights.h5": file.getvalue()})


NUMPY_BOMB = {"class_name": "__numpy__", "config": {"value": ["a"], "dtype": "S4000000000"}}
TYPESPEC = {
    "class_name": "__typespec__",
    "spec_name": "Popen",
    "module": "subprocess",
    "config": [],
    "registered_name": None,
}

CASES = {
    "lambda_flat": (lambda_flat, "Lambda"),
    "lambda_in_nested_model": (lambda_in_nested_model, "Lambda"),
    "lambda_in_time_distributed": (lambda_in_time_distributed, "Lambda"),
    "lambda_in_three_wrappers": (lambda_in_wrappers, "Lambda"),
    "code_as_activation": (edited(put_activation), "__lambda__"),
    "code_as_initializer": (edited(put_initializer), "__lambda__"),
    "code_as_loss": (edited(put_loss), "__lambda__"),
    "code_as_metric": (edited(put_metric), "__lambda__"),
    "code_as_call_argument": (edited(put_call_argument), "__lambda__"),
    "tfsm_layer": (built_in("TFSMLayer", filepath="/tmp/evil"), "TFSMLayer"),
    "torch_module": (built_in("TorchModuleWrapper", module="gASVAAAA"), "TorchModuleWrapper"),
    "jax_layer": (built_in("JaxLayer", call_fn="f"), "JaxLayer"),
    "unknown_builtin": (built_in("LayerOfTomorrow"), "LayerOfTomorrow"),
    "vocabulary_path": (built_in("StringLookup", vocabulary="/etc/passwd"), "/etc/passwd"),
    "text_vocabulary_path": (built_in("TextVectorization", vocabulary="../secret.txt"), "secret.txt"),
    "os_system_function": (merged(activation=function("os", "system")), "'system' of 'os'"),
    "eval_function": (merged(activation=function("builtins", "eval")), "'eval' of 'builtins'"),
    "get_file_function": (merged(activation=function("keras.utils", "get_file")), "get_file"),
    "load_model_function": (merged(kernel_initializer=function("keras.saving", "load_model")), "load_model"),
    "function_by_text": (merged(activation="os.system"), "os.system"),
    "custom_function_by_text": (merged(bias_regularizer="Custom>evil"), "Custom>evil"),
    "popen_class": (relabelled(module="subprocess", class_name="Popen"), "Popen"),
    "custom_class": (relabelled(module="evil.layers", class_name="Evil", registered_name="evil>Evil"), "evil.layers"),
    "hub_layer_in_disguise": (relabelled(registered_name="tfxfer>HubLayer"), "tfxfer>HubLayer"),
    "registered_in_disguise": (relabelled(registered_name="Custom>Evil"), "Custom>Evil"),
    "keras_hub_in_disguise": (
        relabelled(module="keras_hub.src.utils.evil", class_name="download", registered_name="keras_hub>download"),
        "download",
    ),
    "class_that_is_no_name": (relabelled(class_name={"module": "os"}), "no name"),
    "typespec": (merged(name=TYPESPEC), "__typespec__"),
    "numpy_bomb": (merged(kernel_initializer=NUMPY_BOMB), "S4000000000"),
    "units_bomb": (merged(units=10**12), "1,000,000,000,000"),
    "config_zip_bomb": (zip_bombed_config, "16,777,216"),
    "config_nested_deep": (config_text(b"[" * 200_000 + b"]" * 200_000), "nested too deep"),
    "config_of_brackets": (config_text(b"[" + b"[]," * 1_000_001 + b"0]"), "1,000,000 parts"),
    "config_cut": (config_text(b'{"class_name": "Sequ'), "not JSON"),
    "config_missing": (member("config.json", None), "config.json"),
    "weights_missing": (member("model.weights.h5", None), "model.weights.h5"),
    "weights_no_hdf5": (member("model.weights.h5", b"PK" + bytes(600)), "not HDF5"),
    "member_above": (member("../canary"), "outside"),
    "member_absolute": (member("/tmp/canary"), "outside"),
    "member_on_drive": (member("assets/C:canary"), "outside"),
    "member_backslash": (member("assets\\..\\..\\canary"), "outside"),
    "member_symlink": (symlink_member, "link"),
    "member_twice": (duplicate_config, "twice"),
    "member_encrypted": (encrypted_flag, "encrypted"),
    "members_too_many": (many_members, "20,00"),
    "members_overlap": (overlapping, "overlaps"),
    "weights_zip_bomb": (weights_bomb, "zip bomb"),
    "size_that_lies": (lying_size, "damaged"),
    "weights_external_link": (weights_with_external_link, "link to another file"),
    "weights_shape_bomb": (weights_with_shape_bomb, "1048576x1048576"),
    "truncated": (truncated, "zip|end"),
    "flipped_list": (flipped(b"PK\x01\x02", 2), "zip"),
    "flipped_config": (flipped(b'"class_name"', 4), "damaged"),
}
