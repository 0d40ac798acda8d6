"""What several folders of tests share: quiet TensorFlow, digits, and one small training run."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import shutil
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1 797 digits as (N, 32, 32, 3) uint8, and their labels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    small = np.round(found.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in small]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1), found.target


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """A small data set as users have them: train/ and test/ with ten digits of each class, one of them no image."""
    from tfxfer.workflow.digits import NAMES, write_digits

    folder = write_digits(tmp_path_factory.mktemp("digits") / "digits", per_class=10)
    for name in NAMES:
        for surplus in sorted((folder / "test" / name).iterdir())[10:]:
            surplus.unlink()
    (folder / "train" / "nine" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more than that")
    return folder


@pytest.fixture(scope="session")
def trained(digits_folder, tmp_path_factory):
    """One whole run on the digits: probe, fine-tuning, export, verification, baselines. Tests must not change it."""
    from tfxfer import fit

    out = tmp_path_factory.mktemp("runs") / "first"
    return fit("digits_cnn", digits_folder, out=out, epochs=12, learning_rate=2e-3, freeze_depth="conv1", seed=3)


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(trained.path, tmp_path / "copy"))
