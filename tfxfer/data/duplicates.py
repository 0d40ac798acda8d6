"""Which images are the same picture: identical content, and near-duplicates by their small looks."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from tfxfer.runtime.images import hamming_distances, perceptual_hashes

MAX_BITS = 6
MIN_CORRELATION = 0.965
MIN_CORRELATION_PLAIN = 0.99
MIN_SIDE_PX = 64
MIN_DETAIL = 0.04
MIN_CONTRAST = 4.0
_NEIGHBOURS = 1000


def near_duplicate_pairs(looks: np.ndarray, sides_px: np.ndarray) -> np.ndarray:
    """Pairs of images that show the same picture, resized, re-encoded or slightly edited.

    A pair needs hashes that differ in at most `MAX_BITS` of 64 bits, and small colour pictures whose correlation
    is at least `MIN_CORRELATION`. Of plain pictures (a shorter side below `MIN_SIDE_PX`, or fewer fine
    structures than `MIN_DETAIL`) different ones look alike, as two drawings of a 1 do: they need
    `MIN_CORRELATION_PLAIN`. Pictures without contrast are left out. The numbers were chosen by looking at the
    pairs found in photos of clothes and waste, blood cells, and digits.

    Args:
        looks: (N, 32, 32, 3) uint8, see `tfxfer.runtime.images.small_look`.
        sides_px: (N,) shorter side of each image.

    Returns:
        (P, 2) int64, the smaller index first, each pair once.
    """
    pairs = candidate_pairs(perceptual_hashes(looks), MAX_BITS)
    rows, compact = np.unique(pairs, return_inverse=True)
    same = _same_picture(looks[rows], np.asarray(sides_px)[rows], compact.reshape(-1, 2))
    return pairs[same]


def candidate_pairs(hashes: np.ndarray, max_bits: int) -> np.ndarray:
    """Pairs of hashes at most `max_bits` apart, found without comparing all with all.

    The hashes are cut into `max_bits + 1` bands; a near pair agrees in one of them, so only hashes that share a
    band are compared (in a band shared by more than 1000, each with its next 1000 in hash order).

    Args:
        hashes: (N,) uint64.
        max_bits: Largest Hamming distance.

    Returns:
        (P, 2) int64, the smaller index first, each pair once, sorted.

    Example:
        >>> candidate_pairs(np.array([0b1000, 0xFFFF, 0b1001], np.uint64), 1).tolist()
        [[0, 2]]
    """
    edges = np.linspace(0, 64, max_bits + 2).astype(int)
    found = [np.empty((0, 2), np.int64)]
    for low, high in itertools.pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.lexsort((hashes, band))
        band, ordered = band[order], hashes[order]
        for step in range(1, min(_NEIGHBOURS, len(hashes) - 1) + 1):
            left = np.flatnonzero(band[step:] == band[:-step])
            if not len(left):
                break
            left = left[hamming_distances(ordered[left], ordered[left + step]) <= max_bits]
            found.append(np.sort(np.stack([order[left], order[left + step]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def linked_groups(count: int, pairs: Iterable[Sequence[int]]) -> list[int]:
    """For each of `count` things the smallest index that it is linked to through `pairs`.

    Example:
        >>> linked_groups(5, [(3, 1), (4, 3)])
        [0, 1, 2, 1, 1]
    """
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(index) for index in range(count)]


def _same_picture(looks: np.ndarray, sides_px: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Which pairs of looks pass the second check."""
    num = len(looks)
    grey = looks.mean(axis=3, dtype=np.float32)
    coarse = looks.reshape(num, 16, 2, 16, 2, 3).mean(axis=(2, 4), dtype=np.float32)
    variance = grey.var(axis=(1, 2))
    detail = 1 - coarse.mean(axis=3).var(axis=(1, 2)) / np.maximum(variance, 1e-6)
    plain = (sides_px < MIN_SIDE_PX) | (detail < MIN_DETAIL)
    flat = variance < MIN_CONTRAST**2
    coarse -= coarse.mean(axis=(1, 2), keepdims=True)  # brightness and tint of the whole picture do not count
    unit = coarse.reshape(num, 16 * 16 * 3)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    same = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), 4096):
        a, b = pairs[start : start + 4096].T
        needed = np.where(plain[a] | plain[b], MIN_CORRELATION_PLAIN, MIN_CORRELATION)
        same[start : start + 4096] = ((unit[a] * unit[b]).sum(axis=1) >= needed) & ~flat[a] & ~flat[b]
    return same
