"""SIGTERM to a real process, in whatever it is at: it is gone within ten seconds, and the run goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tfxfer import load_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noise of two colours, large enough that its features take seconds."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, level in (("dark", 80), ("light", 150)):
        (folder / name).mkdir()
        for number in range(60):
            noise = random.normal(level, 40, (96, 96, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(folder / name / f"{number}.png")
    return folder


def started(data, out, cache, *more):
    options = ["--source", "efficientnet_lite0_imagenet", "--image-size", "160", "--no-baseline", "--augment", "none"]
    tuned = ["--epochs", "3", "--lr", "1e-3", "--freeze", "0.9", "--checkpoint-every", "0.5"]
    return subprocess.Popen(
        [sys.executable, "-m", "tfxfer", "train", data, "--out", out, *options, *tuned, *more], text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "TFXFER_CACHE": str(cache)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "wait_seconds", "status"),
    [
        ("frozen features", 0.5, "begun"),
        ("fine_tune", 1.0, "training"),
        ("exporting", 3.0, "exporting"),
    ],
)
def test_a_process_that_is_told_to_end_is_gone_within_ten_seconds(photos, tmp_path, words, wait_seconds, status):
    out = tmp_path / "run"
    process = started(photos, out, tmp_path / "cache")
    assert any(words in line for line in process.stderr)
    time.sleep(wait_seconds)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    told, code = process.stderr.read(), process.wait()
    assert code == 143 and time.monotonic() - began < 10, told
    assert "Told to end by SIGTERM" in told and "--resume" in told and "Traceback" not in told
    assert json.loads((out / "run.json").read_text())["status"] == status
    again = started(photos, out, tmp_path / "cache", "--resume")
    told = again.communicate()[1]
    run = load_run(out)
    assert again.returncode == 0 and run.info["status"] == "complete", told
    assert all(certificate["passed"] for certificate in run.info["certificates"])
    if status != "begun":
        assert any("probe" in name for name in run.info["resumed"])
