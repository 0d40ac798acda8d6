import csv
import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tfxfer.cli import app
from tfxfer.cli.show import describe_baseline, describe_time_limit
from tfxfer.cli.train import parse_seconds
from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_file, sha256_of_folder
from tfxfer.sources.catalog import get_source, list_sources
from tfxfer.workflow import training
from tfxfer.workflow.planning import make_plan
from tfxfer.workflow.run import load_run

CLI = CliRunner()


def invoke(*arguments):
    return CLI.invoke(app, [*map(str, arguments)])


def python(code: str, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=180
    )  # fmt: skip


# -- what needs no run ---------------------------------------------------------------------------------------------


def test_sources_lists_every_card():
    listed = json.loads(invoke("sources", "--json").stdout)
    assert [row["name"] for row in listed] == [card.name for card in list_sources()]
    table = invoke("sources").stdout
    for card in list_sources():
        assert card.name[:12] in table


def test_one_source_shows_its_card():
    found = invoke("sources", "digits_cnn", "--json")
    assert found.exit_code == 0
    card = get_source("digits_cnn")
    assert json.loads(found.stdout)["weights"]["sha256"] == card.weights["sha256"]
    assert "Apache-2.0" in invoke("sources", "digits_cnn").stdout


def test_print_config_is_the_resolved_plan_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = invoke(
        "train", "no/such/data", "--source", "digits_cnn", "--recipe", "auto", "--freeze", "conv2", "--epochs", "3",
        "--lr", "0.002", "--batch-norm", "affine", "--seed", "5", "--metric", "macro_f1", "--time-limit", "2m",
        "--group-by", "^a", "--no-baseline", "--seeds", "2", "--dropout", "0.1", "--batch-size", "8", "--print-config",
    )  # fmt: skip
    assert found.exit_code == 0
    expected = make_plan(
        source="digits_cnn", recipe="auto", freeze_depth="conv2", epochs=3, learning_rate=0.002, batch_norm="affine",
        seed=5, metric="macro_f1", time_limit_seconds=120.0, group_by="^a", baseline="none", num_seeds=2, dropout=0.1,
        batch_size=8,
    )  # fmt: skip
    assert tomllib.loads(found.stdout) == expected.to_dict()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400), (None, None)])
def test_times(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-3", "0", "five", "nan", "inf", "3d"])
def test_what_is_no_time(text):
    with pytest.raises(InputError, match=r"is not a time above zero; write seconds, or 5m, or 1h"):
        parse_seconds(text)


def test_a_time_limit_in_words():
    plan = {"stage": "fine_tune", "does": "1 rate, 4 epochs, 1 fold"}
    limit = {"seconds": 60.0, "left": 0.4, "left_out": {}}
    info = {"time_limit": limit, "selection": {"time_plan": [plan]}}
    assert describe_time_limit(info) == [("time limit", "60 s; fine_tune: 1 rate, 4 epochs, 1 fold")]
    info = {"time_limit": {"seconds": 5.0, "left": -20.0, "left_out": {"tune": "it is over"}}, "selection": {}}
    over = "5 s, passed by 20 s: a probe, its score and its exports are never left out"
    assert describe_time_limit(info) == [("time limit", over), ("left out", "tune (it is over)")]
    assert describe_time_limit({"selection": {}}) == []


def test_the_verdict_in_one_line():
    gate = {
        "verdict": "negative", "metric": "accuracy", "model": 0.87, "scores": {"SVC on pixels": 0.96, "other": 0.1},
        "best": "SVC on pixels", "difference": -0.09, "low": -0.1, "high": -0.05, "proven": False,
        "note": "not proven: it had not converged",
    }  # fmt: skip
    line = describe_baseline(gate)
    assert line.startswith("negative: accuracy 0.870 against 0.960 of the best baseline, SVC on pixels")
    assert "-0.090 (-0.100 to -0.050)" in line and line.endswith("; not proven: it had not converged")
    assert describe_baseline({"verdict": "not asked"}) == "not compared (--no-baseline)"


def test_a_dry_run_shows_what_would_be_frozen_and_reads_no_image(digits_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("train", digits_folder, "--source", "digits_cnn", "--freeze", "re:conv2", "--dry-run")
    found = json.loads(invoke(*options, "--json").stdout)
    assert len(found["class_names"]) == 10
    probe, tuned = found["stages"]
    assert probe["num_trainable"] == 64 * 10 + 10
    frozen = {layer["layer"] for layer in tuned["layers"] if not layer["num_trainable"]}
    assert frozen == {"conv2"} and tuned["num_trainable"] == tuned["num_parameters"] - (32 * 64 * 9 + 64)
    text = invoke(*options).stdout
    assert "freeze re:conv2" in text and "18,496" in text
    assert list(tmp_path.iterdir()) == []


def test_a_source_s_default_depth_is_shown_as_blocks(tmp_path, monkeypatch):
    assert (
        json.loads(invoke("sources", "digits_cnn", "--json").stdout)["fine_tune_depth"]
        == get_source("digits_cnn").fine_tune_depth
    )
    monkeypatch.chdir(tmp_path)
    backbone = keras.applications.MobileNet(weights=None, include_top=False, input_shape=(32, 32, 3), alpha=0.25)
    backbone.save("net.keras")
    found = json.loads(invoke("sources", "net.keras", "--input-range", "-1..1", "--json").stdout)
    assert found["fine_tune_depth"] == round(0.7 * len(found["blocks"])) > 2


def test_a_source_of_one_s_own_predicts_classes_without_names(tmp_path, digits):
    net = [keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 3), keras.layers.GlobalAveragePooling2D()]
    top = keras.layers.Dense(3, activation="softmax")
    keras.Sequential([keras.Input((32, 32, 3)), *net, top]).save(tmp_path / "net.keras")
    Image.fromarray(digits[0][0]).save(tmp_path / "digit.png")
    found = invoke("predict", "--source", tmp_path / "net.keras", tmp_path / "digit.png", "--top", 3, "--json")
    assert found.exit_code == 0, (found.exception, found.output)
    rows = json.loads(found.stdout)["predictions"][0]["classes"]
    assert {row["name"] for row in rows} == {"class 0", "class 1", "class 2"}
    expected = keras.models.load_model(tmp_path / "net.keras").predict(digits[0][:1], verbose=0)[0]
    for row in rows:
        assert row["probability"] == pytest.approx(float(expected[int(row["name"][-1])]), abs=1e-5)


def test_what_fits_of_a_weights_file_is_shown_before_training(digits_folder, tmp_path, monkeypatch):
    """A file without the last block: refused whole, told in part, by `sources` and by a dry run alike."""
    monkeypatch.chdir(tmp_path)
    backbone = keras.applications.MobileNet(weights=None, include_top=False, input_shape=(64, 64, 3))
    keras.Model(backbone.input, backbone.get_layer("conv_pw_12_relu").output).save_weights("part.weights.h5")
    source = ("keras:mobilenet", "--weights", "part.weights.h5")
    refused = invoke("sources", *source)
    assert "does not fit the network" in str(refused.exception)
    shown = invoke("sources", *source, "--partial")
    assert "parameters (" in shown.stdout and "missing: conv_dw_13" in shown.stdout
    report = json.loads(invoke("sources", *source, "--partial", "--json").stdout)["load_report"]
    assert 0.3 < report["loaded_share"] < 0.9 and report["counts"]["missing"] == 4
    options = ("train", digits_folder, "--source", *source, "--partial", "--image-size", 64, "--dry-run")
    assert json.loads(invoke(*options, "--json").stdout)["load_report"]["counts"] == report["counts"]
    assert "missing: conv_pw_13" in invoke(*options).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.weights.h5"]


# -- with a run that is there --------------------------------------------------------------------------------------


def test_the_run_s_config_repeats_its_plan(trained):
    found = invoke("train", "x", "--config", trained.path / "config.toml", "--print-config")
    assert found.stdout == (trained.path / "config.toml").read_text()
    assert tomllib.loads(found.stdout) == trained.info["plan"]
    changed = invoke("train", "x", "--config", trained.path / "config.toml", "--seed", 9, "--print-config")
    assert tomllib.loads(changed.stdout) == {**trained.info["plan"], "seed": 9}


def test_predict_names_what_is_in_images(trained, digits_folder):
    paths = sorted((digits_folder / "test" / "zero").iterdir())
    found = invoke("predict", trained.path, digits_folder / "test" / "zero", "--top", 2)
    assert found.exit_code == 0
    expected = trained.predict(paths, 2)
    for line, path, best in zip(found.stdout.splitlines(), paths, expected, strict=True):
        assert line == f"{path}\t" + "\t".join(f"{name} {p:.4f}" for name, p in best)
    document = json.loads(invoke("predict", trained.path, paths[0], "--json").stdout)
    assert document["refused"] == []
    ((entry,), name) = document["predictions"], expected[0][0][0]
    assert entry["path"] == str(paths[0]) and [c["name"] for c in entry["classes"]] == [name]


def test_a_refused_image_does_not_lose_the_others(trained, digits_folder, tmp_path):
    good = next((digits_folder / "test" / "zero").iterdir())
    (tmp_path / "bad.png").write_text("text")
    found = invoke("predict", trained.path, tmp_path / "bad.png", good)
    assert found.exit_code == 2
    assert found.stdout.startswith(f"{good}\t") and len(found.stdout.splitlines()) == 1
    assert f"refused {tmp_path / 'bad.png'}: " in found.stderr


def test_predict_by_a_source_names_its_own_classes(tmp_path, digits):
    Image.fromarray(digits[0][0]).save(tmp_path / "digit.png")
    found = json.loads(invoke("predict", "--source", "digits_cnn", tmp_path, "--top", 3, "--json").stdout)
    (entry,) = found["predictions"]
    assert len(entry["classes"]) == 3 and {c["name"] for c in entry["classes"]} <= set("0123456789")


def test_predict_answers_without_tensorflow(trained, digits_folder):
    image = next((digits_folder / "test" / "two").iterdir())
    code = """
import sys
from tfxfer.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"tensorflow", "keras"} & set(sys.modules)
assert not heavy, heavy
"""
    done = python(code, "predict", trained.path, image)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\t")[1].split()[0] == trained.predict([image], 1)[0][0][0]
    done = python(code, "evaluate", trained.path, digits_folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["confusion_matrix"] == trained.metrics["test"]["confusion_matrix"]


def test_evaluate_shows_scores_and_quarantine(trained, digits_folder, tmp_path):
    data = Path(shutil.copytree(digits_folder / "test", tmp_path / "some"))
    (data / "one" / "bad.png").write_text("text")
    found = invoke("evaluate", trained.path, data)
    assert found.exit_code == 0
    accuracy = trained.metrics["test"]["accuracy"]
    assert f"{accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})" in found.stdout
    assert "quarantined one/bad.png: " in found.stderr
    for name in trained.class_names:
        assert name in found.stdout


def test_verify_passes_and_one_flipped_byte_fails_with_the_file_named(run_copy, tfxfer):
    before = sha256_of_folder(run_copy)
    status, out, _ = tfxfer("verify", run_copy, "--json")
    assert status == 0
    answer = json.loads(out)
    certificates = answer["certificates"]
    assert answer["passed"] is True and [c["format"] for c in certificates] == ["saved_model", "onnx"]
    assert all(c["passed"] and c["max_abs_difference"] <= 1e-4 for c in certificates)
    assert sha256_of_folder(run_copy) == before
    for name in ("model.onnx", "saved_model/1/variables/variables.data-00000-of-00001"):
        path = run_copy / "exports" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
        status, out, err = tfxfer("verify", run_copy, "--json")
        assert status == 1 and Path(name).name in err and "Traceback" not in err
        assert json.loads(out)["passed"] is False and Path(name).name in json.loads(out)["problem"]
        path.write_bytes(whole)
    status, out, err = tfxfer("verify", run_copy, "--tolerance", "1e-12", "--json")
    assert status == 1 and "differ" in err
    assert [c["passed"] for c in json.loads(out)["certificates"]].count(False) >= 1
    model = run_copy / "model.keras"
    model.write_bytes(model.read_bytes() + b"0")
    status, _, err = tfxfer("verify", run_copy)
    assert status == 1 and "model.keras is not the model that the run recorded" in err


def test_export_writes_certified_artifacts_elsewhere(run_copy, tmp_path):
    found = invoke("export", run_copy, "--formats", " onnx ", "--out", tmp_path / "again", "--json")
    assert found.exit_code == 0
    (certificate,) = json.loads(found.stdout)
    assert certificate["format"] == "onnx" and certificate["passed"]
    assert (tmp_path / "again" / "model.onnx").is_file()


def test_export_of_one_format_keeps_the_others(run_copy):
    found = invoke("export", run_copy, "--formats", "onnx", "--json")
    assert found.exit_code == 0, found.stderr
    assert [c["format"] for c in json.loads(found.stdout)] == ["onnx", "saved_model"]
    assert (run_copy / "exports/saved_model/1/saved_model.pb").is_file()
    assert invoke("verify", run_copy).exit_code == 0


def test_a_run_without_exports_can_be_exported_later(digits_folder, tmp_path, no_exports):
    out = tmp_path / "run"
    done = invoke("train", digits_folder, "--source", "digits_cnn", "--method", "probe", "--no-baseline", "--out", out)
    assert done.exit_code == 0, done.stderr
    kept = out / "samples.npz"
    assert kept.is_file() and not (out / "exports").exists()
    found = invoke("export", out, "--formats", "onnx", "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)[0]["num_images"] == 64 and not kept.exists()


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt_head(monkeypatch):
    """Training that ends with a model that is wrong on purpose: its logits are turned round."""
    whole = training.run_stages

    def spoil(model, *arguments, **options):
        outcome = whole(model, *arguments, **options)
        layer = model.get_layer("logits")
        layer.set_weights([-value for value in layer.get_weights()])
        return outcome

    monkeypatch.setattr(training, "run_stages", spoil)


@pytest.mark.filterwarnings("ignore::tfxfer.metrics.SplitMismatchWarning")
def test_a_negative_verdict_exits_with_1_and_keeps_the_complete_run(digits_folder, tmp_path, spoilt_head, tfxfer):
    out = tmp_path / "run"
    status, text, err = tfxfer(
        "train", digits_folder, "--source", "digits_cnn", "--recipe", "probe", "--out", out
    )  # fmt: skip
    assert status == 1 and "Traceback" not in err
    run = load_run(out)
    assert run.info["status"] == "complete" and run.info["baseline"]["verdict"] == "negative"
    assert run.info["baseline"]["best"] in ("SVC on pixels", "logistic regression on pixels")
    for word in ("negative: accuracy", run.info["baseline"]["best"]):
        assert word in " ".join(text.replace("│", " ").split())
    assert {path.name for path in out.iterdir()} >= {"run.json", "model.keras", "config.toml", "split.csv", "exports"}
    assert (out / "exports" / "model.onnx").is_file() and (out / "exports" / "certificate.json").is_file()
    # Progress went to stderr, line by line.
    assert "exporting and verifying" in err and "exporting" not in text


def test_no_baseline_says_so(digits_folder, tmp_path, tfxfer, no_exports):
    options = ("--source", "digits_cnn", "--recipe", "probe", "--no-baseline")
    status, text, _ = tfxfer("train", digits_folder, *options, "--out", tmp_path / "run")
    assert status == 0 and "not compared (--no-baseline)" in text
    assert load_run(tmp_path / "run").info["baseline"]["verdict"] == "not asked"
    assert "1 file, listed in run.json" in text
    # The same again from the run's own config.
    status, text, _ = tfxfer(
        "train", digits_folder, "--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again", "--json"
    )  # fmt: skip
    first, again = load_run(tmp_path / "run").info, json.loads(text)
    assert status == 0 and again["plan"] == first["plan"] and again["data"] == first["data"]
    assert again["metrics"]["test"]["confusion_matrix"] == first["metrics"]["test"]["confusion_matrix"]


def test_runs_are_numbered_where_no_folder_is_given(digits_folder, tmp_path, tfxfer, no_exports, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = tmp_path / "split.csv"
    for number in (1, 2):
        options = ("--source", "digits_cnn", "--recipe", "probe", "--no-baseline", "--seed", number)
        reuse = ("--split", split) if number == 2 else ()
        assert tfxfer("train", digits_folder, *options, *reuse)[0] == 0
        shutil.copy(tmp_path / "runs" / f"digits-{number}" / "split.csv", split)
    one, two = (load_run(tmp_path / "runs" / f"digits-{number}").info for number in (1, 2))
    assert one["data"]["fingerprint"] == two["data"]["fingerprint"]  # another seed, the same split


def test_ctrl_c_exits_with_130_and_the_best_model_kept(digits_folder, tmp_path, tfxfer, monkeypatch):
    whole = training.run_stages

    def stop(epoch, logs):
        raise KeyboardInterrupt

    def interrupted(*arguments, **options):
        options["callbacks"] = (keras.callbacks.LambdaCallback(on_epoch_end=stop),)
        return whole(*arguments, **options)

    monkeypatch.setattr(training, "run_stages", interrupted)
    out = tmp_path / "run"
    status, _, err = tfxfer("train", digits_folder, "--source", "digits_cnn", "--epochs", 2, "--lr", 1e-3, "--out", out)
    assert status == 130
    assert err.splitlines()[-1] == (
        f"tfxfer: Interrupted; the best model so far is {out / 'model.keras'}; go on with --resume."
    )
    image = next((digits_folder / "test" / "two").iterdir())
    assert tfxfer("predict", out, image)[0] == 0

    def at_once(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run_stages", at_once)
    status, _, err = tfxfer("train", digits_folder, "--source", "digits_cnn", "--out", tmp_path / "other")
    assert status == 130 and "Traceback" not in err


def test_a_user_s_mistake_in_a_real_process_is_one_sentence_and_status_2(tmp_path):
    """Also what native code would write on stderr stays away."""
    code = "from tfxfer.cli import main; main()"
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    done = python(code, "train", tmp_path / "photos", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stdout == ""
    *progress, last = done.stderr.splitlines()
    assert last.startswith(f"tfxfer: No labelled image found in {tmp_path / 'photos'}")
    assert all(line.startswith("[") for line in progress)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_demo_beats_what_it_must_beat(tmp_path, tfxfer):
    status, text, err = tfxfer("demo", "--out", tmp_path / "run", "--json")
    assert status == 0
    info = json.loads(text)
    assert info["metrics"]["test"]["accuracy"]["value"] > 0.92
    assert info["baseline"]["verdict"] in ("positive", "equivalent", "inconclusive")
    assert sum(info["data"]["counts"]["test"].values()) == 1697
    assert f"tfxfer train {tmp_path / 'run-data'} --source digits_cnn" in " ".join(err.split())


@pytest.mark.slow
def test_photo_features_lose_on_digits_and_the_gate_says_so(tmp_path, tfxfer):
    status, text, _ = tfxfer(
        "demo", "--source", "efficientnet_lite0_imagenet", "--per-class", 20, "--out", tmp_path / "run", "--json"
    )  # fmt: skip
    info = json.loads(text)
    assert info["status"] == "complete"
    assert (status, info["baseline"]["verdict"]) == (1, "negative")
    assert np.isfinite(info["baseline"]["difference"])


@pytest.mark.slow
def test_a_real_ctrl_c_keeps_the_model(digits_folder, tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable, "-c", "from tfxfer.cli import main; main()", "train", digits_folder,
        "--source", "digits_cnn", "--epochs", "500",
        "--out", out,
    ]  # fmt: skip
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "tune, learning rate" in line or "tune, fold" in line:
                time.sleep(3)
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "Interrupted; the best model so far is" in rest and "Traceback" not in rest
    run = load_run(out)
    assert run.info["status"] == "interrupted" and run.model.output_shape[-1] == 10
    found = invoke("export", out, "--formats", "onnx", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)[0]["passed"] is True


def test_a_run_is_continued_by_the_command_line(tfxfer, digits_folder, trained, tmp_path, no_exports):
    """A class is gone and one has come: first what would go on, then the training, then the table."""
    data = Path(shutil.copytree(digits_folder, tmp_path / "data"))
    for part in ("train", "test"):
        (data / part / "nine").rename(data / part / "ten")
        shutil.rmtree(data / part / "zero")
    names = sorted({*trained.class_names} - {"nine", "zero"})
    command = ["train", data, "--source", f"run:{trained.path}", "--drop-class", "nine", "--method", "probe"]
    status, _, told = tfxfer(*command)
    assert status == 2 and "knows 'zero', of which data has no image" in told
    command += ["--drop-class", "zero", "--no-baseline", "--out", tmp_path / "run"]
    status, shown, _ = tfxfer(*command, "--dry-run", "--json")
    found = json.loads(shown)["continued"]
    assert status == 0 and not (tmp_path / "run").exists()
    assert found["classes"] == {"kept": names, "new": ["ten"], "dropped": ["nine", "zero"]}
    old = {row["sha256"] for row in csv.DictReader((trained.path / "split.csv").open(newline=""))}
    digests = [sha256_of_file(path) for path in data.rglob("*.png") if path.name != "broken.png"]
    assert found["images"]["old"] == sum(digest in old for digest in digests)
    assert found["images"]["new"] - 1 == sum(digest not in old for digest in digests) == 0  # broken.png, not yet opened
    shown = tfxfer(*command, "--dry-run")[1]
    assert "8 classes kept, new ten, dropped nine, zero; 180 images of it, 1 new" in " ".join(shown.split())
    status, shown, _ = tfxfer(*command)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status == 0 and info["data"]["classes"] == [*names, "ten"]
    assert info["plan"]["drop_class"] == ["nine", "zero"]
    flat = " ".join(shown.replace("│", " ").split())
    assert f"{info['continued']['verdict']}: {info['continued']['reason']}" in flat and "classes both know" in flat
    for row in info["continued"]["losses"]:
        assert f"{row['name']} {row['old']:.2f} to {row['new']:.2f}" in flat
