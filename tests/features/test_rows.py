"""Rows in files, picked, stacked and in views, against the same in NumPy."""

import numpy as np
import pytest

from tfxfer.features.rows import Picked, Stacked, ViewFeatures, room_for, row_blocks
from tfxfer.runtime.store import RowStore

TABLE = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)


def stored(values: np.ndarray) -> RowStore:
    store = RowStore.temporary(values.shape)
    store.write(0, values)
    return store


@pytest.mark.parametrize("rows", [3, slice(2, 9), slice(None), np.array([7, 0, 4, 7]), np.array([], int), [1, 9], -1])
def test_views_are_flat_as_a_reshaped_array(rows):
    found = ViewFeatures([stored(view) for view in TABLE])
    np.testing.assert_array_equal(found.flat[rows], TABLE.reshape(10, 3)[rows])
    assert found.flat.shape == (10, 3) and found.flat.dtype == np.float32


def test_views_are_picked_joined_and_counted():
    found = ViewFeatures.of(TABLE)
    assert ViewFeatures.of(found) is found and len(found) == 2 and found.shape == (2, 5, 3)
    rows, columns = np.array([4, 1]), np.array([2, 0])
    np.testing.assert_array_equal(found.picked(rows, columns), TABLE[:, rows][:, :, columns])
    np.testing.assert_array_equal(found.picked(rows)[1][np.array([1])], TABLE[1, rows[[1]]])
    np.testing.assert_array_equal(found.joined(found.first(1)), np.concatenate([TABLE, TABLE[:1]]))
    assert found.picked(columns=columns).flat.shape == (10, 2)
    views = np.array([1, 0])
    np.testing.assert_array_equal(found[views, rows], TABLE[views, rows])
    np.testing.assert_array_equal(found[1, rows], TABLE[1, rows])


def test_rows_and_columns_of_rows_and_columns():
    inner = Picked(stored(TABLE[0]), rows=np.array([4, 2, 0]), columns=np.array([2, 1]))
    np.testing.assert_array_equal(Picked(inner, rows=np.array([2, 0])), TABLE[0][[0, 4]][:, [2, 1]])
    np.testing.assert_array_equal(Stacked([inner, inner])[np.array([5, 0])], TABLE[0][[0, 4]][:, [2, 1]])


def test_few_rows_stay_in_memory(monkeypatch):
    monkeypatch.setattr("tfxfer.features.rows.BLOCK_BYTES", 48)
    assert "memory" in repr(room_for((4, 3))) and "temporary" in repr(room_for((5, 3)))
    assert [block.stop - block.start for block in row_blocks(9, 3)] == [4, 4, 1]
