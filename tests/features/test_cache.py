"""The cache against what was computed without it; killed, racing and starved processes; damaged entries."""

import fcntl
import gc
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from tfxfer.errors import CheckError, InputError
from tfxfer.features.cache import CacheWarning, FeatureCache, parse_bytes
from tfxfer.features.keys import cache_key, content_digest
from tfxfer.features.shelf import CacheFull, Shelf
from tfxfer.runtime.locks import take_lock
from tfxfer.runtime.store import RowStore

SHAPES = {"activations": ((40, 2, 2, 8), "float16"), "features": ((40, 16), "float32")}
KEYS = [cache_key(number=number) for number in range(6)]
ENTRY_BYTES = 40 * 32 * 2 + 40 * 16 * 4


def rows_of(name, seed=0):
    shape, dtype = SHAPES[name]
    return np.random.default_rng(seed + len(name)).normal(size=shape).astype(dtype)


def compute(stores, seed=0, pause_seconds=0.0):
    for start in (20, 0):
        for name, store in stores.items():
            store.write(start, rows_of(name, seed)[start : start + 20])
            time.sleep(pause_seconds)


# What each process of these tests begins with.
COMMON = f"""
import os, signal, sys, time
from pathlib import Path
import numpy as np
from tfxfer.features.cache import FeatureCache
from tfxfer.features.keys import cache_key
from tfxfer.features.shelf import CacheFull
from tfxfer.runtime.locks import take_lock
SHAPES, KEYS = {SHAPES}, {KEYS}
{inspect.getsource(rows_of)}
{inspect.getsource(compute)}
"""


def start(code, *arguments, **options):
    command = [sys.executable, "-W", "error", "-c", COMMON + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=tempfile.gettempdir(), **options)


def ends(process, timeout_seconds=30):
    output = process.communicate(timeout=timeout_seconds)[0]
    assert process.returncode == 0
    return output


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache")


def fill(cache, number, seed=None):
    seed = number if seed is None else seed
    cache.get_or_fill(KEYS[number], SHAPES, {"seed": seed}, lambda stores: compute(stores, seed)).close()


def holds(cache, number):
    """Whether the entry is there, with the values that were computed."""
    entry = cache.get(KEYS[number])
    if entry is None:
        return False
    with entry:
        for name in SHAPES:
            np.testing.assert_array_equal(entry.stores[name][:], rows_of(name, entry.meta["seed"]))
    return True


def there(cache):
    """Entries by number, without using them."""
    return [number for number, key in enumerate(KEYS) if (cache.folder / key).is_dir()]


def left_over(cache):
    return sorted(path.name for path in cache.folder.iterdir() if path.name.startswith(".") and path.name != ".lock")


# --- keys and digests ---


def test_the_key_is_the_hash_of_sorted_json():
    text = '{"format":1,"parts":{"block":"b5","sizes":[1,2.5],"view":{"name":"mirror","seed":null}}}'
    parts = {"view": {"seed": None, "name": "mirror"}, "sizes": (np.int64(1), np.float32(2.5)), "block": "b5"}
    assert cache_key(**parts) == hashlib.sha256(text.encode()).hexdigest()


def test_the_key_changes_with_every_part():
    parts = {
        "data": "ab12", "source": "cd34", "block": "block_5", "size_px": 96, "view": {"name": "crop", "seed": 3},
        "batch_norm": "frozen", "dtype": "float16", "versions": {"keras": "3.15.1"}, "mirrored": False,
    }  # fmt: skip
    keys = {cache_key(**parts)}
    for name, value in parts.items():
        others = {"changed": value, "none": None, "gone": ...}
        others |= {"number": value + 1, "text": str(value), "float": float(value)} if isinstance(value, int) else {}
        others |= {f"deep {deep}": {**value, deep: "other"} for deep in (value if isinstance(value, dict) else ())}
        others["changed"] = [value]
        for other in others.values():
            changed = {**parts, name: other}
            keys.add(cache_key(**{part: changed[part] for part in parts if changed[part] is not ...}))
    assert len(keys) == 1 + 3 * 9 + 3 * 2 + 3  # as many keys as there are variations
    assert cache_key(**dict(reversed(parts.items()))) in keys


@pytest.mark.parametrize("part", [np.ones(2), float("nan"), float("inf"), {1: 2}, {1, 2}, b"x", object(), [np.ones(1)]])
def test_what_has_no_exact_form_makes_no_key(part):
    with pytest.raises(InputError, match=r"source: .* has no exact form in JSON"):
        cache_key(source=part)


def test_the_digest_is_that_of_shape_dtype_and_pieces():
    """Of 11 MB in pieces of whole rows up to 4 MB, by hand."""
    images = np.random.default_rng(0).integers(0, 256, (11, 1000, 1000), np.uint8)
    digest = hashlib.blake2b(b"|u1(11, 1000, 1000);", digest_size=32)
    for first, stop in ((0, 4), (4, 8), (8, 11)):
        digest.update(hashlib.blake2b(images[first:stop].tobytes(), digest_size=32).digest())
    assert content_digest(images) == content_digest([images]) == digest.hexdigest()


def test_the_digest_knows_content_not_layout(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 300, 300, 3), np.uint8)  # 13.5 MB: in threads
    expected = content_digest(images)
    mirrored = np.ascontiguousarray(images[:, :, ::-1])
    store = RowStore.in_memory(images.shape, "uint8")
    store.write(0, images)
    for same in (np.asfortranarray(images), mirrored[:, :, ::-1], store, images.copy()):
        assert content_digest(same) == expected
    changed = images.copy()
    changed[49, 299, 299, 2] ^= 1
    wrong = [changed, images[::-1], mirrored, images.view(np.int8), images.reshape(50, 300, 900), images[:49]]
    wrong += [[images[:25], images[25:]], [images[25:], images[:25]], [images, images[:0]], []]
    digests = [content_digest(other) for other in wrong]
    assert len({expected, *digests}) == 1 + len(wrong)


def test_objects_have_no_digest():
    with pytest.raises(InputError, match="Arrays of objects"):
        content_digest(np.array(["a", None], object))


# --- what goes in comes out ---


def test_an_entry_is_computed_once_and_read_as_it_was_computed(cache):
    assert cache.get(KEYS[0]) is None
    calls = []
    for _ in range(3):
        with cache.get_or_fill(
            KEYS[0], SHAPES, {"views": ["plain"], "n": np.int64(3)}, lambda stores: calls.append(1) or compute(stores)
        ) as entry:
            assert entry.meta == {"views": ["plain"], "n": 3} and entry.key == KEYS[0]
            assert list(entry.stores) == list(SHAPES)
            for name, (shape, dtype) in SHAPES.items():
                store = entry.stores[name]
                assert (store.shape, store.stored_dtype) == (shape, dtype)
                np.testing.assert_array_equal(store[[39, 0, 7, 7]], rows_of(name)[[39, 0, 7, 7]])
    assert calls == [1]
    several = [FeatureCache(cache.folder).get(KEYS[0]) for _ in range(3)]  # at once
    assert all(several)
    assert np.load(cache.folder / KEYS[0] / "features.npy").tobytes() == rows_of("features").tobytes()
    assert cache.get(KEYS[1]) is None
    assert left_over(cache) == []


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = FeatureCache("cache")
    fill(cache, 0)
    monkeypatch.chdir("/")
    assert holds(cache, 0) and there(FeatureCache(tmp_path / "cache")) == [0]


def test_summary_and_clear(cache):
    for number in range(3):
        fill(cache, number)
    summary = cache.summary()
    on_disk = sum(file.stat().st_size for file in cache.folder.rglob("*") if file.is_file())
    assert summary["entries"] == 3 and summary["bytes"] == on_disk
    assert 3 * ENTRY_BYTES < on_disk < 3 * (ENTRY_BYTES + 4096)  # each with its small files
    assert summary["folder"] == str(cache.folder) and summary["max_bytes"] == cache.max_bytes > 0
    entry = cache.get(KEYS[1])
    assert cache.clear() == 2 and there(cache) == [1]
    entry.close()
    assert cache.clear() == 1 and cache.summary()["entries"] == cache.summary()["bytes"] == 0


def test_an_error_in_the_block_publishes_nothing(cache):
    for error in (RuntimeError("mine"), KeyboardInterrupt(), OSError(28, "No space left", "/elsewhere"), OSError("x")):
        with pytest.raises(type(error)) as found, cache.fill(KEYS[0], SHAPES) as filling:
            compute(filling.stores)
            raise error
        assert found.value is error
        assert there(cache) == [] and left_over(cache) == []


def test_rows_that_were_forgotten_are_told_and_not_kept(cache):
    with (
        pytest.raises(CheckError, match="3 of 40 rows of 'features' were never written"),
        cache.fill(KEYS[0], SHAPES) as f,
    ):
        f.stores["activations"].write(0, rows_of("activations"))
        f.stores["features"].write(3, rows_of("features")[3:])
    assert there(cache) == [] and left_over(cache) == []


def test_wrong_arguments_make_nothing(cache):
    cases = {
        "64 hexadecimal digits": ("../../x", SHAPES, {}),
        "A store's name": (KEYS[0], {"../x": ((2, 2), "float32")}, {}),
        "meta: ndarray": (KEYS[0], SHAPES, {"scores": [np.ones(3)]}),
        "A store holds": (KEYS[0], {"x": ((2, 2), "float64")}, {}),
    }
    for message, arguments in cases.items():
        with pytest.raises(InputError, match=message), cache.fill(*arguments):
            raise AssertionError("not reached")
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        cache.get(KEYS[0].upper())
    assert not cache.folder.exists() or [path.name for path in cache.folder.iterdir()] == [".lock"]


# --- killed ---

KILLED = """
    import json, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside NumPy's idle threads
    folder = sys.argv[1]

    def fill():
        FeatureCache(folder).get_or_fill(KEYS[0], SHAPES, {"seed": 0}, lambda stores: compute(stores, 0, 0.002)).close()

    def attempt(act):
        child = os.fork()  # of a process with nothing but NumPy: the cheapest that can be killed for real
        if child == 0:
            act()
            os._exit(0)
        return child

    def dies_at(step, act):
        # Before a call that changes the disk, which is then as any kill since the call before leaves it.
        count = [0]
        for name in ("mkdir", "ftruncate", "pwrite", "fsync", "rename", "utime", "unlink", "rmdir", "open"):
            def wrapped(*args, real=getattr(os, name), **options):
                count[0] += 1
                if count[0] > step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)
            setattr(os, name, wrapped)
        act()

    def look(child):
        status = os.waitpid(child, 0)[1]
        entry = FeatureCache(folder).get(KEYS[0])
        state = "absent"
        if entry:
            same = [entry.stores[name][:].tobytes() == rows_of(name).tobytes() for name in SHAPES]
            state = "complete" if all(same) else "wrong"
            entry.close()
        return os.WIFSIGNALED(status), state

    def at_every_step(before, act):
        seen = []
        while not seen or seen[-1][0]:
            before()
            seen.append(look(attempt(lambda: dies_at(len(seen), act))))
        return seen

    def at_random():
        FeatureCache(folder).clear()
        child = attempt(fill)
        time.sleep(random.uniform(0, 1.5 * fill_seconds))
        os.kill(child, signal.SIGKILL)
        return look(child)

    random = np.random.default_rng()
    clear = lambda: FeatureCache(folder).clear()
    began = time.monotonic()
    look(attempt(fill))
    fill_seconds = time.monotonic() - began
    found = [at_every_step(clear, fill), at_every_step(fill, clear), [at_random() for _ in range(20)]]
    clear()
    print(json.dumps([*found, os.listdir(folder)]))
"""


def test_a_kill_at_any_moment_leaves_all_or_nothing(tmp_path):
    filling, clearing, random, left = json.loads(ends(start(KILLED, tmp_path / "cache")))
    for steps, (first, last) in ((filling, ("absent", "complete")), (clearing, ("complete", "absent"))):
        states = [state for _, state in steps]
        turned = states.index(last)
        assert 3 < turned < len(states) - 1
        assert states == [first] * turned + [last] * (len(states) - turned)
        assert [killed for killed, _ in steps] == [True] * (len(steps) - 1) + [False]
    assert {state for _, state in random} <= {"absent", "complete"}
    assert left == [".lock"]


def test_everything_is_on_the_disk_before_the_entry_has_its_name(cache, monkeypatch):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("reads names of open files in /proc")
    calls, sync, rename = [], os.fsync, os.rename

    def fsync(descriptor):
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda *paths: calls.append("rename") or rename(*paths))
    fill(cache, 0)
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") :]
    assert {path.name for path in (cache.folder / KEYS[0]).iterdir()} - set(before) == {"used"}  # which is empty
    assert before[-1] == f".{KEYS[0]}.fill" and after == ["rename", "cache"]


def test_what_a_dead_process_left_goes_with_the_next_fill_and_a_live_one_keeps_its_own(cache):
    code = """
        with FeatureCache(sys.argv[1]).fill(KEYS[int(sys.argv[2])], SHAPES, {"seed": 0}) as filling:
            print("begun", flush=True)
            sys.stdin.readline()
            compute(filling.stores)
    """
    dead, live = (start(code, cache.folder, number) for number in (1, 2))
    assert dead.stdout.readline() == live.stdout.readline() == "begun\n"
    dead.kill()
    dead.communicate()
    left = [f".{key}.{end}" for key in KEYS[1:3] for end in ("fill", "lock")]
    assert left_over(cache) == sorted(left)
    gone = cache.folder / f".{KEYS[4]}.gone"  # of a process that died while it evicted
    shutil.copytree(cache.folder / left[0], gone)
    fill(cache, 0)
    assert left_over(cache) == sorted(left[2:])
    live.stdin.write("\n")
    ends(live)
    assert there(cache) == [0, 2] and holds(cache, 2) and left_over(cache) == []


# --- two at once ---

RACER = """
    folder, log = sys.argv[1], sys.argv[2]
    def slowly(stores):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\\n")
        compute(stores, pause_seconds=float(sys.argv[3]))
    cache = FeatureCache(folder)
    print("ready", flush=True)
    sys.stdin.readline()
    with cache.get_or_fill(KEYS[0], SHAPES, {"seed": 0}, slowly) as entry:
        print(entry.stores["features"][:].tobytes() == rows_of("features").tobytes())
"""


def racers(cache, log, *pauses_seconds):
    processes = [start(RACER, cache.folder, log, pause_seconds) for pause_seconds in pauses_seconds]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    return processes


def wait_until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_of_processes_with_one_key_one_computes_and_all_have_it(cache, tmp_path):
    log = tmp_path / "log"
    processes = racers(cache, log, 0.05, 0.05, 0.05)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [ends(process) for process in processes] == ["True\n"] * 3
    assert len(log.read_text().split()) == 1
    assert holds(cache, 0) and left_over(cache) == []


def test_where_the_first_dies_the_second_takes_over(cache, tmp_path):
    log = tmp_path / "log"
    first, second = racers(cache, log, 0.5, 0.0)
    first.stdin.write("\n")
    first.stdin.flush()
    wait_until(log.exists)
    second.stdin.write("\n")
    second.stdin.flush()
    time.sleep(0.1)
    first.kill()
    first.communicate()
    assert ends(second) == "True\n"
    assert log.read_text().split() == [str(first.pid), str(second.pid)]
    assert holds(cache, 0) and left_over(cache) == []


def test_the_wait_is_bounded(cache):
    with cache.fill(KEYS[0], SHAPES, {"seed": 0}) as filling:
        began = time.monotonic()
        with (
            pytest.raises(CacheFull, match=r"the same features for 0.2 s"),
            FeatureCache(cache.folder).fill(KEYS[0], SHAPES, wait_seconds=0.2),
        ):
            raise AssertionError("not reached")
        assert 0.2 <= time.monotonic() - began < 2
        compute(filling.stores)
    assert filling.entry.meta == {"seed": 0}
    assert filling.entry.stores["features"][0].tobytes() == rows_of("features")[0].tobytes()


def test_whoever_comes_to_fill_what_is_there_finds_it(cache):
    fill(cache, 0)
    with cache.fill(KEYS[0], SHAPES, {"seed": 99}) as filling:
        assert filling.stores == {} and filling.entry.meta == {"seed": 0}
    assert left_over(cache) == []


def test_a_lock_on_a_file_that_was_removed_excludes_nobody_and_is_taken_anew(tmp_path, monkeypatch):
    path, lock_file = tmp_path / "x.lock", fcntl.flock
    removed = []

    def removed_just_before(descriptor, kind):
        if not removed:  # by its holder, who then lets go, after this process has opened it
            removed.append(path.stat().st_ino)
            path.unlink()
        lock_file(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", removed_just_before)
    lock = take_lock(path)
    assert lock.is_on(path) and removed
    assert take_lock(path) is None and take_lock(path, shared=True) is None
    lock.close()
    shared = [take_lock(path, shared=True), take_lock(path, shared=True)]
    assert all(shared) and take_lock(path) is None
    del shared
    gc.collect()
    assert take_lock(path) is not None


# --- room ---


def room_for(cache, count):
    """The same folder with room for so many of these entries."""
    return FeatureCache(cache.folder, count * (ENTRY_BYTES + 3000) + 3000)


def test_the_least_recently_used_goes_first(cache):
    cache = room_for(cache, 3)
    for number in (0, 1, 2):
        fill(cache, number)
    assert there(cache) == [0, 1, 2]
    assert holds(cache, 0)  # so that 1 is the oldest
    fill(cache, 3)
    assert there(cache) == [0, 2, 3]
    fill(cache, 2)  # is there: counts as use
    fill(cache, 4)
    assert there(cache) == [2, 3, 4]
    cache.make_room(cache.max_bytes - 2 * ENTRY_BYTES)
    assert there(cache) == [4]
    assert holds(cache, 4) and left_over(cache) == []
    for number in (0, 1, 2, 3, 5):
        fill(cache, number)
        assert cache.summary()["bytes"] <= cache.max_bytes


def test_where_it_cannot_fit_nothing_is_evicted(cache):
    cache = room_for(cache, 2)
    fill(cache, 0)
    fill(cache, 1)
    with pytest.raises(CacheFull, match=r"do not fit into the feature cache .* of 0.0 MB .*TFXFER_CACHE_BYTES"):
        cache.make_room(cache.max_bytes + 1)
    held = [cache.get(KEYS[1])]
    with pytest.raises(CacheFull), cache.fill(KEYS[2], {"x": ((2 * ENTRY_BYTES,), "uint8")}):
        raise AssertionError("not reached")
    assert there(cache) == [0, 1] and left_over(cache) == []
    del held[:]
    cache.make_room(cache.max_bytes)
    assert there(cache) == []


def test_fills_under_way_count_with_their_whole_length(cache):
    cache = room_for(cache, 1)
    with cache.fill(KEYS[0], SHAPES, {"seed": 0}) as filling:
        with pytest.raises(CacheFull), cache.fill(KEYS[1], SHAPES):
            raise AssertionError("not reached")
        compute(filling.stores)
    assert there(cache) == [0]


def test_an_open_entry_is_not_evicted_as_long_as_one_store_lives(cache):
    cache = room_for(cache, 2)
    fill(cache, 0)
    fill(cache, 1)
    store = cache.get(KEYS[0]).stores["features"]  # the entry itself is gone at once
    gc.collect()
    holds(cache, 1)  # 0 is the oldest, and open
    fill(cache, 2)
    assert there(cache) == [0, 2]
    np.testing.assert_array_equal(store[:], rows_of("features"))
    del store
    gc.collect()
    fill(cache, 3)
    assert there(cache) == [2, 3]


def test_the_entry_that_was_just_filled_is_open(cache):
    cache = room_for(cache, 1)
    with cache.fill(KEYS[0], SHAPES, {"seed": 0}) as filling:
        compute(filling.stores)
    with pytest.raises(CacheFull):
        fill(cache, 1)
    filling.entry.close()
    fill(cache, 1)
    assert there(cache) == [1]


def test_an_entry_open_in_another_process_is_not_evicted(cache):
    cache = room_for(cache, 2)
    fill(cache, 0)
    fill(cache, 1)
    code = """
        entry = FeatureCache(sys.argv[1]).get(KEYS[0])
        print("open", flush=True)
        sys.stdin.readline()
    """
    reader = start(code, cache.folder)
    assert reader.stdout.readline() == "open\n"
    holds(cache, 1)
    fill(cache, 2)
    assert there(cache) == [0, 2]
    with pytest.raises(CacheFull):
        cache.make_room(cache.max_bytes)
    reader.kill()  # and a killed one holds nothing
    reader.communicate()
    cache.make_room(cache.max_bytes)
    assert there(cache) == []


# --- damage ---


def damage_truncate(folder):
    os.truncate(folder / "features.npy", (folder / "features.npy").stat().st_size - 4)


def damage_flip(folder):
    content = bytearray((folder / "activations.npy").read_bytes())
    content[1234] ^= 1
    (folder / "activations.npy").write_bytes(content)


def damage_meta(folder):
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def damage_missing(folder):
    (folder / "features.npy").unlink()


def damage_no_sums(folder):
    (folder / "checksums.json").unlink()


def damage_sums(folder):
    (folder / "checksums.json").write_text("{" * 40)


def damage_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_other_entry(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name(KEYS[1]), folder)


DAMAGES = {name.removeprefix("damage_"): value for name, value in globals().items() if name.startswith("damage_")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_dropped_and_made_anew(damage, cache):
    fill(cache, 0)
    fill(cache, 1)
    DAMAGES[damage](cache.folder / KEYS[0])
    with pytest.warns(CacheWarning, match="A damaged entry of the feature cache is dropped"):
        assert cache.get(KEYS[0]) is None
    assert there(cache) == [1] and left_over(cache) == []
    fill(cache, 0)
    assert holds(cache, 0) and holds(cache, 1)


def test_damage_found_on_the_way_is_made_anew_at_once(cache):
    fill(cache, 0)
    damage_flip(cache.folder / KEYS[0])
    with pytest.warns(CacheWarning, match=r"activations.npy does not have the checksum"):
        fill(cache, 0, seed=5)
    assert holds(cache, 0) and cache.get(KEYS[0]).meta == {"seed": 5}


def test_a_new_entry_is_not_dropped_for_the_damage_of_an_old_one(cache):
    fill(cache, 0)
    lock_of_old = take_lock(cache.folder / KEYS[0] / "used", shared=True)
    shutil.rmtree(cache.folder / KEYS[0])  # as another process does that saw the damage too
    fill(cache, 0)
    Shelf(cache.folder).drop(cache.folder / KEYS[0], lock_of_old)
    assert holds(cache, 0)


def test_a_large_store_is_checked_at_both_ends_and_between(cache):
    rows = np.zeros((40, 1 << 20), np.uint8)
    path = cache.folder / KEYS[0] / "x.npy"
    for place in (200, 20_000_000, rows.nbytes):  # 122 bytes before the end, as the header has 128
        with cache.fill(KEYS[0], {"x": (rows.shape, "uint8")}) as filling:
            filling.stores["x"].write(0, rows)
        filling.entry.close()
        cache.get(KEYS[0]).close()
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"damage")
        with pytest.warns(CacheWarning, match=r"x.npy does not have the checksum"):
            assert cache.get(KEYS[0]) is None


def test_an_entry_that_cannot_be_read_now_is_a_miss_and_stays(cache):
    fill(cache, 0)
    code = """
        import resource, warnings
        cache = FeatureCache(sys.argv[1])
        assert cache.available
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), 4096))  # one more: for the lock
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = cache.get(KEYS[0])
        print(found, [(each.category.__name__, "cannot be read now" in str(each.message)) for each in seen])
    """
    assert ends(start(code, cache.folder)) == "None [('CacheWarning', True)]\n"
    assert holds(cache, 0)


# --- disks and settings ---


def test_a_file_too_large_for_the_system_is_a_full_cache(cache):
    code = """
        import resource, traceback
        cache = FeatureCache(sys.argv[1])
        for when in ("before", "within"):
            try:
                if when == "before":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))
                with cache.fill(KEYS[0], SHAPES, {"seed": 0}) as filling:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))
                    compute(filling.stores)
            except CacheFull as error:
                print(when, "File too large" in str(error), sorted(path.name for path in cache.folder.iterdir()))
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    """
    assert ends(start(code, cache.folder)) == "before True ['.lock']\nwithin True ['.lock']\n"
    fill(cache, 0)
    assert holds(cache, 0)


def may_mount():
    return (
        subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
        if shutil.which("unshare")
        else False
    )


@pytest.fixture
def own_disk(tmp_path):
    """Starts code in a process that alone sees a disk of 1 MB at `tmp_path`/disk."""
    if not may_mount():
        pytest.skip("may not mount a small disk")
    (tmp_path / "disk").mkdir()

    def run(code):
        mount = f'mount -t tmpfs -o size=1m tmpfs {tmp_path / "disk"} && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", COMMON + textwrap.dedent(code)]
        return subprocess.run(
            [*command, tmp_path / "disk"], capture_output=True, text=True, timeout=30, check=True, cwd=tmp_path
        ).stdout

    return run


def test_a_full_disk_publishes_nothing(own_disk):
    code = """
        disk = Path(sys.argv[1])
        cache = FeatureCache(disk / "cache", "1GB")
        shapes = {"x": ((600, 1000), "uint8")}
        for number in (0, 1):
            try:
                with cache.fill(KEYS[number], shapes) as filling:
                    if number == 0:
                        (disk / "ballast").write_bytes(bytes(600_000))  # somebody else was quicker
                    for row in range(600):
                        filling.stores["x"].write(row, np.ones((1, 1000), np.uint8))
            except CacheFull as error:
                print(row, "No space left on device" in str(error), [path.name for path in cache.folder.iterdir()])
            (disk / "ballast").unlink(missing_ok=True)
            print((cache.folder / KEYS[number]).is_dir())
        filling.entry.close()
        # On a disk of 1 MB the second fits only where the first goes, whatever max_bytes allows.
        with cache.fill(KEYS[2], shapes) as filling:
            print((cache.folder / KEYS[1]).is_dir())
            filling.stores["x"].write(0, np.ones((600, 1000), np.uint8))
        try:
            with cache.fill(KEYS[3], {"x": ((1200, 1000), "uint8")}) as filling:
                print("not reached")
        except CacheFull as error:
            print("free on its disk" in str(error), (cache.folder / KEYS[2]).is_dir())
    """
    lines = own_disk(code).splitlines()
    row = int(lines[0].split()[0])
    assert 100 < row < 600, "the disk was not full in the middle"
    assert lines == [f"{row} True ['.lock']", "False", "True", "False", "True True"]


READ_ONLY = """
    import warnings
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cache = FeatureCache(folder)
        states = [cache.available, cache.get(KEYS[0]), cache.max_bytes, cache.clear(), cache.summary()["entries"]]
        for act in (lambda: cache.fill(KEYS[0], SHAPES).__enter__(), lambda: cache.make_room(1)):
            try:
                act()
            except CacheFull as error:
                states.append(str(error))
    refusal = "There is no feature cache: it is turned off, or its folder cannot be written."
    print(states == [False, None, 0, 0, 0, refusal, refusal])
    print([each.category.__name__ for each in seen], str(seen[0].message).split(":")[0])
"""
UNAVAILABLE = "True\n['CacheWarning'] Features are computed without a cache\n"


def test_a_disk_that_is_read_only_is_no_cache(own_disk):
    code = """
        import subprocess
        folder = Path(sys.argv[1])
        FeatureCache(folder).get_or_fill(KEYS[0], SHAPES, {}, compute).close()
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    """
    assert own_disk(textwrap.dedent(code) + textwrap.dedent(READ_ONLY)) == UNAVAILABLE


def test_a_folder_that_may_not_be_written_is_no_cache():
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which others than its owner may not enter
        (Path(folder) / ".lock").touch()
        (Path(folder) / ".lock").chmod(0o666)
        Path(folder).chmod(0o555)
        code = """
            folder = sys.argv[1]
            if os.getuid() == 0:  # who may write everything
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
        """
        assert ends(start(textwrap.dedent(code) + textwrap.dedent(READ_ONLY), folder)) == UNAVAILABLE


def test_a_folder_that_cannot_be_is_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TFXFER_CACHE", str(tmp_path / "file" / "cache"))
    for folder in (tmp_path / "file", None):
        cache = FeatureCache(folder)
        with pytest.warns(CacheWarning, match="without a cache: .* TFXFER_CACHE chooses another folder") as seen:
            assert not cache.available and cache.get(KEYS[0]) is None and cache.summary()["folder"] is None
        assert len(seen) == 1


def test_a_folder_that_vanishes_costs_the_entry_only(cache):
    with pytest.raises(CacheFull, match="cannot be written"), cache.fill(KEYS[0], SHAPES) as filling:
        shutil.rmtree(cache.folder)
        compute(filling.stores)
    assert cache.get(KEYS[0]) is None and cache.summary()["entries"] == 0
    with pytest.raises(CacheFull, match="cannot be written"), cache.fill(KEYS[0], SHAPES):
        raise AssertionError("not reached")


def test_zero_turns_it_off_without_a_word(tmp_path, monkeypatch):
    monkeypatch.setenv("TFXFER_CACHE_BYTES", "0")
    cache = FeatureCache(tmp_path / "cache")
    assert not cache.available and cache.get(KEYS[0]) is None and cache.max_bytes == 0
    assert cache.summary() == {"entries": 0, "bytes": 0, "max_bytes": 0, "folder": None}
    with pytest.raises(CacheFull, match="turned off"), cache.fill(KEYS[0], SHAPES):
        raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []
    assert FeatureCache(tmp_path / "cache", "1GB").available  # what is said in code wins


def test_folder_and_size_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFXFER_CACHE", str(tmp_path))
    monkeypatch.setenv("TFXFER_CACHE_BYTES", "1.5GB")
    cache = FeatureCache()
    assert cache.available and cache.folder == tmp_path / "features" and cache.max_bytes == 1_500_000_000
    monkeypatch.setenv("TFXFER_CACHE_BYTES", "plenty")
    with pytest.raises(InputError, match=r"20GB, 500MB or 0 .*, got 'plenty'"):
        FeatureCache()
    monkeypatch.delenv("TFXFER_CACHE_BYTES")
    cache = FeatureCache()
    fill(cache, 0)
    tenth = shutil.disk_usage(tmp_path).free / 10
    assert cache.max_bytes == 20_000_000_000 or cache.max_bytes == pytest.approx(tenth, rel=0.05)
    assert cache.max_bytes <= 20_000_000_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20GB", 20 * 10**9),
        ("500mb", 5 * 10**8),
        (" 2 TB ", 2 * 10**12),
        ("1GiB", 2**30),
        ("12", 12),
        (7, 7),
        ("3kB", 3000),
    ],
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "5 XB", "1,5GB", -3, float("nan"), True])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match="A cache size is a number of bytes"):
        parse_bytes(text)
