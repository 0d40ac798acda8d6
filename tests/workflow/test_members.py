"""Processes that search together."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfxfer.errors import InputError
from tfxfer.runtime.progress import Progress
from tfxfer.tuning.store import TrialStore
from tfxfer.workflow.members import ADDRESS, CHILD, ID, PORT, is_child, role, run_members

ALL = {ID: "worker-1", ADDRESS: "127.0.0.1", PORT: "8000"}


class Told(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "alone"), ({ID: "tuner7"}, "alone"), (ALL, "worker"), ({**ALL, ID: "chief"}, "chief")],
)
def test_roles_are_those_of_the_environment(environment, expected):
    assert role(environment) == expected and not is_child(environment)


def test_half_an_environment_is_refused():
    with pytest.raises(InputError, match=f"{ADDRESS} say.* {ID} and {PORT} are not set"):
        role({ADDRESS: "127.0.0.1"})


CODE = """
import os, signal, sys, time
from pathlib import Path
folder, how, name = Path(sys.argv[1]), sys.argv[2], os.environ["KERASTUNER_TUNER_ID"]
assert os.environ["TFXFER_SEARCH_CHILD"] == "1" and int(os.environ["KERASTUNER_ORACLE_PORT"]) > 0
with (folder / name).open("a") as file:
    file.write("began ")
if name == "chief":
    time.sleep(600)
if name == "worker-2" and how != "well":
    if how == "fails":
        sys.exit(2)
    if how == "always" or (folder / name).read_text() == "began ":
        os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.3)
"""


def members(tmp_path, how):
    progress = Told()
    run_members([sys.executable, "-c", CODE, str(tmp_path), how], 2, progress)
    return progress.notes


def test_all_are_started_and_none_outlives_the_workers(tmp_path):
    began = time.monotonic()
    assert members(tmp_path, "well") == []
    assert time.monotonic() - began < 20
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("chief", "worker-1", "worker-2"), "began "
    )


def test_a_killed_worker_is_started_again_under_its_name(tmp_path):
    assert members(tmp_path, "once") == ["worker-2 was killed by signal 9; it is started again"]
    assert (tmp_path / "worker-2").read_text() == "began began "


@pytest.mark.parametrize(
    ("how", "told"), [("fails", "worker-2 of the search ended with status 2"), ("always", "was killed 4 times")]
)
def test_what_cannot_go_on_ends_all(tmp_path, how, told):
    with pytest.raises(InputError, match=told):
        members(tmp_path, how)


def test_one_worker_is_no_search_together():
    with pytest.raises(InputError, match="--workers must be at least 2, not 1"):
        run_members(["true"], 1, Progress())


SEARCH = ("--source", "digits_cnn", "--tuner", "random", "--trials", "5", "--epochs", "3", "--search",
          "freeze_depth,learning_rate", "--finalists", "0", "--no-baseline", "--no-early-stop")  # fmt: skip


@pytest.mark.slow
def test_a_chief_and_two_workers_on_loopback_and_a_killed_worker_s_trial_is_retried(digits_folder, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "tfxfer", "search", digits_folder, *SEARCH, "--workers", "2", "--out", out, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TFXFER_CACHE": str(tmp_path / "c")},
    )  # fmt: skip
    killed, lines = False, []
    for line in process.stderr:
        lines.append(line)
        if not killed and "trial 0" in line:
            workers = [pid for pid in _children(process.pid) if _name(pid).startswith("worker")]
            os.kill(workers[0], signal.SIGKILL)
            killed = True
    told = process.stdout.read()
    assert process.wait() == 0 and killed, "".join(lines[-20:])
    assert any("was killed by signal 9; it is started again" in line for line in lines)
    info = json.loads(told)
    assert info["search"]["trials"] == 5 and info["search"]["failed"] == 0 and info["status"] == "complete"
    store = TrialStore(out / "search" / "trials").read_all()
    assert sorted(found.trial_id for found in store) == [str(number) for number in range(5)]
    with (out / "search.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5
    assert not [pid for pid in _children(os.getpid()) if _name(pid)]


@pytest.mark.slow
def test_the_documented_environment_makes_a_chief_and_a_worker(digits_folder, tmp_path):
    """As on two machines with one disk: each is started by hand, the worker first."""
    command = [sys.executable, "-m", "tfxfer", "search", digits_folder, *SEARCH, "--out", tmp_path / "run"]
    common = {**os.environ, ADDRESS: "127.0.0.1", PORT: str(_port()), "TFXFER_CACHE": str(tmp_path / "cache")}
    common.pop(CHILD, None)
    worker, chief = (
        subprocess.Popen(command, env={**common, ID: name}, stderr=subprocess.PIPE, text=True)
        for name in ("worker-1", "chief")
    )
    _, told = worker.communicate(timeout=240)
    assert worker.returncode == 0, told
    _, told = chief.communicate(timeout=240)
    assert chief.returncode == 0, told
    assert json.loads((tmp_path / "run" / "run.json").read_text())["search"]["trials"] == 5


def _port():
    from tfxfer.workflow.members import _free_port

    return _free_port()


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _name(pid):
    lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(line.split(b"=", 1) for line in lines if b"=" in line).get(ID.encode(), b"").decode()
