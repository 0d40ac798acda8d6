"""Several real processes on this machine train together, each in a folder of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfxfer import Progress, fit
from tfxfer.workflow.run import load_run

SCRIPT = Path(__file__).parent / "one_worker.py"
# Each device drops other units, so there is one training to compare with only where none are dropped.
OPTIONS = {"epochs": 3, "learning_rate": 2e-3, "freeze_depth": "conv1", "seed": 3, "dropout": 0.0, "val_fraction": 0.3}


class Workers:
    """Processes with TF_CONFIG, the first of which is the chief."""

    def __init__(self, count: int, folder: Path, command, **environment: str):
        sockets = [socket.socket() for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        for each in sockets:
            each.close()
        self.folders = [folder / f"worker_{index}" for index in range(count)]
        self.processes = []
        for index, own in enumerate(self.folders):
            own.mkdir(parents=True, exist_ok=True)
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            process = subprocess.Popen(
                [sys.executable, *command(index)], cwd=own, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, "TF_CONFIG": json.dumps(task), "TFXFER_CACHE": str(own / "cache"), **environment},
            )  # fmt: skip
            self.processes.append(process)
            (folder / str(index)).write_text(str(process.pid))

    def end(self) -> list[tuple[int, str, str]]:
        """Exit status, stdout and stderr of each."""
        found = [process.communicate(timeout=280) for process in self.processes]
        return [(process.returncode, *texts) for process, texts in zip(self.processes, found, strict=True)]


def fits(count: int, folder: Path, data, *outs, kill=None, at=0, own=False, **options):
    """`fit` in so many processes; only the chief is told where the images are."""

    def command(index: int) -> list[str]:
        where = str(data) if index == 0 else "elsewhere"
        told = {"data": where, "outs": list(map(str, outs)), "own": own, "options": {**OPTIONS, **options}}
        if kill is not None and index == 0:
            told |= {"kill": kill, "at": at, "pids": str(folder)}
        return [str(SCRIPT), json.dumps(told)]

    # The chief must find the number of the process that it kills.
    return Workers(count, folder, command).end()


def weights(path) -> list[np.ndarray]:
    return load_run(path).model.get_weights()


def assert_near(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


@pytest.fixture(scope="module")
def alone(digits_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    run = fit(
        "digits_cnn",
        digits_folder,
        out=out,
        strategy="none",
        progress=Progress(),
        formats=(),
        baseline="none",
        **OPTIONS,
    )
    assert run.info["chosen"] != "probe"  # or nothing was trained together
    return run


def test_two_processes_train_what_one_does_and_the_chief_alone_writes(digits_folder, tmp_path, alone):
    out = tmp_path / "run"
    ends = fits(2, tmp_path, digits_folder, out)
    assert [status for status, *_ in ends] == [0, 0], ends
    told = [json.loads(stdout) for _, stdout, _ in ends]
    assert told[0] == told[1] and told[0]["path"] == str(out)
    devices = told[0]["devices"]
    assert devices["strategy"] == "multi_worker" and devices["num_workers"] == devices["num_replicas"] == 2
    computed = devices["images_by_worker"]  # each view of each image once, and once for several blocks
    assert min(computed) > 0.3 * sum(computed) and sum(computed) % alone.info["cache"]["images"] == 0
    assert not list((tmp_path / "worker_1").rglob("*")), "a worker that is not the chief has written"
    assert_near(weights(out), weights(alone.path))
    theirs, ours = load_run(out), alone
    assert [row["stage"] for row in theirs.history] == [row["stage"] for row in ours.history]
    for a, b in zip(theirs.history, ours.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert theirs.info["selection"]["blend"]["share"] == ours.info["selection"]["blend"]["share"]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kill"), [(3, 2), (2, 0)])
def test_a_killed_worker_ends_the_others_and_all_go_on_to_the_same_weights(digits_folder, tmp_path, alone, count, kill):
    options = {"dropout": 0.2}
    whole = fits(count, tmp_path / "a", digits_folder, tmp_path / "whole", **options)
    assert [status for status, *_ in whole] == [0] * count, whole
    out = tmp_path / "run"
    ends = fits(count, tmp_path / "b", digits_folder, out, kill=kill, at=8, **options)
    for index, (status, _, stderr) in enumerate(ends):
        assert status == (-9 if index == kill else 1), stderr
        if index != kill:
            assert "WorkerLost: Another worker of this training is gone" in stderr
    shutil.rmtree(tmp_path / "b" / "worker_1")
    again = fits(count, tmp_path / "b", digits_folder, out, resume=True, **options)
    assert [status for status, *_ in again] == [0] * count, again
    resumed = json.loads(again[0][1])["resumed"]
    assert any("epoch" in name and "batch" in name for name in resumed), resumed
    for a, b in zip(weights(out), weights(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_two_trainings_one_after_the_other_under_a_strategy_of_the_user(digits_folder, tmp_path, alone):
    outs = [tmp_path / "first", tmp_path / "second"]
    ends = fits(2, tmp_path / "workers", digits_folder, *outs, own=True)
    assert [status for status, *_ in ends] == [0, 0], ends
    assert_near(weights(outs[0]), weights(alone.path))
    for a, b in zip(*map(weights, outs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_all_workers_end_with_the_chief_s_sentence(digits_folder, tmp_path):
    """At the command line: no such data; and a folder in which another training is at work."""
    from tfxfer.train.lock import training_lock

    held = tmp_path / "held"
    held.mkdir()
    for data, out, sentence in (
        (tmp_path / "nothing", tmp_path / "run", "There is no folder or CSV file"),
        (digits_folder, held, "Another training is at work in"),
    ):
        arguments = ["-m", "tfxfer", "train", str(data), "--source", "digits_cnn", "--out", str(out)]
        with training_lock(held):
            ends = Workers(2, tmp_path / f"at {out.name}", lambda index, arguments=arguments: arguments).end()
        for status, stdout, stderr in ends:
            assert status == 2 and stdout == "" and sentence in stderr and "Traceback" not in stderr, stderr
