"""How large images are, from a look at some of them."""

from typing import Any

import numpy as np

from tfxfer.data.audit import open_content
from tfxfer.data.dataset import Dataset
from tfxfer.data.load import read_items
from tfxfer.errors import InputError
from tfxfer.runtime.images import ImageError

SAMPLE = 64


def typical_area(data: Any) -> float:
    """The median number of pixels of an image, of up to 64 spread over the data.

    Args:
        data: What `load_data` takes, or a Dataset.

    Raises:
        InputError: Where none of them can be read.

    Example:
        >>> typical_area((np.zeros((6, 20, 30, 3), np.uint8), np.arange(6) % 2))
        600.0
    """
    if isinstance(data, Dataset):
        contents = data.part("train").contents
    else:
        contents = tuple(item.content for item in read_items(data))
    areas = []
    for row in np.unique(np.linspace(0, len(contents) - 1, SAMPLE).astype(int)) if contents else ():
        try:
            width, height = open_content(contents[row])[1].size
        except (ImageError, OSError):  # the audit quarantines it
            continue
        areas.append(width * height)
    if not areas:
        raise InputError("None of the images that were looked at can be read, so their size is not known.")
    return float(np.median(areas))
