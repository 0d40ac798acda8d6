"""The digits that scikit-learn carries, as a folder of PNGs: a data set that needs no download."""

from pathlib import Path

import numpy as np
from PIL import Image

from tfxfer.errors import InputError
from tfxfer.runtime.files import atomic_folder

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_digits(folder: Path, *, per_class: int = 10, seed: int = 0) -> Path:
    """Write 1 797 handwritten digits of 8 by 8 pixels as train/ and test/ class folders.

    Args:
        folder: Must not exist.
        per_class: Digits of each class in train/; the others go to test/.
        seed: Which ones.

    Returns:
        The folder.

    Raises:
        InputError: Where the folder exists.

    Reference:
        Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits

    if Path(folder).exists():
        raise InputError(f"{folder} exists already; give another folder for the digits.")
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    seen = dict.fromkeys(range(10), 0)
    with atomic_folder(Path(folder)) as temporary:
        for part in ("train", "test"):
            for name in NAMES:
                (temporary / part / name).mkdir(parents=True)
        for index in order:
            label = int(digits.target[index])
            part = "train" if seen[label] < per_class else "test"
            seen[label] += 1
            pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(temporary / part / NAMES[label] / f"digit_{index:04d}.png")
    return Path(folder)
