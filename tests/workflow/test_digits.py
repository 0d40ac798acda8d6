import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tfxfer.data import load_data
from tfxfer.errors import InputError
from tfxfer.workflow.digits import NAMES, write_digits


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def test_every_digit_is_written_once_as_it_is(tmp_path):
    folder = write_digits(tmp_path / "digits", per_class=4)
    digits = load_digits()
    found = list(folder.rglob("*.png"))
    assert len(found) == len({path.name for path in found}) == 1797
    for path in found[::50]:
        index = int(path.stem.removeprefix("digit_"))
        assert path.parent.name == NAMES[digits.target[index]]
        np.testing.assert_allclose(np.asarray(Image.open(path)) * (16 / 255), digits.images[index], atol=0.04)
    for name in NAMES:
        assert len(list((folder / "train" / name).iterdir())) == 4


def test_the_seed_chooses_which_digits_train(tmp_path):
    one, same, other = (
        contents(write_digits(tmp_path / str(index), per_class=3, seed=seed)) for index, seed in enumerate((1, 1, 2))
    )
    assert one == same
    assert {name for name in one if name.startswith("train")} != {name for name in other if name.startswith("train")}


def test_a_folder_that_exists_is_not_touched(tmp_path):
    (tmp_path / "digits").mkdir()
    with pytest.raises(InputError, match="exists already; give another folder"):
        write_digits(tmp_path / "digits")
    assert list((tmp_path / "digits").iterdir()) == []


def test_load_data_reads_it(digits_folder):
    data = load_data(digits_folder, image_size=32)
    assert set(data.class_names) == set(NAMES)
    assert len(data.part("train")) + len(data.part("val")) == len(data.part("test")) == 100
    assert [path for path, _ in data.quarantined] == ["train/nine/broken.png"]
