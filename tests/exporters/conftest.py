"""The tiny network, exported and certified once for all tests here."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import shutil

import keras
import numpy as np
import pytest
from tiny_network import FAULTS, METADATA, NAMES, SIZE_PX, assemble, tiny_backbone


@pytest.fixture(scope="session")
def parts():
    backbone = tiny_backbone()
    head = keras.layers.Dense(
        len(NAMES),
        name="logits",
        kernel_initializer=keras.initializers.RandomNormal(0, 1.0, seed=7),
        bias_initializer=keras.initializers.Constant([0.68, 0.76, 1.76, 0.0]),  # about as likely, each of them
    )
    return backbone, head


@pytest.fixture(scope="session")
def model(parts) -> keras.Model:
    return assemble(*parts)


@pytest.fixture
def wrong_exporters(monkeypatch):
    """Make both exporters write artifacts with one of `FAULTS`."""

    def inject(fault: str) -> None:
        for module in ("onnx", "saved_model"):
            monkeypatch.setattr(f"tfxfer.exporters.{module}.probabilities_of", FAULTS[fault])

    return inject


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Smooth coloured pictures, all different."""
    rng = np.random.default_rng(5)
    coarse = rng.uniform(0, 255, (64, 4, 4, 3))
    return np.repeat(np.repeat(coarse, SIZE_PX // 4, axis=1), SIZE_PX // 4, axis=2).astype(np.uint8)


@pytest.fixture(scope="session")
def certified(model, images, tmp_path_factory):
    """A run folder with certified exports; tests copy it."""
    from tfxfer.exporters.certify import certify

    run = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(6)
    certificates = certify(
        model,
        run / "exports",
        class_names=NAMES,
        metadata=METADATA,
        samples=images,
        labels=np.arange(64) % 4,
        other_size_samples=[rng.integers(0, 256, (31, 50, 3), dtype=np.uint8), images[0, :7, :5]],
        test_images=images[::-1],
        test_labels=np.arange(64) % 4,
    )
    return run, certificates


@pytest.fixture
def run(certified, tmp_path):
    """A copy of the certified run, at another place."""
    return shutil.copytree(certified[0], tmp_path / "moved" / "run")
