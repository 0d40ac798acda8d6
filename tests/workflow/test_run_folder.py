import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tfxfer.data import load_data
from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_file
from tfxfer.specs import Plan, read_toml
from tfxfer.workflow.planning import make_plan
from tfxfer.workflow.run import Run, as_run, begun_config, load_run, new_run_folder, write_history


def test_run_json_says_everything(trained):
    info = json.loads((trained.path / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "complete"
    assert {"name", "sha256", "licence"} <= set(info["source"]) and info["source"]["name"] == "digits_cnn"
    assert {"fingerprint", "classes", "counts", "quarantined", "leaks", "split"} <= set(info["data"])
    assert {"freeze_depth", "bit_identical", "num_variables", "sha256"} <= set(info["freeze_audit"])
    for part in ("validation", "test"):
        assert {"accuracy", "macro_f1", "log_loss", "confusion_matrix", "interval"} <= set(info["metrics"][part])
    assert {"best", "difference", "low", "high", "verdict", "scores"} <= set(info["baseline"])
    assert {"model_ready_after_process_start", "seconds", "process_start_to_now"} <= set(info["timings"])
    assert {"images", "views", "bytes"} <= set(info["cache"])
    assert {"python", "tensorflow", "keras", "tfxfer"} <= set(info["versions"])
    assert [certificate["format"] for certificate in info["certificates"]] == ["saved_model", "onnx"]
    assert info["model"] == {"file": "model.keras", "sha256": sha256_of_file(trained.path / "model.keras")}


def test_the_files_of_a_run_are_where_the_design_says(trained):
    names = {path.name for path in trained.path.iterdir()}
    assert {"config.toml", "run.json", "model.keras", "history.csv", "split.csv", "exports"} <= names
    exports = trained.path / "exports"
    for name in ("saved_model/1/saved_model.pb", "model.onnx", "certificate.json", "samples.npz"):
        assert (exports / name).is_file(), name
    assert not [path for path in trained.path.rglob("*") if path.name.startswith(".")]  # nothing half written


def test_config_toml_repeats_the_plan(trained):
    plan = make_plan(trained.path / "config.toml")
    assert plan == Plan.from_dict(trained.info["plan"])
    assert (plan.seed, plan.source, plan.image_size) == (3, "digits_cnn", 32)
    assert "out" not in read_toml(trained.path / "config.toml")


def test_split_csv_puts_every_image_where_it_was(trained, digits_folder):
    with (trained.path / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    parts = {part: {row["path"] for row in rows if row["part"] == part} for part in ("train", "val", "test")}
    assert {part: len(paths) for part, paths in parts.items()} == {
        part: sum(counts.values()) for part, counts in trained.info["data"]["counts"].items()
    }
    again = load_data(digits_folder, seed=99, split=trained.path / "split.csv")
    assert {part: set(again.part(part).ids) for part in parts} == parts
    assert again.fingerprint == trained.info["data"]["fingerprint"]
    for row in rows[::20]:
        assert sha256_of_file(digits_folder / row["path"]) == row["sha256"]
        assert row["label"] == row["path"].split("/")[1]


def test_history_has_a_row_an_epoch_with_numbers(trained):
    history = trained.history
    assert [row["epoch"] for row in history] == list(range(len(history))) and history
    for row in history:
        assert isinstance(row["epoch"], int) and isinstance(row["loss"], float)
        assert row["stage"].startswith("fine_tune") and 0 < row["learning_rate"] <= 2e-3
        assert 0 <= row["accuracy"] <= 1


def test_history_of_stages_with_other_columns(tmp_path):
    rows = [{"stage": "a", "epoch": 0, "loss": 0.5, "val_loss": 1.0}, {"stage": "b", "epoch": 1, "loss": 1e-7}]
    write_history(tmp_path / "history.csv", rows)
    assert Run(tmp_path, {}).history == rows
    write_history(tmp_path / "history.csv", [])
    assert Run(tmp_path, {}).history == []
    assert Run(tmp_path / "none", {}).history == []


def test_a_run_opens_again(trained):
    run = load_run(str(trained.path))
    assert run.info == trained.info == json.loads((trained.path / "run.json").read_text())
    assert run.class_names == ("eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero")
    assert run.metrics["test"]["num_images"] == 100
    assert run.onnx_path == trained.path / "exports" / "model.onnx"
    assert as_run(run) is run and as_run(trained.path).path == run.path
    assert repr(run) == f"Run({str(trained.path)!r})"


def test_predictions_by_onnx_and_by_keras_agree(trained, run_copy, digits_folder):
    shutil.rmtree(run_copy / "exports")
    plain = load_run(run_copy)
    assert plain.onnx_path is None
    paths = sorted((digits_folder / "test").rglob("*.png"))[::9]
    by_onnx, by_keras = trained.predict(paths), plain.predict(paths)
    assert by_onnx.shape == (len(paths), 10) and by_onnx.dtype == by_keras.dtype == np.float32
    np.testing.assert_allclose(by_onnx, by_keras, atol=1e-4)
    arrays = [np.asarray(Image.open(path))[..., None] for path in paths]
    content = [path.read_bytes() for path in paths]
    for images in (arrays, content):
        np.testing.assert_allclose(trained.predict(images), by_onnx, atol=1e-4)
        np.testing.assert_allclose(plain.predict(images), by_keras, atol=1e-4)
    stack = np.stack([np.asarray(Image.open(path).convert("RGB").resize((32, 32), 2)) for path in paths])
    np.testing.assert_allclose(plain.predict(stack), by_keras, atol=1e-4)
    named = plain.predict(paths, top_k=3)
    for row, best in zip(by_keras, named, strict=True):
        assert [name for name, _ in best] == [plain.class_names[k] for k in np.argsort(-row)[:3]]
        assert [p for _, p in best] == pytest.approx(sorted(row, reverse=True)[:3])
    assert plain.predict([]).shape == trained.predict([]).shape == (0, 10)


@pytest.mark.slow
def test_the_model_loads_in_a_fresh_process(run_copy, digits_folder):
    (run_copy / "exports" / "model.onnx").unlink()
    image = next((digits_folder / "test" / "two").iterdir())
    code = f"import tfxfer; print(tfxfer.load_run({str(run_copy)!r}).predict([{str(image)!r}], top_k=1)[0][0][0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in load_run(run_copy).class_names, done.stderr[-500:]


def test_what_is_no_run_is_refused(tmp_path, run_copy):
    with pytest.raises(InputError, match=r"There is no folder .*gone; give the folder that `tfxfer train` wrote"):
        load_run(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is not a run: it has no run\.json"):
        load_run(tmp_path / "empty")
    (run_copy / "model.keras").unlink()
    with pytest.raises(InputError, match=r"has no model\.keras"):
        _ = load_run(run_copy).model
    for text in ("{", '{"data": {}}', "[]", "\xff"):
        (run_copy / "run.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=r"run\.json is damaged"):
            load_run(run_copy)


def test_new_runs_are_numbered_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert new_run_folder(None, "clothing").as_posix() == "runs/clothing-1"
    for name in ("clothing-1", "clothing-10", "clothing-2-data", "other-77"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert new_run_folder(None, "clothing").as_posix() == "runs/clothing-11"
    assert new_run_folder(None, "my photos/2024!").as_posix() == "runs/my-photos-2024-1"
    assert new_run_folder(None, "***").as_posix() == "runs/run-1"
    assert not (tmp_path / "runs" / "clothing-11").exists()


def test_a_folder_given_must_be_new_or_empty(tmp_path, run_copy):
    assert new_run_folder(tmp_path / "new", "x") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert new_run_folder(tmp_path / "empty", "x") == tmp_path / "empty"
    with pytest.raises(InputError, match=r"copy is already a run; give another --out"):
        new_run_folder(run_copy, "x")
    (tmp_path / "empty" / "note.txt").touch()
    for path in (tmp_path / "empty", tmp_path / "empty" / "note.txt", tmp_path / "empty" / "note.txt" / "below"):
        with pytest.raises(InputError, match=r"give another --out"):
            new_run_folder(path, "x")


def test_the_plan_of_a_run_that_was_begun_is_its_config(trained, tmp_path):
    assert begun_config(trained.path) == trained.path / "config.toml"
    with pytest.raises(InputError, match=r"is no run that was begun: it has no config.toml; drop --resume"):
        begun_config(tmp_path)
