"""labels.csv and DataFrames."""

import shutil

import numpy as np
import pytest

from tfxfer.data import load_data
from tfxfer.data.table import read
from tfxfer.errors import InputError


@pytest.fixture
def table(tmp_path, make_classes):
    """A function that writes labels.csv beside the folder img/ with pictures 0000.png .. 0039.png."""
    make_classes(tmp_path, {"img": 40})

    def write(header: str, *rows: str):
        (tmp_path / "labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return tmp_path / "labels.csv"

    return write


def two_classes(extra: str = "") -> list[str]:
    return [f"img/{n:04d}.png,{'cat' if n % 2 else 'dog'}{extra}" for n in range(40)]


def test_paths_are_relative_to_the_csv(table, monkeypatch, tmp_path_factory):
    path = table("path,label", *two_classes())
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    data = load_data(path, image_size=16)
    assert data.class_names == ("cat", "dog") and len(data) == 40 and not data.quarantined
    part = data.part("train")
    assert [int(id[4:8]) % 2 == 0 for id in part.ids] == (part.labels == 1).tolist()
    assert part.weights is None
    assert load_data(path.parent).fingerprint == data.fingerprint  # the folder that holds labels.csv


def test_split_group_and_weight(table):
    rows = [
        f"img/{n:04d}.png,{'cat' if n % 2 else 'dog'},{'Test' if n >= 30 else ''},{f'p{n // 3}' if n < 30 else ''},{n}"
        for n in range(40)
    ]
    data = load_data(table("path,label,split,group,weight,comment", *rows))
    assert {id[4:8] for id in data.part("test").ids} == {f"{n:04d}" for n in range(30, 40)}
    for part in data.parts.values():
        assert part.weights.dtype == np.float32
        for id, group, weight in zip(part.ids, part.groups, part.weights, strict=True):
            number = int(id[4:8])
            assert weight == number
            assert group == (f"p{number // 3}" if number < 30 else id)
    assert not set(data.part("train").groups) & set(data.part("val").groups)


def test_rows_without_a_split_follow_their_group_into_a_given_part(table):
    rows = [f"img/{n:04d}.png,{'cat' if n % 2 else 'dog'},{'test' if n < 10 else ''},g{n % 20}" for n in range(40)]
    data = load_data(table("path,label,split,group", *rows))
    where = {id: name for name, part in data.parts.items() for id in part.ids}
    assert [where[f"img/{n:04d}.png"] for n in range(20, 30)] == ["test"] * 10


def test_missing_files_are_quarantined_and_text_labels_sorted_as_numbers(table):
    rows = [f"img/{n:04d}.png,{9 + n % 2}" for n in range(40)]
    data = load_data(table("path,label", *rows, "img/none.png,9"))
    assert data.class_names == ("9", "10")
    assert data.quarantined == (("img/none.png", "no such file or directory"),)


def test_data_frame_equals_the_csv(table, tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    rows = [
        f"img/{n:04d}.png,{n % 2},{'test' if n < 8 else ''},{n // 2 if n > 20 else ''},{1.5 if n % 3 else ''}"
        for n in range(40)
    ]
    path = table("path,label,split,group,weight", *rows)
    monkeypatch.chdir(tmp_path)
    frame = pandas.read_csv(path)
    from_csv, from_frame = load_data(path), load_data(frame)
    assert from_frame.class_names == ("0", "1")
    assert from_frame.fingerprint == from_csv.fingerprint
    assert from_frame.part("train").groups == from_csv.part("train").groups
    assert "15" in {group for part in from_frame.parts.values() for group in part.groups}
    assert from_frame.part("train").ids == from_csv.part("train").ids
    assert np.array_equal(from_frame.part("train").weights, from_csv.part("train").weights)
    shutil.copytree(tmp_path / "img", tmp_path / "absolute")
    frame["path"] = [str(tmp_path / "absolute" / p[4:]) for p in frame["path"]]
    assert load_data(frame).fingerprint == from_csv.fingerprint
    with pytest.raises(InputError, match=r"The DataFrame has no column 'label'\. Did you mean 'labels'"):
        read(frame.rename(columns={"label": "labels"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,b\n", r"labels.csv has no column 'path'\. Known: file, label"),
        ("path,lable\na,b\n", r"no column 'label'\. Did you mean 'lable'"),
        ("", r"no column 'path'\. It is empty"),
        ("path,label\n", "No image found in .*it has no rows"),
        ("path,label\na.png,\n", "line 2: the label is empty"),
        ("path,label\na.png,x\n,x\n", "line 3: the path is empty"),
        ("path,label,split\na.png,x,holdout\n", "line 2: split is 'holdout'; expected train, val or test"),
        ("path,label,weight\na.png,x,heavy\n", "line 2: weight is 'heavy'; expected a number that is not negative"),
        ("path,label,weight\na.png,x,-1\n", "line 2: weight is '-1'"),
        ("path,label\na.png,x\na.png,y\n", "line 3: the path 'a.png' is in line 2 already"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        load_data(tmp_path / "labels.csv")


def test_groups_across_given_splits_are_refused(table):
    rows = [f"img/{n:04d}.png,{n % 2},{'test' if n < 20 else 'train'},{n % 20}" for n in range(40)]
    with pytest.raises(
        InputError, match=r"Group '0' is in two given parts \(img/0000.png in test, img/0020.png in train"
    ):
        load_data(table("path,label,split,group", *rows))


def test_no_such_table_or_not_text(tmp_path):
    with pytest.raises(InputError, match=r"Cannot read the table .*no such file"):
        load_data(tmp_path / "none.csv")
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff\xfe\n\x00")
    with pytest.raises(InputError, match="is not a CSV file in UTF-8"):
        load_data(tmp_path / "image.csv")
