"""Copies that were turned, mirrored or shifted, as data augmentation makes them: found by their local patterns."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter
from threadpoolctl import threadpool_limits

from tfxfer.runtime.images import map_threads

NUM_POINTS = 60
MIN_MATCHES = 10
_SIDE_PX = 160
_RADII_PX = np.linspace(2, 13, 4)
_ANGLES = np.arange(16) * (2 * np.pi / 16)
_NUM_HARMONICS = 5
_NUM_FEATURES = 3 * len(_RADII_PX) * _NUM_HARMONICS + 3 * (len(_RADII_PX) - 1) * (_NUM_HARMONICS - 1)
_MARGIN_PX = 15
_BLACK = 25  # augmentation fills the corners that turning leaves empty with black; no point may lie on their edge
_MAX_RATIO = 0.8
_BLOCK = 512


def local_patterns(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Striking points of a picture and what surrounds them, described without regard to turning and mirroring.

    Points are extrema of differences of Gaussians at two scales. A description samples the colours on four
    circles around the point; the magnitudes of the Fourier coefficients along a circle do not change when the
    picture turns or is mirrored, nor does the real part of products of coefficients of neighbouring circles.

    Args:
        image: RGB, of any size.

    Returns:
        points: (60, 2) float32, row and column at 160 px of the longer side; NaN where there are fewer points.
        descriptions: (60, 96) float32 of unit length; zero where there are fewer points.
    """
    scale = _SIDE_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    smooth = np.stack([gaussian_filter(pixels[..., channel], 1.2) for channel in range(3)])
    where = _points(smooth.mean(axis=0))
    points = np.full((NUM_POINTS, 2), np.nan, np.float32)
    descriptions = np.zeros((NUM_POINTS, _NUM_FEATURES), np.float32)
    if len(where):
        points[: len(where)] = where
        descriptions[: len(where)] = _descriptions(smooth, where)
    return points, descriptions


def turned_pairs(points: np.ndarray, descriptions: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Pairs of images of one class that are turned, mirrored or shifted copies of the same picture.

    Two images are a pair if at least `MIN_MATCHES` points match mutually and lie at the same distances from each
    other. Every image is compared with all others of its class, so the time grows with the square of the class.

    Args:
        points: (N, 60, 2), see `local_patterns`.
        descriptions: (N, 60, 96).
        labels: Class of each image.

    Returns:
        (P, 2) int64, the smaller index first.
    """
    names = np.asarray(labels)
    tasks = []
    for name in np.unique(names):
        rows = np.flatnonzero(names == name)
        tasks += [(row, rows[place:]) for place, row in enumerate(rows[:-1], start=1)]

    def partners(task: tuple[int, np.ndarray]) -> list[tuple[int, int]]:
        return [(task[0], other) for other in _partners(points, descriptions, *task)]

    # One BLAS thread each: with two, these small products took three times the processor time.
    with threadpool_limits(1, "blas"):
        pairs = [pair for found in map_threads(partners, tasks) for pair in found]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _partners(points: np.ndarray, descriptions: np.ndarray, row: int, others: np.ndarray) -> list[int]:
    """Which of the other images are copies of image `row`."""
    found = []
    for start in range(0, len(others), _BLOCK):
        block = others[start : start + _BLOCK]
        own, matched = _matches(descriptions[row], descriptions[block])
        for index in np.flatnonzero(matched.sum(axis=1) >= MIN_MATCHES):
            chosen = matched[index]
            if _num_rigid(points[row][own[index, chosen]], points[block[index]][chosen]) >= MIN_MATCHES:
                found.append(int(block[index]))
    return found


def _points(grey: np.ndarray) -> np.ndarray:
    """(n, 2) rows and columns of the strongest blobs, half of them fine and half coarse."""
    fine = gaussian_filter(grey, 1.8)
    middle = gaussian_filter(fine, 2.4)
    coarse = gaussian_filter(middle, 4.0)
    allowed = np.zeros(grey.shape, bool)
    allowed[_MARGIN_PX:-_MARGIN_PX, _MARGIN_PX:-_MARGIN_PX] = True
    if np.median(grey) > 2 * _BLACK:  # a picture of bright things on black keeps its points
        allowed &= ~maximum_filter(grey < _BLACK, 2 * _MARGIN_PX + 1)
    found = []
    for response in (np.abs(fine - middle), np.abs(middle - coarse)):
        peaks = (response == maximum_filter(response, 5)) & allowed & (response > 0.5)
        rows, columns = np.nonzero(peaks)
        strongest = np.argsort(-response[rows, columns], kind="stable")[: NUM_POINTS // 2]
        found.append(np.stack([rows[strongest], columns[strongest]], axis=1))
    return np.concatenate(found)


def _descriptions(smooth: np.ndarray, where: np.ndarray) -> np.ndarray:
    rows = np.rint(where[:, 0, None, None] + _RADII_PX[:, None] * np.sin(_ANGLES)).astype(int)
    columns = np.rint(where[:, 1, None, None] + _RADII_PX[:, None] * np.cos(_ANGLES)).astype(int)
    samples = smooth[:, rows, columns].transpose(1, 0, 2, 3)  # point, channel, circle, angle
    samples = samples - samples.mean(axis=(2, 3), keepdims=True)
    waves = np.fft.rfft(samples, axis=3)[..., :_NUM_HARMONICS]
    products = (waves[:, :, :-1, 1:] * np.conj(waves[:, :, 1:, 1:])).real
    products = np.sign(products) * np.sqrt(np.abs(products))
    features = np.concatenate([np.abs(waves).reshape(len(where), -1), products.reshape(len(where), -1)], axis=1)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-6)


def _matches(own: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each point of each other image the best own point, and whether the match is mutual and clear."""
    num = len(others)
    alike = (others.reshape(-1, _NUM_FEATURES) @ own.T).reshape(num, NUM_POINTS, NUM_POINTS)
    best, back = alike.argmax(axis=2), alike.argmax(axis=1)
    first = np.take_along_axis(alike, best[..., None], 2)[..., 0]
    np.put_along_axis(alike, best[..., None], -1, 2)
    mutual = np.take_along_axis(back, best, 1) == np.arange(NUM_POINTS)
    return best, mutual & (1 - first < _MAX_RATIO * (1 - alike.max(axis=2))) & (first > 0.5)


def _num_rigid(points: np.ndarray, matched: np.ndarray) -> int:
    """Size of a set of matches whose points lie at the same distances from each other in both images."""
    here = np.linalg.norm(points[:, None] - points[None], axis=2)
    there = np.linalg.norm(matched[:, None] - matched[None], axis=2)
    agree = (np.abs(here - there) <= 2.5 + 0.05 * here) & (here > 6)  # the slack takes a little zoom and shear
    around = np.flatnonzero(agree[agree.sum(axis=1).argmax()])
    support = agree[np.ix_(around, around)].sum(axis=1)
    return 1 + int((support >= 0.6 * (len(around) - 1)).sum())
