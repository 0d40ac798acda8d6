"""A store in a file against the same rows in an array, np.load, and damaged files."""

import gc
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tfxfer.errors import CheckError, InputError
from tfxfer.features.precision import choose_dtype
from tfxfer.runtime.store import RowStore, TooLargeForFloat16

WAYS = ("file", "temporary", "memory")


def values(shape, dtype, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, shape).astype(dtype) if dtype == "uint8" else random.normal(size=shape).astype(dtype)


def make(way, tmp_path, shape, dtype, **options):
    if way == "file":
        return RowStore.create(tmp_path / "rows.npy", shape, dtype, **options)
    return (RowStore.temporary if way == "temporary" else RowStore.in_memory)(shape, dtype, **options)


def written(way, tmp_path, rows, **options):
    store = make(way, tmp_path, rows.shape, rows.dtype, **options)
    store.write(0, rows)
    store.flush()
    return store


@pytest.fixture
def reads(monkeypatch):
    """The reads that reach the system: bytes of each."""
    seen, real = [], os.preadv

    def counting(descriptor, buffers, offset):
        seen.append(sum(map(len, buffers)))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    return seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("row", [(), (5,), (2, 3, 4)])
def test_reads_what_an_array_gives(way, dtype, row, tmp_path):
    rows = values((97, *row), dtype)
    store = make(way, tmp_path, rows.shape, dtype)
    parts = np.random.default_rng(1).permutation(np.arange(0, 97, 8))
    for start in parts:
        store.write(start, rows[start : start + 8])
    store.flush()
    assert store.complete and len(store) == 97 and store.shape == rows.shape
    assert store.dtype == rows.dtype and store.nbytes == rows.nbytes
    order = np.random.default_rng(2).permutation(97)
    drawn = np.random.default_rng(3).integers(-97, 97, 300)  # with duplicates, from both ends
    empty = np.zeros(0, int)
    slices = (slice(None), slice(90, 3, -7), slice(5, 5), slice(10, 20), slice(-9, None))
    for asked in (order, drawn, drawn.tolist(), empty, *slices, 0, 96, -1, np.int32(5)):
        assert store[asked].dtype == rows.dtype
        np.testing.assert_array_equal(store[asked], rows[asked])
    assert store[[]].shape == (0, *row)


def test_the_file_is_an_npy_file_and_opens_again(tmp_path):
    rows = values((31, 4, 2), "float16")
    store = written("file", tmp_path, rows)
    assert np.load(tmp_path / "rows.npy").tobytes() == rows.tobytes()
    again = RowStore.open(tmp_path / "rows.npy", read_as="float32")
    assert again.dtype == np.float32 and again.stored_dtype == np.float16 and again.complete
    np.testing.assert_array_equal(again[[30, 2]], rows[[30, 2]].astype(np.float32))
    again.read_as = None
    assert again[:].dtype == np.float16
    assert (tmp_path / "rows.npy").stat().st_size == RowStore.file_bytes(rows.shape, "float16")
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store[0]


def test_what_np_save_wrote_opens(tmp_path):
    rows = values((7, 3), "float32")
    np.save(tmp_path / "saved.npy", rows)
    np.testing.assert_array_equal(RowStore.open(tmp_path / "saved.npy")[:], rows)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_read_is_a_copy(way, tmp_path):
    rows = values((5, 2), "float32")
    store = written(way, tmp_path, rows.copy())
    store[:][:] = 0
    np.testing.assert_array_equal(store[:], rows)


@pytest.mark.parametrize(
    ("asked", "num_reads"),
    [(slice(10, 60), 1), (slice(60, 10, -1), 1), ([4, 3, 9, 8, 2], 2), ([1, 1, 1], 1), ([0, 2, 4], 3)],
)
def test_neighbours_are_read_together_and_duplicates_once(asked, num_reads, tmp_path, reads):
    rows = values((100, 3), "float32")
    store = written("file", tmp_path, rows)
    np.testing.assert_array_equal(store[asked], rows[asked])
    assert len(reads) == num_reads
    assert sum(reads) == 12 * len(set(np.arange(100)[asked].tolist()))


def test_thousands_of_scattered_neighbours(tmp_path, reads):
    rows = values((5000, 2), "uint8")
    store = written("file", tmp_path, rows)
    order = np.random.default_rng(0).permutation(5000)
    np.testing.assert_array_equal(store[order], rows[order])
    assert len(reads) == -(-5000 // os.sysconf("SC_IOV_MAX"))


def test_a_read_that_brings_less_is_gone_on_with(tmp_path, monkeypatch):
    """As the system does above 2 GB; here 7 bytes a call."""
    rows = values((20, 3), "float32")
    store = written("file", tmp_path, rows)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:7]], offset))
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(store[order], rows[order])


def test_a_write_that_takes_less_is_gone_on_with(tmp_path, monkeypatch):
    rows = values((20, 3), "float32")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:7], offset))
    written("file", tmp_path, rows)
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), rows)


@pytest.mark.parametrize("way", WAYS)
def test_threads_write_disjoint_rows(way, tmp_path):
    rows = values((4000, 8), "float32")
    store = make(way, tmp_path, rows.shape, "float32")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda start: store.write(start, rows[start : start + 5]), range(0, 4000, 5)))
        assert store.complete
        found = list(pool.map(lambda start: store[start : start + 5], range(0, 4000, 5)))
    np.testing.assert_array_equal(np.concatenate(found), rows)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_were_never_written_are_known(way, tmp_path):
    store = make(way, tmp_path, (10, 2), "float32")
    for start, stop in ((2, 4), (6, 7), (4, 6), (3, 5), (9, 10)):  # 2 to 6 and 9, with a gap closed and an overlap
        store.write(start, np.full((stop - start, 2), start, np.float32))
    assert not store.complete and store.num_missing == 4
    np.testing.assert_array_equal(store[[9, 2, 6]][:, 0], [9, 2, 6])
    for asked in (0, 1, 7, 8, slice(2, 8), [3, 8]):
        with pytest.raises(CheckError, match=r"Row [0178] of .* was never written"):
            store[asked]
    store.write(0, np.zeros((2, 2)))
    store.write(7, np.zeros((2, 2)))
    assert store.complete and store.num_missing == 0


def test_an_unfinished_file_cannot_be_taken_for_a_whole_one(tmp_path):
    path = tmp_path / "rows.npy"
    store = RowStore.create(path, (10, 2))
    store.write(1, np.ones((9, 2)))
    store.flush()
    with pytest.raises(InputError, match=f"{path} is not a finished store"):
        RowStore.open(path)
    with pytest.raises(ValueError):
        np.load(path)
    store.write(0, np.ones((1, 2)))
    with pytest.raises(InputError, match="not a finished store"):
        RowStore.open(path)
    store.flush()
    assert RowStore.open(path).complete
    for closed in (store, RowStore.open(path)):
        with pytest.raises(InputError, match="is finished and can only be read"):
            closed.write(0, np.ones((1, 2)))


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "rows.npy"
    rows = values((100, 10), "float32")
    written("file", tmp_path, rows)
    store = RowStore.open(path)
    os.truncate(path, path.stat().st_size - 1)
    np.testing.assert_array_equal(store[:99], rows[:99])
    for asked in (99, slice(None), [0, 99, 5]):
        with pytest.raises(CheckError, match=f"{path} is truncated"):
            store[asked]
    with pytest.raises(CheckError, match=f"{path} is damaged: 4127 bytes, 4128 expected"):
        RowStore.open(path)
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(CheckError, match="4129 bytes, 4128 expected"):
        RowStore.open(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.npy"
    for content in (b"", b"\x93NUMPY", b"PK\x03\x04" * 20, b"\x93NUMPY\x01\x00v\x00" + b"{'descr': 7" + b" " * 107):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path} is not a finished store"):
            RowStore.open(path)
    whole = np.arange(12.0).reshape(3, 4)
    by_columns = np.asfortranarray(whole, np.float32)
    for array in (whole, by_columns, np.array(["a"], object), np.float32(3), whole.astype(">f4")):
        np.save(path, array)
        with pytest.raises(InputError, match="but not of rows in float32, float16, uint8"):
            RowStore.open(path)
    with pytest.raises(InputError, match="There is no store"):
        RowStore.open(tmp_path / "missing.npy")


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_do_not_fit_are_refused(way, tmp_path):
    store = make(way, tmp_path, (4, 3), "float32")
    for rows in (np.ones((2, 4)), np.ones(3), np.ones((2, 3, 1))):
        with pytest.raises(InputError, match=r"have the shape \(3,\)"):
            store.write(0, rows)
    for start in (-1, 3, 5):
        with pytest.raises(InputError, match=f"Rows {start} to {start + 2} are not within the 4"):
            store.write(start, np.ones((2, 3)))
    for rows in (np.ones((2, 3), complex), np.full((2, 3), "1"), np.ones((2, 3), bool)):
        with pytest.raises(InputError, match="holds float32"):
            store.write(0, rows)
    bytes_store = make(way, tmp_path, (4, 3), "uint8")
    for dtype in ("float32", "int64", "uint16"):  # which would wrap
        with pytest.raises(InputError, match=f"holds uint8, got {dtype}"):
            bytes_store.write(0, np.ones((2, 3), dtype))
    assert store.num_missing == bytes_store.num_missing == 4
    for asked in (4, -5, [0, 4], [-5], np.array([True, False, True, True]), (0, 1), [[0]], 1.0, "a", None, True):
        with pytest.raises(IndexError):
            store[asked]


@pytest.mark.parametrize(("shape", "dtype"), [((), "float32"), ((-1, 2), "float32"), ((2,), "float64"), ((2,), "int8")])
def test_no_file_is_made_for_a_store_that_cannot_be(shape, dtype, tmp_path):
    for way in WAYS:
        with pytest.raises(InputError, match="A store"):
            make(way, tmp_path, shape, dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_stores_of_nothing(shape, tmp_path):
    store = written("file", tmp_path, np.zeros(shape, np.float32))
    assert store.complete and RowStore.open(tmp_path / "rows.npy")[:].shape == shape
    assert store[[0, 2, 0] if shape[0] else []].shape == ((3, 0) if shape[0] else (0, 3))


@pytest.mark.parametrize("way", WAYS)
def test_float16_takes_only_what_it_can_hold(way, tmp_path):
    store = make(way, tmp_path, (4, 2), "float16", read_as="float32")
    with pytest.raises(TooLargeForFloat16, match="holds float16; 70000 is beyond its range"):
        store.write(0, np.array([[1, -70000], [2, 3]], np.float32))
    assert store.num_missing == 4
    odd = np.array([[np.inf, -np.inf], [np.nan, 65504.0], [65519.0, 1e-9], [1 / 3, 0]], np.float32)
    store.write(0, odd)  # what is not finite stays so; 65519 rounds to 65504
    expected = [[np.inf, -np.inf], [np.nan, 65504], [65504, 0], [0.333251953125, 0]]
    np.testing.assert_array_equal(store[:], np.array(expected, np.float32))


def test_the_float16_rule_by_closed_form():
    """A value on a float16 grid of step q is rounded by q / sqrt(12) in the mean square."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(4000, 3))
    for level, step in ((3.0, 2**-9), (6.0, 2**-8), (100.0, 2**-4)):
        # At so high a level nearly all values lie where the step is this one.
        spread = step / np.sqrt(12) / 1e-3
        assert choose_dtype(level * 1.3 + 2 * spread * noise) == "float16", level
        assert choose_dtype(level * 1.3 + 0.5 * spread * noise) == "float32", level
        assert choose_dtype(level * 1.3 + 0.5 * spread * noise, tolerance=4e-3) == "float16", level


def test_the_float16_rule_looks_at_every_channel():
    random = np.random.default_rng(0)
    good = random.normal(size=(50, 4, 4, 8))
    assert choose_dtype(good) == choose_dtype(np.maximum(good, 0)) == choose_dtype(good[:, 0, 0, 0]) == "float16"
    one_bad = good.copy()
    one_bad[..., 5] = 1.3 + 0.01 * good[..., 5]  # off by 3e-4: little beside the others, 3 % of its own movement
    assert choose_dtype(one_bad) == "float32"
    dead, constant = good.copy(), good.copy()
    dead[..., 5] *= 1e-9  # moves less than a millionth of the others: no solver looks at it
    constant[..., 5] = 1 / 3
    assert choose_dtype(dead) == choose_dtype(constant) == "float16"
    constant[..., 5] = 1000.3  # off by 0.2, which the layers behind would see beside channels that move by 1
    assert choose_dtype(constant) == "float32"


@pytest.mark.parametrize("scale", [1e4, 1e6, np.inf, np.nan])
def test_the_float16_rule_leaves_room_above(scale):
    sample = np.random.default_rng(0).normal(size=(100, 4))
    sample[7, 2] = scale
    assert choose_dtype(sample) == "float32"
    assert choose_dtype(sample[:0]) == "float32"


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_files_are_closed_with_the_last_reference(tmp_path):
    gc.collect()
    before = open_files()
    stores = [make(way, tmp_path, (3, 2), "float32") for way in WAYS]
    written("file", tmp_path, np.ones((3, 2), np.float32))
    stores += [RowStore.open(tmp_path / "rows.npy")]
    with pytest.raises(CheckError):
        os.truncate(tmp_path / "rows.npy", 140)
        RowStore.open(tmp_path / "rows.npy")
    assert open_files() == before + 3
    del stores
    assert open_files() == before


def test_a_temporary_store_has_no_name(tmp_path):
    store = RowStore.temporary((1000, 10), folder=tmp_path)
    store.write(0, np.ones((1000, 10)))
    assert list(tmp_path.iterdir()) == [] and store[:].sum() == 10_000
    assert store.path is None and "temporary file" in repr(store)


def test_peak_memory_does_not_grow_with_the_store(tmp_path):
    """200 MB written and read in batches of 1 MB, in any order, in a process of its own."""
    code = """
        import re, sys
        from pathlib import Path
        import numpy as np
        from tfxfer.runtime.store import RowStore

        def peak_mb():  # of this process image; getrusage would begin at the peak of the process that started it
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

        batch = np.ones((40, 6250), np.float32)
        def use(num_rows):
            store = RowStore.create(sys.argv[1], (num_rows, 6250))
            for start in range(0, num_rows, 40):
                store.write(start, batch)
            store.flush()
            store = RowStore.open(sys.argv[1])
            order = np.random.default_rng(0).permutation(num_rows)
            for start in range(0, num_rows, 40):
                assert store[order[start : start + 40]].sum() == store[start : start + 40].sum() == 250_000

        use(80)
        before = peak_mb()
        use(8000)
        print(peak_mb() - before)
    """
    if not Path("/proc/self/status").is_file():
        pytest.skip("reads the peak in /proc")
    command = [sys.executable, "-c", textwrap.dedent(code), tmp_path / "rows.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) < 20
