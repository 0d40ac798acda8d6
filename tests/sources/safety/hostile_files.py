"""Hostile and damaged torch checkpoints, .safetensors and .tar.gz files; see hostile_keras.py."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
from hostile_saved_model import saved, sound, write_file
from torch_writer import Call, Global, Tensor, dumps, write_new, write_old

KERNEL = np.arange(12, dtype="float32").reshape(3, 4)


def state(*extra):
    return OrderedDict([("fc.weight", Tensor(KERNEL, 0)), ("fc.bias", Tensor(np.ones(3, "float32"), 1)), *extra])


def system(canary):
    return Call(os.system, f"touch {canary}")


def evaluated(canary):
    return Call(eval, f"open({str(canary)!r}, 'w')")


def imported(canary):
    return Call(Call(getattr, Call(Global("importlib", "import_module"), "os"), "system"), f"touch {canary}")


def executed(canary):
    return Call(exec, f"open({str(canary)!r}, 'w')")


def opened(canary):
    return Call(open, str(canary), "w")


def old(call, protocol=2):
    return lambda folder, canary: write_old(folder / "hostile.pth", state(("evil", call(canary))), protocol)


def new(call, protocol=2, name="hostile.pt"):
    return lambda folder, canary: write_new(folder / name, state(("evil", call(canary))), protocol)


def raw(content, name="hostile.pth"):
    """A file of what `content(canary)` gives."""

    def write(folder, canary):
        path = folder / name
        path.write_bytes(content(canary))
        return path

    return write


def bare(call, protocol):
    return raw(lambda canary: dumps({"weights": call(canary)}, protocol))


def in_first_part(folder, canary):
    """The pickle that readers take for the magic number."""
    sound_file = write_old(folder / "hostile.bin", state()).read_bytes()
    (folder / "hostile.bin").write_bytes(dumps(system(canary)) + sound_file)
    return folder / "hostile.bin"


def inst_opcode(canary):
    return b"\x80\x02(S'touch " + str(canary).encode() + b"'\nios\nsystem\n."


def computed_name(canary):
    """STACK_GLOBAL on a name that a call has made."""
    return b"\x80\x04\x8c\x02os\x8c\x06system\x94\x85R\x93."


def memo_bomb(canary):
    return b"\x80\x02}r\xff\xff\xff\x7f."


def huge_text(canary):
    return b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a."


def huge_frame(canary):
    return b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}."


def many_opcodes(canary):
    return b"\x80\x02" + b"N0" * 1_000_001 + b"N."


def extension(canary):
    return b"\x80\x02\x82\x01."


def cut(write, share, name):
    def build(folder, canary):
        path = write(folder / name, state())
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return path

    return build


def flipped_old(folder, canary):
    path = write_old(folder / "hostile.pth", state())
    content = bytearray(path.read_bytes())
    content[content.index(b"_rebuild_tensor_v2")] ^= 0x01
    path.write_bytes(bytes(content))
    return path


def tensor(**options):
    values = options.pop("values", KERNEL)
    return lambda folder, canary: write_new(folder / "hostile.pth", OrderedDict(a=Tensor(values, 0, **options)))


def lost_storage(folder, canary):
    return write_new(folder / "hostile.pth", dumps(state()))


def torch_script(folder, canary):
    extra = [("archive/code/__torch__.py", "import os"), ("archive/constants.pkl", b"\x80\x02).")]
    return write_new(folder / "hostile.pt", state(), extra=extra)


def torch_climbs(folder, canary):
    return write_new(folder / "hostile.pth", state(), extra=[("archive/../../canary", b"ran")])


def torch_compressed(folder, canary):
    return write_new(folder / "hostile.pth", state(), compression=zipfile.ZIP_DEFLATED)


def trailing_pickle(folder, canary):
    return write_new(folder / "hostile.pth", dumps(OrderedDict()) + dumps(system(canary)))


def html(canary):
    return b"<!DOCTYPE html><html>not found</html>"


def tensors(change=None, header=None, numbers=48, size=None):
    """A .safetensors file with one array, its header changed."""

    def write(folder, canary):
        table = {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}
        if change:
            change(table)
        text = json.dumps(table).encode() if header is None else header
        path = folder / "hostile.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + bytes(numbers))
        return path

    return write


def entry(**changes):
    return tensors(lambda table: table["a"].update(changes))


def second(offsets):
    return tensors(lambda table: table.update(b={"dtype": "F32", "shape": [2], "data_offsets": offsets}))


def tarred(*members, mode="w:gz"):
    """A .tar.gz of a sound SavedModel and these members: name, content or changes of its header."""

    def write(folder, canary):
        path = folder / "hostile.tar.gz"
        with tarfile.open(path, mode) as tar:
            tar.add(sound(folder), ".")
            for name, content in members:
                info = tarfile.TarInfo(name)
                if isinstance(content, bytes):
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                else:
                    for key, value in content.items():
                        setattr(info, key, value)
                    tar.addfile(info)
        return path

    return write


def tar_of_zeros(folder, canary):
    path = folder / "hostile.tar.gz"
    info = tarfile.TarInfo("variables/zeros")
    info.size = 200 * 2**20
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(info.tobuf())
        for _ in range(200):
            file.write(bytes(2**20))
        file.write(bytes(1024))
    return path


def tar_of_long_name(folder, canary):
    path = folder / "hostile.tar.gz"
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**32
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf())
        file.write(bytes(2**20))
    return path


def tar_cut(folder, canary):
    path = tarred()(folder, canary)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def tar_flipped(folder, canary):
    path = tarred()(folder, canary)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x08
    path.write_bytes(bytes(content))
    return path


def tar_of_writer(folder, canary):
    path = folder / "hostile.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(saved(write_file)(folder, canary), "model")
    return path


CASES = {
    "torch_old_system": (old(system), "posix.system"),
    "torch_old_eval": (old(evaluated), "eval"),
    "torch_old_import": (old(imported), "getattr"),
    "torch_old_exec_protocol_3": (old(executed, 3), "exec"),
    "torch_old_system_protocol_4": (old(system, 4), "posix.system"),
    "torch_old_open_protocol_5": (old(opened, 5), "open"),
    "torch_old_first_part": (in_first_part, "posix.system"),
    "torch_new_system": (new(system), "posix.system"),
    "torch_new_eval_protocol_3": (new(evaluated, 3), "eval"),
    "torch_new_import_protocol_4": (new(imported, 4), "getattr"),
    "torch_new_system_protocol_5": (new(system, 5, "pytorch_model.bin"), "posix.system"),
    "torch_bare_pickle": (bare(system, 2), "posix.system"),
    "torch_bare_pickle_protocol_4": (bare(evaluated, 4), "eval"),
    "torch_plain_pickle": (raw(lambda canary: pickle.dumps({"a": 1})), "no torch checkpoint"),
    "torch_text_pickle": (raw(lambda canary: b"cos\nsystem\n(S'ls'\ntR."), "not a torch checkpoint"),
    "torch_inst": (raw(inst_opcode), "INST"),
    "torch_extension": (raw(extension), "EXT1"),
    "torch_computed_name": (raw(computed_name), "computed"),
    "torch_memo_bomb": (raw(memo_bomb), "memo"),
    "torch_huge_text": (raw(huge_text), "damaged"),
    "torch_huge_frame": (raw(huge_frame), "announces"),
    "torch_many_opcodes": (raw(many_opcodes), "1,000,000"),
    "torch_trailing_pickle": (trailing_pickle, "goes on"),
    "torch_old_truncated_pickle": (cut(write_old, 0.5, "hostile.pth"), "damaged"),
    "torch_old_truncated_numbers": (cut(write_old, 0.97, "hostile.pth"), "ends"),
    "torch_new_truncated": (cut(write_new, 0.7, "hostile.pth"), "zip"),
    "torch_old_flipped": (flipped_old, "rebuild_tensor_v2"),
    "torch_beyond_storage": (tensor(shape=(10**6, 4), strides=(4, 1)), "leaves its storage"),
    "torch_negative": (tensor(shape=(3, 4), strides=(4, 1), offset=-(10**6)), "negative"),
    "torch_repeated": (tensor(shape=(2**20, 2**20), strides=(0, 0)), "leaves its storage"),
    "torch_storage_bomb": (tensor(length=2**40), "instead of"),
    "torch_lost_storage": (lost_storage, "is not there"),
    "torch_script": (torch_script, "TorchScript"),
    "torch_climbs": (torch_climbs, "outside"),
    "torch_compressed": (torch_compressed, "compressed"),
    "torch_html": (raw(html), "not a torch checkpoint"),
    "safetensors_huge_header": (tensors(size=2**62), "header"),
    "safetensors_header_of_17_mib": (tensors(header=b"{" + b" " * (17 * 2**20) + b"}"), "header"),
    "safetensors_beyond_file": (entry(shape=[10**9], data_offsets=[0, 4 * 10**9]), "stored"),
    "safetensors_shape": (entry(shape=[10**6, 10**6]), "does not fill"),
    "safetensors_negative": (entry(shape=[-3, -4]), "not dtype, shape"),
    "safetensors_dtype": (entry(dtype="O"), "dtype"),
    "safetensors_overlap": (second([40, 48]), "overlaps"),
    "safetensors_hole": (second([56, 64]), "hole"),
    "safetensors_twice": (
        tensors(header=b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}'),
        "twice",
    ),
    "safetensors_list": (tensors(header=b"[]", numbers=0), "not a table"),
    "safetensors_nested_deep": (tensors(header=b"[" * 100_000), "cannot be read"),
    "safetensors_truncated": (tensors(numbers=47), "are stored"),
    "safetensors_pickle": (raw(lambda canary: dumps(system(canary)), "hostile.safetensors"), "header"),
    "tar_climbs": (tarred(("../canary", b"ran")), "outside"),
    "tar_climbs_inside": (tarred(("assets/../../canary", b"ran")), "outside"),
    "tar_absolute": (tarred(("/tmp/canary", b"ran")), "outside"),
    "tar_symlink": (tarred(("assets/link", {"type": tarfile.SYMTYPE, "linkname": "/etc"})), "link"),
    "tar_hardlink": (tarred(("assets/link", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})), "link"),
    "tar_device": (tarred(("assets/null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})), "device"),
    "tar_fifo": (tarred(("assets/fifo", {"type": tarfile.FIFOTYPE})), "device"),
    "tar_twice": (tarred(("saved_model.pb", b"ran")), "twice"),
    "tar_twice_by_case": (tarred(("Saved_Model.PB", b"ran")), "twice"),
    "tar_bomb": (tar_of_zeros, "grow"),
    "tar_long_name": (tar_of_long_name, "unpacked|long"),
    "tar_truncated": (tar_cut, "unpacked"),
    "tar_flipped": (tar_flipped, "unpacked|damaged"),
    "tar_of_writer": (tar_of_writer, "'WriteFile'"),
    "tar_html": (raw(html, "hostile.tar.gz"), "unpacked"),
}
