import errno
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tfxfer.errors import CheckError, InputError
from tfxfer.train import journal as journal_module
from tfxfer.train.checkpoint import KEEP, Checkpoints, read_checkpoint, write_checkpoint
from tfxfer.train.journal import Journal, NotSavedWarning, Terminated
from tfxfer.train.lock import check_free, training_lock


def arrays(seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    return {
        "kernel": random.normal(size=(3, 4)).astype("float32"),
        "half": random.normal(size=5).astype("float16"),
        "count": np.array(7, "int64"),
        "seed": np.array([1, 2], "uint32"),
        "empty": np.zeros((0, 3), "float32"),
        "flags": np.array([True, False]),
    }


def test_arrays_and_facts_come_back_bit_for_bit(tmp_path):
    facts = {"loss": 0.1 + 0.2, "worst": float("inf"), "history": [{"epoch": 1, "name": "ü"}], "none": None}
    write_checkpoint(tmp_path / "a.checkpoint", arrays(), facts)
    found, told = read_checkpoint(tmp_path / "a.checkpoint")
    assert told == facts
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    found["kernel"][0, 0] = 5  # they may be written to


def test_bfloat16_comes_back(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.array([1.5, -2.25], ml_dtypes.bfloat16)
    write_checkpoint(tmp_path / "a.checkpoint", {"x": values}, {})
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "a.checkpoint")[0]["x"], values)


def test_every_flipped_or_missing_byte_is_seen(tmp_path):
    path = tmp_path / "a.checkpoint"
    write_checkpoint(path, {"x": np.arange(3, dtype="float32")}, {"step": 1})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckError, match="cannot be read as a checkpoint"):
            read_checkpoint(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckError, match="cannot be read as a checkpoint"):
            read_checkpoint(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(CheckError):
        read_checkpoint(path)


def test_the_newest_two_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    kept = Checkpoints(tmp_path / "kept")
    assert kept.latest() is None
    for step in range(5):
        kept.save({"x": np.full(2, step)}, {"step": step})
        assert Checkpoints(tmp_path / "kept").latest()[1] == {"step": step}
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == KEEP == 2
    files[1].write_bytes(files[1].read_bytes()[:-1])
    assert Checkpoints(tmp_path / "kept").latest()[1] == {"step": 3}
    Checkpoints(tmp_path / "kept").save({}, {"step": 9})  # numbered on, not over what is there
    assert Checkpoints(tmp_path / "kept").latest()[1] == {"step": 9}


def test_a_save_that_fails_leaves_the_previous_one_byte_for_byte(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path)
    kept.save(arrays(), {"step": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space"):
        kept.save(arrays(1), {"step": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


FILLING = """
import sys, numpy as np, resource
from pathlib import Path
from tfxfer.train.checkpoint import Checkpoints
kept = Checkpoints(Path(sys.argv[1]))
kept.save({"x": np.zeros(1000)}, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    kept.save({"x": np.zeros(100_000)}, {"step": 2})
except OSError as error:
    print(type(error).__name__, kept.latest()[1])
"""


def test_a_disk_that_is_full_leaves_the_previous_one(tmp_path):
    """A file may not grow beyond 20 KB: what a full disk does, in a real process."""
    done = subprocess.run([sys.executable, "-c", FILLING, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OSError {'step': 1}"
    assert len(list(tmp_path.iterdir())) == 1


# -- the journal ---------------------------------------------------------------------------------------------------


def counted(calls: list, value: float = 1.0):
    def make():
        calls.append(value)
        return {"x": np.full(2, value)}, {"value": value}

    return make


def test_a_finished_unit_is_not_made_again(tmp_path):
    calls: list = []
    first = Journal(tmp_path / "j")
    found = first.memo("probe", counted(calls))
    assert first.memo("probe", counted(calls, 2.0))[1] == found[1] and first.resumed == []
    again = Journal(tmp_path / "j")
    other = again.memo("probe", counted(calls, 3.0))
    assert calls == [1.0] and other[1] == {"value": 1.0} and again.resumed == ["probe"]
    np.testing.assert_array_equal(other[0]["x"], found[0]["x"])
    assert again.memo("another", counted(calls, 4.0))[1] == {"value": 4.0}
    again.clear()
    assert not (tmp_path / "j").exists()


def test_a_damaged_unit_is_made_again(tmp_path):
    calls: list = []
    Journal(tmp_path).memo("probe", counted(calls))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert Journal(tmp_path).memo("probe", counted(calls, 2.0))[1] == {"value": 2.0}


def test_without_a_folder_nothing_is_kept():
    calls: list = []
    journal = Journal()
    journal.memo("probe", counted(calls))
    journal.memo("probe", counted(calls))
    assert len(calls) == 2


def test_an_open_unit_goes_on_from_its_last_save_and_a_finished_one_forgets_the_way(tmp_path):
    def work(unit, stop_at=None):
        found = unit.state()
        start = found[1]["step"] if found else 0
        for step in range(start, 10):
            if step == stop_at:
                raise RuntimeError
            unit.save({"x": np.full(2, step + 1)}, {"step": step + 1, "at": f"step {step + 1}"})
        return {}, {"began_at": start}

    with pytest.raises(RuntimeError):
        Journal(tmp_path).run("tune", lambda unit: work(unit, stop_at=6))
    journal = Journal(tmp_path)
    assert journal.run("tune", work)[1] == {"began_at": 6}
    assert journal.resumed == ["tune at step 6"]
    assert [path.suffix for path in tmp_path.iterdir()] == [".unit"]


def test_it_is_due_after_its_time_and_a_save_that_takes_long_is_made_seldom(tmp_path):
    def work(unit):
        assert not unit.due()
        time.sleep(0.06)
        assert unit.due()
        unit.save({}, {})
        assert not unit.due()
        unit._save_seconds = 10.0
        time.sleep(0.06)
        assert not unit.due()
        return {}, {}

    Journal(tmp_path, every_seconds=0.05).run("tune", work)


def test_where_nothing_can_be_written_training_goes_on_with_a_warning(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(journal_module, "write_checkpoint", fail)
    with pytest.warns(NotSavedWarning, match=r"could not be written \(Read-only file system\); training goes on"):
        assert Journal(tmp_path).memo("probe", counted([]))[1] == {"value": 1.0}


def test_sigterm_saves_the_open_unit_and_ends(tmp_path):
    def work(unit):
        for step in range(200):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if unit.due():
                unit.save({"x": np.full(1, step)}, {"step": step})
            time.sleep(0.005)
        raise AssertionError("it went on")

    before = signal.getsignal(signal.SIGTERM)
    journal = Journal(tmp_path)
    with pytest.raises(Terminated, match="what was reached is saved") as error, journal.ends_on_sigterm():
        journal.run("tune", work)
    assert error.value.exit_status == 143 and signal.getsignal(signal.SIGTERM) is before
    assert 3 <= Journal(tmp_path).run("tune", lambda unit: ({}, unit.state()[1]))[1]["step"] <= 5


def test_sigterm_between_units_ends_at_once(tmp_path):
    with pytest.raises(Terminated), Journal(tmp_path).ends_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)


def test_sigterm_ends_at_once_what_keeps_no_state_whatever_it_catches(tmp_path):
    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            time.sleep(2)
        except Exception:  # as code does that tries another way
            return {}, {"value": 2}
        raise AssertionError("it went on")

    journal = Journal(tmp_path)
    with pytest.raises(Terminated) as error, journal.ends_on_sigterm():
        journal.memo("probe", work)
    assert isinstance(error.value, SystemExit) and error.value.code == 143
    assert Journal(tmp_path).memo("probe", lambda: ({}, {"value": 1}))[1] == {"value": 1}  # it was not finished


def test_a_batch_that_takes_too_long_is_given_up_for_what_was_saved_before(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "GRACE_SECONDS", 0.2)

    def work(unit):
        unit.save({}, {"step": 3})
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("it went on")

    began, journal = time.monotonic(), Journal(tmp_path)
    with pytest.raises(Terminated, match="what was saved before"), journal.ends_on_sigterm():
        journal.run("tune", work)
    assert 0.2 <= time.monotonic() - began < 2
    assert Journal(tmp_path).run("tune", lambda unit: ({}, unit.state()[1]))[1]["step"] == 3


def test_elsewhere_than_in_the_main_thread_signals_are_left_alone(tmp_path):
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with Journal(tmp_path).ends_on_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# -- the lock ------------------------------------------------------------------------------------------------------

HOLDING = """
import sys, time
from pathlib import Path
from tfxfer.train.lock import training_lock
with training_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_training_is_refused_naming_the_first_until_that_dies(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for enter in (lambda: training_lock(tmp_path).__enter__(), lambda: check_free(tmp_path)):
            with pytest.raises(InputError, match=f"Another training is at work in .*: process {holder.pid}, since 20"):
                enter()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with training_lock(tmp_path):
        assert (tmp_path / ".holder.json").is_file()
    assert list(tmp_path.iterdir()) == []
    check_free(tmp_path)


@pytest.mark.parametrize("kept", [True, False])
def test_sigterm_saves_the_open_unit_of_another_training_in_the_same_process_too(tmp_path, kept):
    def work(unit):
        unit.save({"x": np.full(1, 7)}, {"step": 2})
        os.kill(os.getpid(), signal.SIGTERM)
        assert unit.due()
        unit.save({"x": np.full(1, 8)}, {"step": 3})
        raise AssertionError("it went on")

    journal = Journal(tmp_path if kept else None)
    told = "what was reached is saved" if kept else "nothing could be saved"
    with pytest.raises(Terminated, match=told), journal.ends_on_sigterm():
        journal.memo("probe", counted([]))
        journal.child("seed-1").run("tune", work)
    if kept:
        again = Journal(tmp_path / "seed-1")
        assert again.run("tune", lambda unit: ({}, unit.state()[1]))[1]["step"] == 3
        assert "tune" not in " ".join(path.name for path in tmp_path.iterdir())
        journal.clear()
    assert not tmp_path.exists() or not any(tmp_path.iterdir())
