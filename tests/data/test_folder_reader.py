"""Folders: which folders are parts and classes, which files are images, and what is refused by name."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tfxfer.data import load_data
from tfxfer.data.folder import read
from tfxfer.errors import InputError


def ids(dataset) -> set[str]:
    return {id for part in dataset.parts.values() for id in part.ids}


def test_one_folder_is_split_in_three(tmp_path, make_classes):
    make_classes(tmp_path / "pets", {"cat": 30, "dog": 20})
    data = load_data(tmp_path / "pets")
    assert data.name == "pets" and data.class_names == ("cat", "dog")
    assert list(data.parts) == ["train", "val", "test"]
    assert ids(data) == {p.relative_to(tmp_path / "pets").as_posix() for p in (tmp_path / "pets").rglob("*.png")}
    for part in data.parts.values():
        assert [data.class_names[label] for label in part.labels] == [id.split("/")[0] for id in part.ids]
        assert all(path.is_file() for path in part.paths)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"train": 8, "test": 4}, {"train", "val", "test"}),
        ({"Train": 8, "Validation": 4}, {"train", "val", "test"}),
        ({"train": 8, "valid": 4, "test": 4}, {"train", "val", "test"}),
    ],
)
def test_parts_by_folder(tmp_path, make_classes, folders, expected):
    for start, (name, count) in enumerate(folders.items()):
        make_classes(tmp_path / name, {"a": count, "b": count}, start=100 * start)
    make_classes(tmp_path / "test_simple", {"a": 3, "other": 3}, start=900)
    (tmp_path / "LICENSE").write_text("beside")
    data = load_data(tmp_path)
    assert set(data.parts) == expected and data.class_names == ("a", "b")
    assert len(data) == 2 * sum(folders.values())
    for name in folders:
        part = {"train": "train", "test": "test"}.get(name.lower(), "val")
        inside = set(data.part(part).ids)
        if part != "train":  # a given part is taken as it is
            assert inside == {id for id in ids(data) if id.startswith(f"{name}/")}
    if "test" not in folders:  # never is the validation part the test
        assert all(id.startswith("Train/") for id in data.part("test").ids)
        assert data.split["fractions"] == {"test": 0.2}


def test_images_deeper_in_a_class_belong_to_it(tmp_path, make_classes):
    make_classes(tmp_path, {"a/day1": 6, "a/day2": 6, "b": 12})
    data = load_data(tmp_path)
    assert data.class_names == ("a", "b")
    assert sum(counts["a"] for counts in data.counts().values()) == 12


@pytest.fixture
def hostile(tmp_path, make_classes, make_picture) -> Path:
    """A folder with ten good pictures a class and one of everything that goes wrong."""
    root = make_classes(tmp_path / "data", {"a": 10, "b": 10})
    a = root / "a"
    whole = root / "b" / "whole.jpg"
    make_picture(50).save(whole, quality=90)
    (a / "truncated.jpg").write_bytes(whole.read_bytes()[:900])
    whole.unlink()
    (a / "empty.jpg").touch()
    (a / "zeros.png").write_bytes(b"\0" * 500)
    (a / "text.jpg").write_text("this is not a picture\n")
    (a / "notes.txt").write_text("nor is this")
    (a / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    (a / "locked.jpg").mkdir()
    (a / "locked.jpg" / "inside.png").write_bytes(b"")

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    (a / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")))
    outside = tmp_path / "outside"
    outside.mkdir()
    make_picture(60).save(outside / "secret.png")
    (a / "link.png").symlink_to(outside / "secret.png")
    (a / "linked").symlink_to(outside)
    (root / "c").symlink_to(outside)
    (a / "dangling.png").symlink_to(root / "nowhere.png")
    # Passed by in silence: no file of the user's class.
    for name in ("__pycache__", ".hidden", "empty"):
        (root / name).mkdir()
    (root / "__pycache__" / "x.png").write_bytes(b"x")
    (root / ".hidden" / "x.png").write_bytes(b"x")
    (a / ".DS_Store").write_bytes(b"x")
    (root / "readme.txt").write_text("beside the classes")
    # Unusual but good.
    b = root / "b"
    make_picture(70).convert("P").save(b / "gif named.jpg", "gif")
    Image.fromarray(np.asarray(make_picture(71).convert("L"), np.uint16) * 257).save(b / "deep.png")
    make_picture(72).convert("CMYK").save(b / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(73).save(b / "turned.jpg", exif=exif)
    alpha = make_picture(74)
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    alpha.save(b / "alpha.png")
    (b / "inner.png").symlink_to(b / "alpha.png")
    return root


REFUSED = {
    "a/truncated.jpg": "it is truncated",
    "a/empty.jpg": "the file is empty (0 bytes)",
    "a/zeros.png": "it holds only zero bytes",
    "a/text.jpg": "it is text, not an image",
    "a/notes.txt": "its suffix '.txt' is not one of an image format that is read",
    "a/photo.heic": "its suffix '.heic' is not one of an image format that is read",
    "a/locked.jpg/inside.png": "the file is empty (0 bytes)",
    "a/bomb.png": "it has more than 100 megapixels",
    "a/link.png": "it is a link out of the data folder",
    "a/linked": "it is a link out of the data folder",
    "a/dangling.png": "no such file or directory",
    "c": "it is a link out of the data folder",
}


def test_every_file_is_accepted_or_refused_with_its_reason(hostile):
    data = load_data(hostile, image_size=32)
    assert data.class_names == ("a", "b")
    assert dict(data.quarantined) == REFUSED
    good = {f"b/{name}" for name in ("gif named.jpg", "deep.png", "cmyk.jpg", "turned.jpg", "alpha.png", "inner.png")}
    plain = {f"a/{n:04d}.png" for n in range(10)} | {f"b/{n:04d}.png" for n in range(10, 20)}
    assert ids(data) == good | plain
    num_files = len(read(hostile).items) + len(read(hostile).rejected)
    assert len(data) + len(data.quarantined) == num_files
    assert data.near_duplicates == (("b/alpha.png", "b/inner.png"),)
    where = {id: name for name, part in data.parts.items() for id in part.ids}
    assert where["b/alpha.png"] == where["b/inner.png"]


def test_pixels_belong_to_their_ids_after_files_were_refused(hostile):
    data = load_data(hostile, image_size=24)
    from tfxfer.runtime.images import decode_image

    for name, part in data.parts.items():
        pixels = data.pixels(name, 24)
        assert pixels.shape == (len(part), 24, 24, 3)
        for row, path in enumerate(part.paths):
            assert np.array_equal(pixels[row], decode_image(path, 24)), path


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "There is no folder .*pets"),
        (lambda root: root.write_text("x"), "is a file; expected a folder of class folders"),
        (lambda root: root.mkdir(), "No labelled image found in .*it holds none"),
    ],
)
def test_what_is_no_data_folder(tmp_path, prepare, message):
    prepare(tmp_path / "pets")
    with pytest.raises(InputError, match=message):
        load_data(tmp_path / "pets")


def test_images_without_class_folders(tmp_path, make_picture):
    make_picture(1).save(tmp_path / "1.png")
    with pytest.raises(InputError, match="its images lie in no class folder; expected one folder a class"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 9}, "All images of data are of one class, 'a'; at least two are needed"),
        ({"a": 9, "b": 1}, "Class 'b' has one image, b/0009.png; at least two are needed"),
        ({"a": 9, "b": 2}, "Class 'b' has 2 images or groups .* too few to be in train, test and val"),
        ({"train/a": 9, "train/b": 1, "test/a": 2, "test/b": 2}, "Class 'b' has one image only in train"),
        ({"train/a": 9, "test/a": 2, "test/b": 2}, "Class 'b' has no image in train"),
        ({"train/a": 9, "train/b": 9, "test/a": 2}, "Class 'b' is missing from the part 'test' of data"),
        ({"train/a": 9, "train/b": 9, "val/b": 2}, "Class 'a' is missing from the part 'val' of data"),
        ({"train/a": 9, "train/b": 9, "val/a": 2, "validation/a": 2}, "both mean the part 'val'; keep one"),
        ({"val/a": 9, "test/b": 9}, "no train folder"),
    ],
)
def test_too_few(tmp_path, make_classes, counts, message):
    start = 0
    for name, count in counts.items():
        make_classes(tmp_path / "data", {name: count}, start=start)
        start += count
    with pytest.raises(InputError, match=message):
        load_data(tmp_path / "data")


def test_too_few_remain_names_the_first_refused(tmp_path, make_classes):
    make_classes(tmp_path / "data", {"a": 5, "b": 1})
    for number in range(3):
        (tmp_path / "data" / "b" / f"broken{number}.jpg").write_text("text")
    with pytest.raises(
        InputError, match=r"Class 'b' has one image.*3 files were refused, the first b/broken0\.jpg: it is"
    ):
        load_data(tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"No image of data can be read \(9 files were refused"):
        load_data(tmp_path / "data")


def test_class_names_fix_the_label_order(tmp_path, make_classes):
    make_classes(tmp_path / "data", {"a": 9, "b": 9})
    data = load_data(tmp_path / "data", class_names=("b", "a"))
    assert data.class_names == ("b", "a")
    part = data.part("train")
    assert all((id[0] == "b") == (label == 0) for id, label in zip(part.ids, part.labels, strict=True))
    with pytest.raises(InputError, match="has a class 'b', which is not among those known here"):
        load_data(tmp_path / "data", class_names=("a", "c"))
    with pytest.raises(InputError, match="Class 'c' has no image"):
        load_data(tmp_path / "data", class_names=("a", "b", "c"))


def test_part_folder_that_leaves_the_tree(tmp_path, make_classes):
    make_classes(tmp_path / "elsewhere", {"a": 5, "b": 5})
    make_classes(tmp_path / "data/train", {"a": 5, "b": 5}, start=50)
    (tmp_path / "data" / "test").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="test is a link out of the data folder"):
        load_data(tmp_path / "data")
