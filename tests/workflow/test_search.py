"""A search from data to a verified run, killed and gone on with."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tfxfer import search
from tfxfer.errors import InputError
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan
from tfxfer.tuning.store import TrialStore
from tfxfer.workflow.scoring import verify

QUICK = {"tuner": "grid", "trials": 3, "epochs": 3, "keys": ("freeze_depth",), "repeats": 1, "baseline": "none"}


class Told(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def found(digits_folder, tmp_path_factory):
    progress = Told()
    out = tmp_path_factory.mktemp("searches") / "first"
    run = search(digits_folder, "digits_cnn", out=out, progress=progress, **QUICK)
    return run, progress.notes


def test_the_winner_is_trained_scored_exported_and_verified(found):
    run, _ = found
    told = run.info["search"]
    assert run.info["status"] == "complete" and run.info["metrics"]["test"]["accuracy"]["value"] > 0.7
    assert told["trials"] == 3 and told["failed"] == 0 and told["score"]["value"] >= told["score"]["corrected"] - 0.05
    plan = Plan.from_dict(run.info["plan"])
    (_, stage) = plan.recipe.stages
    assert plan.recipe.name == "search" and stage.epochs == 3
    winner = TrialStore(run.path / "search" / "trials").read(told["winner"])
    assert stage.freeze_depth == winner.freeze_depth == told["values"]["freeze_depth"]
    verify(run.path)


def test_the_cheapest_of_the_equal_is_taken(found):
    run, _ = found
    equal = run.info["search"]["equal"]
    assert [one["num_trainable"] for one in equal] == sorted(one["num_trainable"] for one in equal)
    assert equal[0]["trial"] == run.info["search"]["winner"]
    assert all(one["below_best"] <= one["standard_error"] + 1e-9 for one in equal)


def test_every_trial_is_told_and_stands_in_the_table(found):
    run, notes = found
    with (run.path / "search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["0000", "0001", "0002"] or len(rows) == 3
    assert len({row["freeze_depth"] for row in rows}) == 3 and all(float(row["val_accuracy"]) > 0.3 for row in rows)
    told = [note for note in notes if note.startswith("trial ") and "again" not in note]
    assert len(told) == 3 and all("best" in note and "saved" in note for note in told)
    assert (run.path / "search.png").stat().st_size > 5000


def test_what_is_shared_is_counted_over_all_trials(found):
    run, _ = found
    passes, store = run.info["search"]["passes"], TrialStore(run.path / "search" / "trials").read_all()
    images = run.info["data"]["counts"]
    count = sum(images["train"].values()) + sum(images["val"].values())
    assert passes["without_sharing"] == sum(len(found.history) for found in store) * count
    assert passes["computed"] <= 3 * count


def test_a_search_that_is_there_is_not_begun_again_and_a_finished_one_is_given_back(found, digits_folder):
    run, _ = found
    with pytest.raises(InputError, match="is already a search; go on with it by --resume"):
        search(digits_folder, "digits_cnn", out=run.path, progress=Progress(), **QUICK)
    began = time.monotonic()
    again = search(digits_folder, "digits_cnn", out=run.path, progress=Progress(), resume=True, **QUICK)
    assert again.info == json.loads((run.path / "run.json").read_text()) and time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tuner": "random"}, "was begun with tuner grid, not random"),
        ({"keys": ("dropout",)}, "was begun with space"),
        ({"seed": 5}, "was begun with "),
    ],
)
def test_a_search_with_something_else_is_refused_and_says_what(found, digits_folder, tmp_path, change, told):
    import shutil

    run, _ = found
    copy = shutil.copytree(run.path, tmp_path / "copy")
    (copy / "run.json").unlink()
    with pytest.raises(InputError, match=told):
        search(digits_folder, "digits_cnn", out=copy, progress=Progress(), resume=True, **{**QUICK, **change})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tuner": "hyperbnd"}, "Unknown tuner 'hyperbnd'. Did you mean 'hyperband'"),
        ({"trials": 0}, "trials must be at least 1, not 0"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"keys": ("deepness",)}, "The default space has no 'deepness'"),
        ({"space": lambda hp: None}, "The space must return a tfxfer.Plan"),
        ({"resume": True}, "is no search that was begun"),
    ],
)
def test_what_cannot_be_searched_leaves_nothing_behind(digits_folder, tmp_path, change, told):
    with pytest.raises(InputError, match=told):
        search(digits_folder, "digits_cnn", out=tmp_path / "run", progress=Progress(), **{**QUICK, **change})
    assert not (tmp_path / "run").exists()


CODE = """
import sys
from tfxfer import search
from tfxfer.runtime.progress import Lines
search(sys.argv[1], "digits_cnn", out=sys.argv[2], resume=sys.argv[3] == "resume", progress=Lines(), tuner="random",
       trials=4, epochs=2, keys=("freeze_depth", "learning_rate"), finalists=0, baseline="none", formats=(), seed=3)
"""


def test_a_killed_search_loses_no_finished_trial_and_repeats_none(digits_folder, tmp_path):
    """Killed inside the second trial and right behind the third."""

    def started(out, how):
        return subprocess.Popen(
            [sys.executable, "-c", CODE, str(digits_folder), str(out), how], stderr=subprocess.PIPE, text=True
        )

    def lines_until(process, word):
        lines = []
        for line in process.stderr:
            lines.append(line)
            if word in line:
                break
        return lines

    out = tmp_path / "killed"
    process = started(out, "anew")
    lines_until(process, "trial 0")
    time.sleep(0.4)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = TrialStore(out / "search" / "trials")
    first = {found.trial_id: found.seconds for found in store.read_all()}
    assert first

    process = started(out, "resume")
    lines_until(process, "trial 2")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    second = {found.trial_id: found.seconds for found in store.read_all()}
    assert len(second) >= len(first) + 1

    process = started(out, "resume")
    _, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    third = {found.trial_id: found.seconds for found in store.read_all()}
    assert len(third) == 4 and all(third[name] == seconds for name, seconds in {**first, **second}.items())
    whole = tmp_path / "whole"
    process = started(whole, "anew")
    assert process.wait() == 0
    unstopped = TrialStore(whole / "search" / "trials").read_all()
    for ours, theirs in zip(store.read_all(), unstopped, strict=True):
        assert dict(ours.values) == dict(theirs.values)
        np.testing.assert_allclose(ours.held_probabilities, theirs.held_probabilities, atol=1e-5)
