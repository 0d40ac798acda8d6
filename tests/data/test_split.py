"""The split: deterministic, stable when files come, groups whole, every class everywhere, reused from split.csv."""

import csv
import hashlib
import shutil

import numpy as np
import pytest

from tfxfer.data import load_data
from tfxfer.data.split import assign, share
from tfxfer.data.split_file import EarlierSplit
from tfxfer.errors import InputError

FRACTIONS = {"test": 0.2, "val": 0.2}


def where(data) -> dict[str, str]:
    return {id: name for name, part in data.parts.items() for id in part.ids}


def keys_of(count: int, prefix: str = "") -> list[str]:
    return [hashlib.sha256(f"{prefix}{n}".encode()).hexdigest() for n in range(count)]


def test_share_is_the_hash_of_seed_and_key():
    digest = hashlib.sha256(b"7\0abc").hexdigest()
    assert share(7, "abc") == int(digest[:14], 16) / 16**14
    values = np.array([share(0, key) for key in keys_of(4000)])
    assert np.abs(np.histogram(values, 10, (0, 1))[0] / 4000 - 0.1).max() < 0.02  # four standard errors


def test_parts_follow_the_thresholds_and_come_out_near_their_fractions():
    keys = keys_of(5000)
    parts = assign(["a", "b"] * 2500, keys, FRACTIONS, seed=3)
    for key, part in zip(keys, parts, strict=True):
        number = share(3, key)
        assert part == ("test" if number < 0.2 else "val" if number < 0.4 else "train")
    for label in (0, 1):
        counts = [parts[label::2].count(part) / 2500 for part in ("test", "val", "train")]
        assert np.abs(np.subtract(counts, [0.2, 0.2, 0.6])).max() < 0.04
    assert assign(["a", "b"] * 2500, keys, FRACTIONS, seed=4) != parts


def test_new_items_never_move_old_ones():
    old, new = keys_of(200), keys_of(300, "new")
    before = assign(["a", "b"] * 100, old, FRACTIONS, seed=0)
    after = assign(["c"] * 300 + ["a", "b"] * 100, new + old, FRACTIONS, seed=0)
    assert after[300:] == before
    assert assign((["a", "b"] * 100)[::-1], old[::-1], FRACTIONS, seed=0) == before[::-1]


@pytest.mark.parametrize("seed", range(20))
def test_small_classes_are_in_every_part(seed):
    labels = ["a"] * 3 + ["b"] * 4 + ["c"] * 60
    parts = assign(labels, keys_of(67), FRACTIONS, seed)
    for name in "abc":
        assert {part for part, label in zip(parts, labels, strict=True) if label == name} == {"train", "val", "test"}
    untouched = [
        part == ("test" if share(seed, key) < 0.2 else "val" if share(seed, key) < 0.4 else "train")
        for part, key in zip(parts, keys_of(67), strict=True)
    ]
    assert sum(untouched) >= 67 - 4  # only classes a and b may need a repair, two parts each


@pytest.mark.parametrize("seed", range(10))
def test_groups_stay_whole_and_repair_moves_whole_groups(seed):
    random = np.random.default_rng(seed)
    keys = [f"g{n}" for n in random.integers(0, 12, 120)]
    labels = ["ab"[int(key[1:]) % 2] for key in keys]
    parts = assign(labels, keys, FRACTIONS, seed)
    assert all(len({part for part, k in zip(parts, keys, strict=True) if k == key}) == 1 for key in set(keys))
    assert {(part, label) for part, label in zip(parts, labels, strict=True)} == {
        (part, label) for part in ("train", "val", "test") for label in "ab"
    }


def test_large_groups_reach_each_part_as_often_as_single_images():
    # Were a group placed by the smallest number of its members, ten-fold groups would nearly all go to the test.
    keys = [key for key in keys_of(600) for _ in range(10)]
    parts = assign(["a"] * 6000, keys, FRACTIONS, seed=0)
    assert abs(parts.count("test") / 6000 - 0.2) < 0.05


def test_too_few_groups_for_all_parts():
    with pytest.raises(InputError, match=r"Class 'b' has 2 images or groups .* too few to be in train, test and val"):
        assign(["a"] * 9 + ["b"] * 4, [*keys_of(9), "g", "g", "h", "h"], FRACTIONS, seed=0)


def test_decided_before_stays_and_new_copies_follow():
    keys = ["x", "x", *keys_of(40)]
    fixed = ["test", None, *(["val"] * 20), *([None] * 20)]
    parts = assign(["a"] * 42, keys, FRACTIONS, seed=0, fixed=fixed)
    assert parts[:22] == ["test", "test"] + ["val"] * 20


def test_the_same_file_lands_on_the_same_side_under_any_name(tmp_path, make_classes):
    make_classes(tmp_path / "one", {"a": 40, "b": 40})
    first = load_data(tmp_path / "one")
    by_content = {sha256: name for name, part in first.parts.items() for sha256 in part.sha256}
    for number, path in enumerate(sorted((tmp_path / "one").rglob("*.png"))):
        path.rename(path.with_name(f"{(number * 37) % 101:03d}-renamed.png"))
    second = load_data(tmp_path / "one")
    assert {sha256: name for name, part in second.parts.items() for sha256 in part.sha256} == by_content
    assert second.fingerprint == first.fingerprint
    make_classes(tmp_path / "one", {"a": 25, "b": 5, "c": 30}, start=500)
    third = load_data(tmp_path / "one")
    now = {sha256: name for name, part in third.parts.items() for sha256 in part.sha256}
    assert {sha256: now[sha256] for sha256 in by_content} == by_content
    assert third.fingerprint != first.fingerprint
    assert where(load_data(tmp_path / "one", seed=1)) != where(third)


def test_group_by_keeps_groups_together_and_names_them(tmp_path, make_classes):
    make_classes(tmp_path, {"a": 60, "b": 60})
    data = load_data(tmp_path, group_by=r"/(\d\d\d)\d\.png$")
    groups = {id: group for part in data.parts.values() for id, group in zip(part.ids, part.groups, strict=True)}
    assert all(group == id.split("/")[1][:3] for id, group in groups.items())
    assert len(set(groups.values())) == 12
    for group in set(groups.values()):
        assert len({where(data)[id] for id in groups if groups[id] == group}) == 1
    with pytest.raises(InputError, match=r"matches none of the paths, such as 'a/0000\.png'"):
        load_data(tmp_path, group_by="patient")
    with pytest.raises(InputError, match="not a regular expression"):
        load_data(tmp_path, group_by="(")


def test_groups_that_cross_given_parts_are_refused(tmp_path, make_classes):
    make_classes(tmp_path / "train", {"a": 12, "b": 12})
    make_classes(tmp_path / "test", {"a": 3, "b": 3}, start=100)
    with pytest.raises(InputError, match=r"Group '\w' is in two given parts \(test/.* in test, train/.* in train\)"):
        load_data(tmp_path, group_by=r"\d(\d)\.png")
    assert len(set(load_data(tmp_path, group_by=r"train/.*\d(\d)\.png").part("train").groups)) <= 10


def test_split_file_is_reused_and_new_files_are_added(tmp_path, make_classes):
    make_classes(tmp_path / "data", {"a": 30, "b": 30})
    first = load_data(tmp_path / "data", seed=1)
    first.write_split(tmp_path / "split.csv")
    with (tmp_path / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "part", "group", "sha256"]
    assert {row["path"]: row["part"] for row in rows} == where(first)
    assert all(
        row["sha256"] == hashlib.sha256((tmp_path / "data" / row["path"]).read_bytes()).hexdigest() for row in rows
    )

    again = load_data(tmp_path / "data", seed=2, val_fraction=0.4, split=tmp_path / "split.csv")
    assert where(again) == where(first) and again.fingerprint == first.fingerprint
    assert where(load_data(tmp_path / "data", seed=2)) != where(first)
    otherwise = where(load_data(tmp_path / "data", seed=2))
    moved = next(id for id, part in where(first).items() if otherwise[id] != part)
    (tmp_path / "data" / moved).rename(tmp_path / "data/a/moved.png")
    make_classes(tmp_path / "data", {"a": 20, "c": 30}, start=100)
    more = where(load_data(tmp_path / "data", seed=2, split=tmp_path / "split.csv"))
    before = where(first)
    before["a/moved.png"] = before.pop(moved)  # told by its content
    assert {id: more[id] for id in before} == before and len(more) == 110


def test_split_file_that_does_not_fit(tmp_path, make_classes):
    make_classes(tmp_path / "data", {"a": 9, "b": 9})
    for text, message in {
        "path,label,part,group,sha256\nx.png,a,train,x.png,00\n": "None of the 18 images is in",
        "path,label,part,group,sha256\na/0000.png,a,left,x,00\n": "line 2: part is 'left'; expected one of train",
        "path,label,parts\n": "no column 'part', so it is not a split.csv. Did you mean 'parts'",
    }.items():
        (tmp_path / "split.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            load_data(tmp_path / "data", split=tmp_path / "split.csv")
    with pytest.raises(InputError, match="Cannot read the split file"):
        load_data(tmp_path / "data", split=tmp_path / "none.csv")
    make_classes(tmp_path / "parts/train", {"a": 9, "b": 9})
    make_classes(tmp_path / "parts/test", {"a": 3, "b": 3}, start=100)
    (tmp_path / "split.csv").write_text("path,part,sha256\ntest/a/0100.png,train,\n")
    with pytest.raises(InputError, match=r"puts test/a/0100\.png in train, but the data has it in test"):
        load_data(tmp_path / "parts", split=tmp_path / "split.csv")


def test_data_that_has_grown_in_another_folder_follows_contents_and_named_groups_never_paths(tmp_path, make_classes):
    make_classes(tmp_path / "old", {"a": 30, "b": 30})
    first = load_data(tmp_path / "old", seed=1, group_by=r"/(\d\d\d)\d\.png$")
    first.write_split(tmp_path / "split.csv")
    earlier = EarlierSplit(tmp_path / "split.csv", continued=True)
    make_classes(tmp_path / "new", {"a": 30, "b": 30, "c": 20}, start=200)
    for number, id in enumerate(sorted(where(first))[10:]):  # the names tell nothing: others had them
        shutil.copy(tmp_path / "old" / id, tmp_path / "new" / id.split("/")[0] / f"{(number * 7) % 50:04d}.png")
    grown = load_data(tmp_path / "new", seed=2, split=earlier)
    before = {digest: name for name, part in first.parts.items() for digest in part.sha256}
    now = {digest: name for name, part in grown.parts.items() for digest in part.sha256}
    assert sum(digest in before for digest in now) == 50
    assert all(now[digest] == part for digest, part in before.items() if digest in now)
    new = {digest: name for digest, name in now.items() if digest not in before}
    assert {name: sum(part == name for part in new.values()) for name in ("train", "val", "test")} == {
        name: sum(share(2, digest) < high for digest in new) - sum(share(2, digest) < low for digest in new)
        for name, low, high in (("test", 0, 0.2), ("val", 0.2, 0.4), ("train", 0.4, 1))
    }
    assert earlier.trained_on() == {digest for digest, part in before.items() if part != "test"}
    # A group that the run trained on stays out of the test, though none of its images came along.
    for part in ("train", "test"):
        group = next(row["group"] for row in earlier.rows if row["part"] == part)
        assert earlier.part_of("elsewhere.png", "0" * 64, group) == part
    load_data(tmp_path / "new", split=EarlierSplit(*[tmp_path / "split.csv"] * 2, continued=True))
    shutil.rmtree(tmp_path / "old")
    alone = load_data(make_classes(tmp_path / "other", {"a": 20, "b": 20}, start=900), split=earlier)
    assert len(alone) == 40 and alone.split["file"] == str(tmp_path / "split.csv")


def test_given_parts_that_put_trained_images_into_the_test_are_refused(tmp_path, make_classes):
    make_classes(tmp_path / "old", {"a": 30, "b": 30})
    first = load_data(tmp_path / "old")
    first.write_split(tmp_path / "split.csv")
    earlier = EarlierSplit(tmp_path / "split.csv", continued=True)
    for name, part in first.parts.items():  # val as train: both were seen
        for id in part.ids:
            target = tmp_path / "new" / ("test" if name == "test" else "train") / id
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "old" / id, target)
    grown = load_data(tmp_path / "new", split=earlier)
    assert set(grown.part("test").sha256) == set(first.part("test").sha256)
    moved = tmp_path / "new/train" / first.part("train").ids[0]
    moved.rename(tmp_path / "new/test" / first.part("train").ids[0])
    with pytest.raises(InputError, match=r"split\.csv puts test/\w/\d+\.png in train, but the data has it in test"):
        load_data(tmp_path / "new", split=earlier)


@pytest.mark.parametrize(
    "options", [{"val_fraction": 1.0}, {"test_fraction": -0.1}, {"val_fraction": 0.5, "test_fraction": 0.5}]
)
def test_fractions_out_of_range(tmp_path, make_classes, options):
    make_classes(tmp_path, {"a": 9, "b": 9})
    with pytest.raises(InputError, match="fraction"):
        load_data(tmp_path, **options)


def test_fraction_zero_makes_no_part(tmp_path, make_classes):
    make_classes(tmp_path, {"a": 9, "b": 9})
    assert list(load_data(tmp_path, test_fraction=0.0).parts) == ["train", "val"]
    assert list(load_data(tmp_path, test_fraction=0.0, val_fraction=0.0).parts) == ["train"]
