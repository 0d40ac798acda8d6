"""The .keras file: a zip of a config, weights in HDF5 and asset files."""

from collections.abc import Sequence
from pathlib import Path

from tfxfer.sources.safety.hdf5 import check_h5, check_hdf5_stream
from tfxfer.sources.safety.keras_config import check_config, parse_config
from tfxfer.sources.safety.refusal import MAX_CONFIG_BYTES, refusal, shown
from tfxfer.sources.safety.safetensors_file import check_safetensors
from tfxfer.sources.safety.zip_members import opened_member, opened_zip, read_member

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
MAX_FOLDER_FILES = 10_000


def check_keras_archive(path: str | Path, *, trusted: Sequence[str] = ()) -> None:
    """Check a .keras file: its members, its weights and its config.

    Args:
        path: The file.
        trusted: Modules of the user's own whose classes may stand in its config.

    Raises:
        InputError: Where the archive is damaged or would leave its folder, where its weights are refused by
            `check_h5`, or its config names what is not on the list.
    """
    path = Path(path)
    with opened_zip(path) as (archive, members):
        if CONFIG not in members:
            raise refusal(path, f"it has no member {CONFIG!r}", "save the model again with model.save('x.keras')")
        if WEIGHTS not in members:
            raise refusal(path, f"it has no member {WEIGHTS!r}", "save the model again with model.save('x.keras')")
        text = read_member(path, archive, members[CONFIG])
        if METADATA in members:
            parse_config(read_member(path, archive, members[METADATA]), path, f"its member {METADATA!r}")
        where = f"its member {WEIGHTS!r}"
        with opened_member(path, archive, members[WEIGHTS]) as file:
            weight_bytes = check_hdf5_stream(file, path, where, trusted=trusted)
        check_config(text, path, f"its member {CONFIG!r}", trusted=trusted, weight_bytes=weight_bytes)


def check_keras_folder(folder: str | Path, *, trusted: Sequence[str] = ()) -> None:
    """Check an unpacked Keras model or a KerasHub preset: configs and weights inside, no links out.

    Args:
        folder: The folder, which has a config.json.
        trusted: As `check_keras_archive`.

    Raises:
        InputError: As `check_keras_archive`, and for any file that is a link out of the folder.
    """
    folder = Path(folder)
    for file in contained_files(folder):
        if file.suffix == ".json":
            if file.stat().st_size > MAX_CONFIG_BYTES and file.name not in ("vocabulary.json", "tokenizer.json"):
                raise refusal(file, f"it has more than {MAX_CONFIG_BYTES:,} bytes", "do not use this folder")
            if file.name not in ("vocabulary.json", "tokenizer.json", "vocab.json") or b'"class_name"' in _start(file):
                check_config(file.read_bytes(), file, "the file", trusted=trusted)
        elif file.suffix in (".h5", ".hdf5"):
            check_h5(file, trusted=trusted)
        elif file.suffix == ".keras":
            check_keras_archive(file, trusted=trusted)
        elif file.suffix == ".safetensors":
            check_safetensors(file)


def contained_files(folder: Path) -> list[Path]:
    """The files below `folder`, sorted.

    Raises:
        InputError: Where one is a link that leaves the folder or a device, or there are more than 10,000.
    """
    files = []
    home = folder.resolve()
    for count, item in enumerate(folder.rglob("*"), 1):
        if count > MAX_FOLDER_FILES:
            raise refusal(folder, f"it holds more than {MAX_FOLDER_FILES:,} files", "give the folder of one model")
        if item.is_symlink() and not item.resolve().is_relative_to(home):
            raise refusal(folder, f"its member {shown(_inside(item, folder))} is a link out of it", "copy the files")
        if item.is_file():
            files.append(item)
        elif not item.is_dir():
            raise refusal(
                folder, f"its member {shown(_inside(item, folder))} is neither a file nor a folder", "remove it"
            )
    return sorted(files)


def _inside(item: Path, folder: Path) -> str:
    return item.relative_to(folder).as_posix()


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(2**16)
