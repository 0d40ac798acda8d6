"""A real `datasets.Dataset`, where the package is installed."""

import numpy as np
import pytest

from tfxfer.data import load_data
from tfxfer.errors import InputError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def made(tmp_path, make_classes):
    """A data set of 40 PNG files with classes in an order of its own."""
    make_classes(tmp_path, {"img": 40})
    paths = sorted(str(path) for path in (tmp_path / "img").iterdir())
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["z", "a"])})
    return datasets.Dataset.from_dict({"picture": paths, "kind": [n % 2 for n in range(40)]}, features=features)


def test_rows_become_items(made):
    data = load_data(made, image_size=16)
    assert data.class_names == ("z", "a") and len(data) == 40
    for name, part in data.parts.items():
        for id, label, pixels in zip(part.ids, part.labels, data.pixels(name, 16), strict=True):
            row = made[int(id.removeprefix("row "))]
            assert label == row["kind"]
            assert np.array_equal(pixels, np.asarray(row["picture"].convert("RGB").resize((16, 16), 2)))


def test_dict_of_splits_and_broken_rows(made, tmp_path):
    (tmp_path / "broken.png").write_text("text")
    cut = made.train_test_split(test_size=0.3, seed=0)
    row = datasets.Dataset.from_dict(
        {"picture": [str(tmp_path / "broken.png"), None], "kind": [0, 1]}, features=made.features
    )
    cut["train"] = datasets.concatenate_datasets([cut["train"], row])
    data = load_data(cut)
    assert list(data.parts) == ["train", "val", "test"] and len(data) == 40
    assert dict(data.quarantined) == {
        "train/row 28": "it is text, not an image",
        "train/row 29": "its record has no image",
    }


def test_missing_columns(made):
    with pytest.raises(InputError, match=r"0 columns of type Image; expected one\. It has: kind"):
        load_data(made.remove_columns("picture"))
    with pytest.raises(InputError, match="Unknown split 'left'"):
        load_data(datasets.DatasetDict({"left": made}))
