"""Decoding and resizing in Pillow, one thread: d of the goal of throughput.py."""

import sys

from PIL import Image
from speed import repeated, serve


def make(told):
    files, size = told["files"], (told["image_size"],) * 2
    at = 0

    def step() -> int:
        nonlocal at
        for _ in range(16):
            with Image.open(files[at % len(files)]) as image:
                image.convert("RGB").resize(size, Image.Resampling.BILINEAR).tobytes()
            at += 1
        return 16

    return repeated(step), {}


if __name__ == "__main__":
    sys.exit(serve(make))
