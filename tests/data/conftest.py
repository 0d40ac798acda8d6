"""Pictures and folders made on the spot."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(os.environ.get("TFXFER_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def picture(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A picture of coloured patches under noise, unlike that of any other seed."""
    random = np.random.default_rng(seed)
    patches = Image.fromarray(random.integers(0, 256, (7, 7, 3), np.uint8))
    large = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noise = random.normal(0, 25, (height // 2, width // 2, 1)).repeat(2, 0).repeat(2, 1)
    return Image.fromarray((large + noise).clip(0, 255).astype(np.uint8))


def write_classes(root: Path, counts: dict[str, int], start: int = 0, suffix: str = ".png") -> Path:
    """Write `counts[name]` pictures into the folder `name` below `root`, every one with a seed of its own."""
    seed = start
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            picture(seed).save(root / name / f"{seed:04d}{suffix}")
            seed += 1
    return root


@pytest.fixture
def make_picture():
    return picture


@pytest.fixture
def make_classes():
    return write_classes


@pytest.fixture
def shared_data():
    """The folder of a real data set by name; skips where it is not there."""

    def find(name: str) -> Path:
        folder = SHARED / name
        if not folder.is_dir():
            pytest.skip(f"the data set {name} is not in {SHARED}; set TFXFER_DATA to the folder that has it")
        return folder

    return find
