import numpy as np
import pytest
from PIL import Image

from tfxfer.report.plots import Point, write_depth_plot

POINTS = [Point(0, 0.8, 0.7, 0.9, "a"), Point(4, 0.85, 0.75, 0.95, "a"), Point(2, 0.6, 0.5, 0.7, "b")]


def test_a_picture_is_drawn_with_all_that_it_is_told(tmp_path):
    write_depth_plot(tmp_path / "depth.png", POINTS, others=[(1, 0.5), (3, 0.7)], chosen=4)
    with_dots = np.asarray(Image.open(tmp_path / "depth.png").convert("RGB"))
    write_depth_plot(tmp_path / "bare.png", POINTS)
    bare = np.asarray(Image.open(tmp_path / "bare.png").convert("RGB"))
    assert with_dots.shape == bare.shape == (630, 1125, 3)
    assert len(np.unique(bare.reshape(-1, 3), axis=0)) > 20 and (with_dots != bare).any()


@pytest.mark.parametrize(("kind", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_ending_says_the_format(tmp_path, kind, begins):
    path = tmp_path / f"depth.{kind}"
    write_depth_plot(path, POINTS, metric="macro_f1")
    assert path.read_bytes().startswith(begins)
    if kind == "svg":
        assert "frozen blocks" in path.read_text() or "<path" in path.read_text()
