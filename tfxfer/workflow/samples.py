"""The real test images that a run's exports are verified with."""

from typing import Any

import numpy as np

from tfxfer.data import Dataset
from tfxfer.data.audit import open_content
from tfxfer.exporters.samples import Samples, make_samples
from tfxfer.runtime.images import resize_image
from tfxfer.specs import Plan

NUM_SAMPLES = 64


def samples_of(dataset: Dataset, plan: Plan) -> Samples:
    """64 test images, which ones by the plan's seed; the first few also in other sizes than the model's."""
    test = dataset.part("test")
    rows = np.random.default_rng(plan.seed).permutation(len(test))[:NUM_SAMPLES]
    pixels = dataset.pixel_rows("test", plan.image_size)[rows]
    return make_samples(pixels, test.labels[rows], _other_sizes(test, rows, plan.image_size))


def _other_sizes(test: Any, rows: np.ndarray, size_px: int) -> list[np.ndarray]:
    """A few test images in sizes that are not the model's: the files as they are, or made smaller and larger."""
    found = []
    for index, row in enumerate(rows[:4]):
        image = np.asarray(open_content(test.contents[row])[1])
        if image.shape[:2] == (size_px, size_px):
            image = resize_image(image, size_px + (index - 1) * max(size_px // 5, 1))
        found.append(np.ascontiguousarray(image[:1024, :1024]))
    return found
