"""Mixing of images and labels, and of cached activations just so: pure functions of NumPy arrays.

A mixed image counts as its two images would by themselves: `share` times the first one's weighted loss and the rest of
the second one's. Cross-entropy is linear in the target, so one mixed target and one mixed weight say exactly that.
Padding rows must not be mixed in: leave them out before.
"""

from typing import NamedTuple

import numpy as np

from tfxfer.errors import InputError

Randomness = np.random.Generator | int | tuple[int, ...]


class Batch(NamedTuple):
    """What training takes.

    Attributes:
        images: (N, ...) images or activations; a tuple of such where a tuple was given.
        targets: (N, K) rows that sum to one.
        weights: (N,) of the losses.
    """

    images: np.ndarray | tuple[np.ndarray, ...]
    targets: np.ndarray
    weights: np.ndarray


class Box(NamedTuple):
    """A rectangle of rows and columns, ends not included."""

    top: int
    bottom: int
    left: int
    right: int


def mixup(images, targets, weights, random: Randomness, *, alpha: float = 0.2) -> Batch:
    """Blend each image with another one of the batch, all by one share drawn from Beta(alpha, alpha).

    Args:
        images: (N, ...) images, or activations at a cut (manifold mixup); any number of axes; or a tuple of such.
        targets: (N, K), one-hot.
        weights: (N,) loss weights.
        random: A generator, or a seed such as `(seed, step)`: the same one gives the same batch.
        alpha: At least 0; 0 mixes nothing. The paper has 0.1 to 0.4 for ImageNet, manifold mixup 2.

    Returns:
        The batch as float32 (float64 stays).

    Raises:
        InputError: Where the arrays do not fit together or alpha is negative.

    Example:
        >>> batch = mixup(np.eye(4), np.eye(4), np.ones(4), (7, 0), alpha=1.0)
        >>> bool(np.allclose(batch.images, batch.targets)), batch.targets.sum(axis=1).tolist()
        (True, [1.0, 1.0, 1.0, 1.0])

    Reference:
        Zhang, Cisse, Dauphin, Lopez-Paz. mixup: Beyond Empirical Risk Minimization. ICLR 2018.
        Verma, Lamb, Beckham, Najafi, Mitliagkas, Lopez-Paz, Bengio. Manifold Mixup: Better Representations by
        Interpolating Hidden States. ICML 2019.
    """
    random = np.random.default_rng(random)
    share = draw_share(random, alpha)
    return blend(images, targets, weights, random.permutation(len(_parts_of(images)[0])), share)


def cutmix(images, targets, weights, random: Randomness, *, alpha: float = 1.0) -> Batch:
    """Paste a rectangle of another image of the batch into each, the same rectangle in all.

    Its area is a share of the image drawn from Beta(alpha, alpha), its middle anywhere; what lies outside is cut off,
    and labels go by the area that is left.

    Args:
        images: (N, H, W, C) images or activations; or a tuple of such, in which the same share of each is replaced.
        targets: (N, K), one-hot.
        weights: (N,) loss weights.
        random: A generator, or a seed such as `(seed, step)`: the same one gives the same batch.
        alpha: At least 0; 0 mixes nothing. The paper has 1.

    Returns:
        The batch; images keep their dtype.

    Raises:
        InputError: Where the images have no two spatial axes, or as `mixup`.

    Example:
        >>> images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
        >>> batch = cutmix(images, np.eye(3), np.ones(3), (7, 1))
        >>> bool(np.allclose((batch.images == images).mean((1, 2, 3)), np.diag(batch.targets)))
        True

    Reference:
        Yun, Han, Oh, Chun, Choe, Yoo. CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
        Features. ICCV 2019.
    """
    first = _spatial(_parts_of(images)[0])
    random = np.random.default_rng(random)
    share = draw_share(random, alpha)
    partner = random.permutation(len(first))
    height, width = first.shape[1:3]
    return paste(images, targets, weights, partner, box_of(height, width, share, random))


def draw_share(random: np.random.Generator, alpha: float) -> float:
    """The first image's share, from Beta(alpha, alpha); 1 where alpha is 0."""
    if not alpha >= 0:
        raise InputError(f"alpha must be at least 0, not {alpha}.")
    return float(random.beta(alpha, alpha)) if alpha else 1.0


def blend(images, targets, weights, partner, share: float) -> Batch:
    """`share` of each image and the rest of its partner's.

    Args:
        images: (N, ...).
        targets: (N, K).
        weights: (N,).
        partner: (N,) row mixed into each.
        share: In [0, 1].

    Example:
        >>> batch = blend([[0.0], [8.0]], np.eye(2), np.ones(2), [1, 0], 0.75)
        >>> batch.images.tolist(), batch.targets.tolist()
        ([[2.0], [6.0]], [[0.75, 0.25], [0.25, 0.75]])
    """
    parts = [np.asarray(part) for part in _parts_of(images)]
    parts = [part.astype(np.float64 if part.dtype == np.float64 else np.float32) for part in parts]
    mixed = _like(images, [_mixed(part, partner, share) for part in parts])
    return Batch(mixed, *_mixed_labels(len(parts[0]), targets, weights, partner, share))


def paste(images, targets, weights, partner, box: Box) -> Batch:
    """The box of each partner's image over each image; the labels by area.

    Args:
        images: (N, H, W, C).
        targets: (N, K).
        weights: (N,).
        partner: (N,) row pasted into each.
        box: Inside the image.

    Example:
        >>> images = np.array([1, 2], np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
        >>> batch = paste(images, np.eye(2), np.ones(2), [1, 0], Box(0, 1, 0, 1))
        >>> batch.images[0, :, :, 0].tolist(), batch.targets[0].tolist()
        ([[2, 1], [1, 1]], [0.75, 0.25])
    """
    parts = [_spatial(part) for part in _parts_of(images)]
    height, width = parts[0].shape[1:3]
    share = 1 - (box.bottom - box.top) * (box.right - box.left) / (height * width)
    found = []
    for part in parts:
        top, bottom = (round(edge * part.shape[1] / height) for edge in (box.top, box.bottom))
        left, right = (round(edge * part.shape[2] / width) for edge in (box.left, box.right))
        pasted = part.copy()
        pasted[:, top:bottom, left:right] = part[partner, top:bottom, left:right]
        found.append(pasted)
    return Batch(_like(images, found), *_mixed_labels(len(parts[0]), targets, weights, partner, share))


def box_of(height: int, width: int, share: float, random: np.random.Generator) -> Box:
    """A box of the image's proportions and 1 - `share` of its area around a random middle, cut off at the borders."""
    side = (1 - share) ** 0.5
    ends = []
    for length in (height, width):
        size = int(length * side)
        start = int(random.integers(length)) - size // 2
        ends += [max(start, 0), min(start + size, length)]
    return Box(*ends)


def _parts_of(images) -> tuple:
    """The tensors of a batch: several where several cross a cut, and then mixed alike."""
    return images if isinstance(images, tuple) else (images,)


def _like(images, parts: list[np.ndarray]):
    return tuple(parts) if isinstance(images, tuple) else parts[0]


def _mixed(values: np.ndarray, partner, share: float) -> np.ndarray:
    # In the values' own dtype: a Python float does not widen it.
    return share * values + (1 - share) * values[partner]


def _mixed_labels(num_images: int, targets, weights, partner, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights under which the loss is `share` of the first image's weighted loss and the rest of the
    second one's; where both weigh nothing the plain mixture of targets."""
    targets, weights = np.asarray(targets, np.float32), np.asarray(weights, np.float32)
    if targets.ndim != 2 or weights.shape != (num_images,) or len(targets) != num_images:
        raise InputError(
            f"Expected (N, K) targets and (N,) weights for {num_images} images, got the shapes {targets.shape} and "
            f"{weights.shape}."
        )
    weight = _mixed(weights, partner, share)
    counted = _mixed(targets * weights[:, None], partner, share)
    plain = _mixed(targets, partner, share)
    divisor = np.where(weight > 0, weight, 1)[:, None]
    return np.where(weight[:, None] > 0, counted / divisor, plain), weight


def _spatial(images) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4:
        raise InputError(f"cutmix needs (N, H, W, C) with two spatial axes, got the shape {images.shape}; use mixup.")
    return images
