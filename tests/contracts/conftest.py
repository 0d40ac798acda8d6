"""What the contracts share: a few real digits, and a small model made of them."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest

DIGITS = ("zero", "one", "two")
NUM_EACH = 12


@pytest.fixture(scope="session")
def digit_arrays():
    """(36, 8, 8, 3) uint8 images of the digits 0 to 2, all different, and their (36,) labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rows = np.concatenate([np.flatnonzero(bunch.target == digit)[:NUM_EACH] for digit in range(len(DIGITS))])
    grey = np.round(bunch.images[rows] * (255 / 16)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1), bunch.target[rows].astype(np.int64)


@pytest.fixture(scope="session")
def digit_folder(digit_arrays, tmp_path_factory):
    """The same as PNG files in class folders, named by row."""
    from PIL import Image

    root = tmp_path_factory.mktemp("digits")
    for name in DIGITS:
        (root / name).mkdir()
    for row, (image, label) in enumerate(zip(*digit_arrays, strict=True)):
        Image.fromarray(image).save(root / DIGITS[label] / f"{row:02d}.png")
    return root
