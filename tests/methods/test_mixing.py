import numpy as np
import pytest

from tfxfer.errors import InputError
from tfxfer.methods.mixing import Box, blend, box_of, cutmix, draw_share, mixup, paste

TARGETS = np.eye(3)[[0, 1, 2, 0]]
WEIGHTS = np.array([1.0, 2.0, 0.5, 0.0])


def batch(shape=(4, 6, 5, 2), dtype=np.float32, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)
    return images, TARGETS, WEIGHTS


def losses_of(targets, weights, log_probabilities):
    return -weights * (targets * log_probabilities).sum(1)


def test_mixup_by_hand():
    """Zhang et al.: x = l x_i + (1 - l) x_j, y = l y_i + (1 - l) y_j."""
    images = np.array([[10, 20], [30, 60]], np.uint8)
    mixed = blend(images, np.eye(2), [1, 1], [1, 0], 0.75)
    np.testing.assert_array_equal(mixed.images, [[15, 30], [25, 50]])
    np.testing.assert_array_equal(mixed.targets, [[0.75, 0.25], [0.25, 0.75]])
    np.testing.assert_array_equal(mixed.weights, [1, 1])
    assert mixed.images.dtype == mixed.targets.dtype == mixed.weights.dtype == np.float32


def test_mixed_weights_by_hand():
    mixed = blend(np.zeros((2, 1)), np.eye(2), [1, 3], [1, 0], 0.75)
    # 0.75 + 0.75 and 2.25 + 0.25; of the first weight half is the first image's, of the second nine tenths.
    np.testing.assert_allclose(mixed.weights, [1.5, 2.5])
    np.testing.assert_allclose(mixed.targets, [[0.5, 0.5], [0.1, 0.9]])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_the_mixture_of_the_weighted_losses(share):
    """Zhang et al.: l L(f(x), y_i) + (1 - l) L(f(x), y_j), here with each image's own weight."""
    logs = np.log(np.random.default_rng(1).dirichlet(np.ones(3), 4))
    partner = np.array([2, 3, 3, 3])
    mixed = blend(batch()[0], TARGETS, WEIGHTS, partner, share)
    expected = share * losses_of(TARGETS, WEIGHTS, logs)
    expected += (1 - share) * losses_of(TARGETS[partner], WEIGHTS[partner], logs)
    np.testing.assert_allclose(losses_of(mixed.targets, mixed.weights, logs), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(mixed.targets.sum(1), 1, rtol=1e-6)  # also of the last, which weighs nothing


def test_cutmix_by_hand():
    """Yun et al., equation 1: the box of B in A, labels by area."""
    images = np.stack([np.full((2, 4, 1), 1, np.uint8), np.full((2, 4, 1), 9, np.uint8)])
    mixed = paste(images, np.eye(2), [1, 1], [1, 0], Box(0, 2, 1, 4))
    np.testing.assert_array_equal(mixed.images[0, :, :, 0], [[1, 9, 9, 9]] * 2)
    np.testing.assert_array_equal(mixed.images[1, :, :, 0], [[9, 1, 1, 1]] * 2)
    np.testing.assert_allclose(mixed.targets, [[0.25, 0.75], [0.75, 0.25]])
    assert mixed.images.dtype == np.uint8
    assert images[0].max() == 1  # those given stay


class Middle:
    """Stands for the generator in `box_of`: the middles are given."""

    def __init__(self, *middles):
        self.middles = iter(middles)

    def integers(self, _):
        return next(self.middles)


@pytest.mark.parametrize(
    ("size", "middle", "box"),
    [
        ((9, 8), (5, 4), Box(3, 7, 2, 6)),
        ((9, 8), (0, 0), Box(0, 2, 0, 2)),  # over the upper and the left border
        ((10, 8), (9, 7), Box(7, 10, 5, 8)),  # over the lower and the right one
    ],
)
def test_the_box_by_hand(size, middle, box):
    """Yun et al., equation 2: sides of sqrt(1 - l) = 1/2 of the image's, in whole pixels."""
    assert box_of(*size, 0.75, Middle(*middle)) == box


def test_the_whole_and_nothing():
    assert box_of(6, 5, 1.0, Middle(3, 3)) == Box(3, 3, 3, 3)
    assert box_of(6, 5, 0.0, Middle(3, 2)) == Box(0, 6, 0, 5)


def test_the_share_is_beta_distributed():
    """Moments of Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))."""
    for alpha in (0.2, 1.0, 4.0):
        random = np.random.default_rng(0)
        shares = np.array([draw_share(random, alpha) for _ in range(4000)])
        assert shares.mean() == pytest.approx(0.5, abs=0.03)
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)
        assert shares.min() >= 0 and shares.max() <= 1


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_the_seed_and_the_step_decide(mix):
    first, again, next_step, other_seed = (
        mix(*batch(), random, alpha=1.0) for random in [(3, 5), (3, 5), (3, 6), (4, 5)]
    )
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.images, next_step.images)
    assert not np.array_equal(first.images, other_seed.images)
    generator = np.random.default_rng((3, 5))
    np.testing.assert_array_equal(mix(*batch(), generator, alpha=1.0).images, first.images)
    assert not np.array_equal(mix(*batch(), generator, alpha=1.0).images, first.images)  # it went on


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_alpha_zero_mixes_nothing_and_what_was_given_stays(mix):
    images, targets, weights = batch()
    kept = images.copy()
    mixed = mix(images, targets, weights, 0, alpha=0)
    np.testing.assert_array_equal(mixed.images, images)
    np.testing.assert_array_equal(mixed.targets, targets)
    np.testing.assert_array_equal(mixed.weights, weights)
    mix(images, targets, weights, 0, alpha=1.0)
    np.testing.assert_array_equal(images, kept)


@pytest.mark.parametrize(
    ("shape", "dtype", "wide"),
    [((4, 9), np.float16, np.float32), ((4, 3, 3, 8), np.float32, np.float32), ((4, 2, 5), np.float64, np.float64)],
)
def test_mixup_takes_activations_of_any_shape(shape, dtype, wide):
    images = batch(shape, dtype)[0]
    mixed = mixup(images, TARGETS, np.ones(4), (0, 1), alpha=2.0)
    assert mixed.images.shape == shape and mixed.images.dtype == wide
    # Each row lies between two of the batch, at the place that its target says.
    for row, target in zip(mixed.images, mixed.targets, strict=True):
        shares = np.linalg.lstsq(images.reshape(4, -1).T.astype(float), row.ravel().astype(float), rcond=None)[0]
        np.testing.assert_allclose(shares @ TARGETS, target, atol=1e-5)
        assert shares.sum() == pytest.approx(1, abs=1e-5)


def test_cutmix_labels_are_the_area_that_each_image_has():
    images = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 7, 7, 3), np.float32)
    mixtures = 0
    for step in range(50):
        mixed = cutmix(images, np.eye(4), np.ones(4), (1, step))
        areas = np.stack([(mixed.images == value).mean((1, 2, 3)) for value in range(4)], axis=1)
        np.testing.assert_allclose(mixed.targets, areas, atol=1e-6)
        mixtures += bool((areas.max(1) < 1).any())
    assert mixtures > 30


@pytest.mark.parametrize("shape", [(4, 9), (4, 5, 8), (4, 2, 3, 3, 1)])
def test_cutmix_refuses_what_has_no_two_spatial_axes(shape):
    with pytest.raises(InputError, match="two spatial axes"):
        cutmix(*batch(shape), 0)


@pytest.mark.parametrize(
    ("targets", "weights"), [(np.eye(3), np.ones(4)), (TARGETS, np.ones(3)), ([0, 1, 2, 0], np.ones(4))]
)
def test_arrays_that_do_not_fit_are_refused(targets, weights):
    with pytest.raises(InputError, match="4 images"):
        mixup(np.zeros((4, 2)), targets, weights, 0)


@pytest.mark.parametrize("alpha", [-1, float("nan")])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(InputError, match="alpha"):
        mixup(*batch(), 0, alpha=alpha)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_tensors_that_cross_together_are_mixed_alike(mix):
    """The second tensor is the first one at half its size, and stays so where the box has even edges."""
    coarse = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 4, 4, 2), np.float32)
    fine = coarse.repeat(2, 1).repeat(2, 2)
    targets, weights = np.eye(4), np.ones(4)
    for seed in range(5):
        both = mix((coarse, fine), targets, weights, (seed, 0), alpha=1.0)
        alone = mix(coarse, targets, weights, (seed, 0), alpha=1.0)
        np.testing.assert_array_equal(both.images[0], alone.images)
        np.testing.assert_array_equal(both.images[1], alone.images.repeat(2, 1).repeat(2, 2))
        np.testing.assert_array_equal(both.targets, alone.targets)
