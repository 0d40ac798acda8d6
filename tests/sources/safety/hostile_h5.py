"""Hostile and damaged HDF5 files; see hostile_keras.py."""

import json
from pathlib import Path

import h5py
import keras
import numpy as np
from hostile_keras import code, dumped, lambda_layer, small
from keras import layers


def whole(folder: Path, change=None, training=None) -> Path:
    """A sound whole-model .h5 with its config changed."""
    path = folder / "hostile.h5"
    small().save(path)
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["model_config"])
        if change is not None:
            change(config)
        file.attrs["model_config"] = json.dumps(config)
        if training is not None:
            file.attrs["training_config"] = json.dumps({**json.loads(file.attrs["training_config"]), **training})
    return path


def weights(build, name="hostile.weights.h5"):
    """A builder of a weights file that `build(file, folder)` fills beside a sound array."""

    def write(folder, canary):
        path = folder / name
        with h5py.File(path, "w") as file:
            file["layers/dense/vars/0"] = np.ones((4, 3), "float32")
            build(file, folder)
        return path

    return write


def saved_lambda(folder, canary):
    path = folder / "hostile.h5"
    model = keras.Sequential([keras.Input((4,)), layers.Lambda(code(canary), output_shape=(4,)), layers.Dense(2)])
    model.save(path)
    canary.unlink(missing_ok=True)
    return path


def nested(layer):
    """A builder that puts `layer(canary)` into the nested model."""

    def write(folder, canary):
        def change(config):
            config["config"]["layers"][1]["config"]["layers"][1] = layer(canary)

        return whole(folder, change)

    return write


def legacy_lambda(canary):
    """As Keras 2 wrote it: bytecode, defaults, closure."""
    value = dumped(canary)["config"]["value"]
    text = value["code"] if isinstance(value, dict) else value[0]
    config = {"name": "hidden", "function": [text, None, None], "function_type": "lambda", "output_shape": [4]}
    return {"class_name": "Lambda", "config": config}


def passive(layer):
    """A nested object in the form in which Keras 3 reads legacy configs."""
    return lambda canary: {
        "class_name": "TimeDistributed",
        "config": {"name": "outer", "layer": {**layer(canary), "__passive_serialization__": True}},
    }


def plain(class_name, **config):
    return lambda canary: {"class_name": class_name, "config": {"name": "odd", **config}}


def external_storage(file, folder):
    (folder / "numbers.bin").write_bytes(bytes(48))
    file.create_dataset("layers/other", (4, 3), "float32", external=[(str(folder / "numbers.bin"), 0, 48)])


def virtual(file, folder):
    layout = h5py.VirtualLayout((4, 3), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "kernel", (4, 3))
    file.create_virtual_dataset("layers/virtual", layout)


def contiguous_bomb(file, folder):
    file.create_dataset("layers/huge", (2**15, 2**15), "float32")


def overflowing_bomb(file, folder):
    """So many that the bytes do not fit 64 bits."""
    file.create_dataset("layers/huge", (2**31, 2**31), "float64", chunks=(2**4, 2**4))


def chunked_bomb(file, folder):
    file.create_dataset("layers/huge", (2**15, 2**15), "float32", chunks=(2**10, 2**10), compression="gzip")


def chunk_bomb(file, folder):
    """A small array in one huge chunk."""
    file.create_dataset("layers/huge", (1, 1), "float32", chunks=(2**14, 2**14), maxshape=(None, None))


def many_small_bombs(file, folder):
    for number in range(40):
        file.create_dataset(f"layers/{number}", (2**22,), "float32", chunks=(2**10,), compression="gzip")


def reference(file, folder):
    data = file.create_dataset("layers/reference", (1,), dtype=h5py.ref_dtype)
    data[0] = file["layers/dense"].ref


def reference_attribute(file, folder):
    file["layers"].attrs["elsewhere"] = file["layers/dense"].ref


def ragged(file, folder):
    data = file.create_dataset("layers/ragged", (2,), dtype=h5py.vlen_dtype(np.float32))
    data[0] = np.ones(3)


def texts(file, folder):
    file.create_dataset("layers/texts", data=["a", "b"], dtype=h5py.string_dtype())


def compound(file, folder):
    file["layers/compound"] = np.zeros(3, [("a", "f4"), ("b", "S4")])


def committed_type(file, folder):
    file["layers/type"] = np.dtype("float32")


def plug_in_filter(file, folder):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4, 3))
    properties.set_filter(32_015, h5py.h5z.FLAG_OPTIONAL, (1,))
    h5py.h5d.create(file.id, b"plugged", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4, 3)), properties)


def many_attributes(file, folder):
    for number in range(1_001):
        file.attrs[f"a{number}"] = number


def many_objects(file, folder):
    for number in range(20_000):
        file.create_group(f"g{number}")


def nested_deep(file, folder):
    file.create_group("/".join("a" * 80))


def config_array(file, folder):
    file.attrs["model_config"] = np.array([b"{}", b"{}"])


def truncated(folder, canary):
    path = whole(folder)
    path.write_bytes(path.read_bytes()[:-600])
    return path


def flipped(offset, mask=0xFF):
    """A builder that flips bits of the superblock or of the root group's header."""

    def write(folder, canary):
        path = whole(folder)
        content = bytearray(path.read_bytes())
        content[offset] ^= mask
        path.write_bytes(bytes(content))
        return path

    return write


def other_content(content):
    def write(folder, canary):
        path = folder / "hostile.h5"
        path.write_bytes(content)
        return path

    return write


def external_link(file, folder):
    file["layers/other"] = h5py.ExternalLink("/etc/secret.h5", "/layers")


def soft_link(file, folder):
    file["layers/soft"] = h5py.SoftLink("/layers/dense")


def training(**changes):
    return lambda folder, canary: whole(folder, training=changes)


CASES = {
    "h5_lambda": (saved_lambda, "Lambda"),
    "h5_lambda_nested": (nested(lambda canary: lambda_layer(dumped(canary))), "Lambda"),
    "h5_lambda_of_keras_2": (nested(legacy_lambda), "Lambda"),
    "h5_lambda_passive": (nested(passive(legacy_lambda)), "Lambda"),
    "h5_code_as_activation": (
        nested(lambda canary: plain("Dense", units=3, activation=dumped(canary))(canary)),
        "__lambda__",
    ),
    "h5_tfsm_layer": (nested(plain("TFSMLayer", filepath="/tmp/evil")), "TFSMLayer"),
    "h5_tensorflow_function": (nested(plain("TFOpLambda", function="io.write_file")), "io.write_file"),
    "h5_custom_class": (nested(plain("Custom>Evil")), "Custom>Evil"),
    "h5_unknown_class": (nested(plain("TensorFlowOpLayer", node_def="{}")), "TensorFlowOpLayer"),
    "h5_vocabulary_path": (nested(plain("StringLookup", vocabulary="/etc/passwd")), "/etc/passwd"),
    "h5_units_bomb": (nested(plain("Embedding", input_dim=10**7, output_dim=10**7)), "input_dim"),
    "h5_loss_unknown": (training(loss="os.system"), "os.system"),
    "h5_metric_lambda": (training(metrics=[{"class_name": "Lambda", "config": {}}]), "Lambda"),
    "h5_optimizer_unknown": (
        training(optimizer_config={"class_name": "Evil", "config": {}}),
        "Evil",
    ),
    "h5_external_link": (weights(external_link), "link to another file"),
    "h5_soft_link": (weights(soft_link), "soft link"),
    "h5_external_storage": (weights(external_storage), "stored in another file"),
    "h5_virtual": (weights(virtual), "virtual"),
    "h5_shape_bomb": (weights(contiguous_bomb), "32768x32768"),
    "h5_shape_bomb_64_bits": (weights(overflowing_bomb), "2147483648x2147483648"),
    "h5_shape_bomb_chunked": (weights(chunked_bomb), "32768x32768"),
    "h5_chunk_bomb": (weights(chunk_bomb), "declares"),
    "h5_sum_of_shapes_bomb": (weights(many_small_bombs), "declares arrays of"),
    "h5_reference": (weights(reference), "instead of numbers"),
    "h5_reference_attribute": (weights(reference_attribute), "neither number nor text"),
    "h5_ragged": (weights(ragged), "instead of numbers"),
    "h5_texts": (weights(texts), "instead of numbers"),
    "h5_compound": (weights(compound), "instead of numbers"),
    "h5_committed_type": (weights(committed_type), "neither an array nor a group"),
    "h5_plug_in_filter": (weights(plug_in_filter), "filter 32015"),
    "h5_many_attributes": (weights(many_attributes), "1,001 attributes"),
    "h5_many_objects": (weights(many_objects), "more than 20,000"),
    "h5_nested_deep": (weights(nested_deep), "too deep"),
    "h5_config_array": (weights(config_array), "not one text"),
    "h5_truncated": (truncated, "damaged"),
    "h5_flipped_signature": (flipped(1), "not HDF5"),
    "h5_flipped_superblock": (flipped(8), "damaged"),
    "h5_flipped_size": (flipped(44, 0x40), "damaged"),
    "h5_flipped_root": (flipped(64), "damaged"),
    "h5_html": (other_content(b"<html>404</html>" * 99), "not HDF5"),
    "h5_empty": (other_content(b""), "not HDF5"),
}
