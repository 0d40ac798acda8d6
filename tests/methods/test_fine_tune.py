import numpy as np

from tfxfer.methods.fine_tune import interpolate


def test_interpolation_is_by_weight():
    first = [np.array([1.0, 2.0], np.float32), np.array([[4.0]], np.float32)]
    second = [np.array([3.0, 0.0], np.float32), np.array([[0.0]], np.float32)]
    found = interpolate(first, second, 0.25)
    np.testing.assert_array_equal(found[0], [1.5, 1.5])
    np.testing.assert_array_equal(found[1], [[3.0]])
    assert found[0].dtype == np.float32
    for share, end in ((0.0, first), (1.0, second)):
        assert all(np.array_equal(a, b) for a, b in zip(interpolate(first, second, share), end, strict=True))
