"""The benchmark's conclusions from made-up records, worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
import time_to_accuracy
from time_to_accuracy import keep_records, parse, read_record, record_file
from tta_tables import as_markdown, summarise
from tta_tasks import Task, few_a_class

from tfxfer.runtime.files import write_json

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
TASK = Task(
    "trashnet", 0, Path(), tuple(f"c/{n}" for n in range(8)), LABELS, tuple("aabbccdd"), ("x", "y"), {"test": 8}
)


def record(arm: str, num_wrong: int, wall: float, cpu: float, **seconds) -> dict:
    probabilities = np.eye(2)[LABELS]
    probabilities[:num_wrong] = probabilities[:num_wrong, ::-1]
    moments = {"model": {"wall": wall, "cpu": cpu}, **{name: {"wall": s, "cpu": s} for name, s in seconds.items()}}
    return {
        "task": "trashnet", "seed": 0, "arm": arm, "seconds": moments, "cut": False, "settings": {}, "commit": "abc",
        "load_average": [0.5, 0.5], "threads": None, "probabilities": probabilities.tolist(),
    }  # fmt: skip


RECORDS = [
    record("keras_features", 4, wall=40, cpu=60, imports=10),
    record("timm", 1, wall=300, cpu=500, imports=5),
    record("tfxfer_probe", 2, wall=20, cpu=30, whole=50),
    record("tfxfer", 0, wall=50, cpu=90, whole=100),
]


def test_ratio_is_to_the_first_model_that_is_as_good():
    first, second = summarise(RECORDS, [TASK])["comparisons"]
    assert (first["first_model"], second["first_model"]) == ("tfxfer_probe", "tfxfer")
    assert first["times_faster"]["to_accuracy (cpu)"] == 2.0
    assert first["times_faster"]["to_accuracy, no imports (cpu)"] == 2.5  # (60 - 10) / (30 - 10)
    assert second["times_faster"]["to_accuracy (wall)"] == 6.0
    assert second["times_faster"]["tfxfer whole (cpu)"] == 5.0
    assert second["difference"] == 0.125


def test_goals_are_against_the_best_peer():
    goals = summarise(RECORDS, [TASK])["goals"]
    assert goals[0]["goal"].endswith("timm-style fine-tuning") and goals[0]["wanted"] == 5.0 and goals[0]["met"]
    assert [goal["value"] for goal in goals[1::2]] == [0.125, 0.125]


def test_a_peer_that_is_never_reached_misses_the_goal():
    records = [record("timm", 0, 300, 500), record("tfxfer_probe", 2, 20, 30), record("tfxfer", 1, 50, 90, whole=100)]
    summary = summarise(records, [TASK])
    assert summary["goals"][0]["value"] is None and not summary["goals"][0]["met"]
    assert summary["goals"][1]["value"] == -0.125 and not summary["goals"][1]["met"]
    summary |= {"cores": 2, "versions": {"python": "3.11"}, "commit": "abc"}
    text = as_markdown(summary)
    assert "| never | 5 | missed |" in text and "Not measured" in text


def test_another_test_part_is_refused():
    reordered = TASK.in_order(TASK.paths[::-1], ("y", "x"), np.eye(2)[LABELS])
    assert reordered.argmax(1).tolist() == LABELS.tolist()
    with pytest.raises(SystemExit, match="another test part"):
        TASK.in_order(TASK.paths[1:], ("x", "y"), np.eye(2)[LABELS[1:]])


def test_few_a_class_takes_different_groups_first():
    rows = [(Path(f"{label}{n}"), label, f"{label}{n % 3}") for label in "ab" for n in range(9)]
    chosen = few_a_class(rows, 3, seed=1)
    assert sorted(group for _, _, group in chosen) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert len(few_a_class(rows, 5, seed=1)) == 10


def test_words_for_groups_of_arms(tmp_path, capsys):
    options = parse(["--arms", "ours", "--tasks", "clothing", "--results", str(tmp_path), "--report-only"])
    assert options.arms == ["tfxfer_probe", "tfxfer", "tfxfer_gate"] and options.tasks == ["clothing"]
    with pytest.raises(SystemExit):
        parse(["--arms", "pytorch", "--report-only"])
    assert "does not know pytorch" in capsys.readouterr().err


def test_records_of_another_day_are_found_and_own_ones_win(tmp_path, monkeypatch):
    monkeypatch.setattr(time_to_accuracy, "KEPT", tmp_path / "kept")
    assert read_record(tmp_path / "today", TASK, "timm") is None
    for day, wall in (("yesterday", 1), ("today", 2)):
        file = record_file(tmp_path / day, TASK, "timm")
        file.parent.mkdir(parents=True)
        write_json(file, record("timm", 1, wall=wall, cpu=1))
    keep_records(tmp_path / "yesterday", [TASK])
    assert read_record(tmp_path / "tomorrow", TASK, "timm") == record("timm", 1, wall=1, cpu=1)
    assert read_record(tmp_path / "today", TASK, "timm") == record("timm", 1, wall=2, cpu=1)
