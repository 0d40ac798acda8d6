"""Going on with a finished run: classes, images, the head, the comparison, and what is refused."""

import csv
import json
import shutil

import keras
import numpy as np
import pytest
from test_resume import Fail

from tfxfer import Recipe, Stage, fit, load_data, load_run
from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_file, sha256_of_folder
from tfxfer.select.promotion import in_classes
from tfxfer.workflow.digits import NAMES

QUICK = {"baseline": "none", "formats": ()}
TUNED = {"epochs": 6, "learning_rate": 1e-3, "freeze_depth": "conv1"}
MOVED = Recipe("moved", (Stage("all of it", freeze_depth="conv1", epochs=15, learning_rates=(1e-3,), min_steps=False),))
FIRST = ("eight", "five", "four", "nine", "one", "seven")
FRESH = ("three", "two")


def put(folder, digits, names, rows):
    """Digits of some classes as PNG files, for each class those of its images with numbers in `rows`."""
    from PIL import Image

    for name in names:
        images = digits[0][digits[1] == NAMES.index(name)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for row in rows:
            Image.fromarray(images[row]).save(folder / name / f"{row:03d}.png")
    return folder


def parts_of(run):
    with (run.path / "split.csv").open(newline="") as file:
        return {row["sha256"]: row["part"] for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def old(digits, tmp_path_factory):
    """Six digits, 24 images each."""
    folder = tmp_path_factory.mktemp("old")
    data = put(folder / "data", digits, FIRST, range(24))
    return fit("digits_cnn", data, "probe", out=folder / "run", seed=1, **QUICK)


@pytest.fixture(scope="module")
def moved(old, tmp_path_factory):
    """The same digits, with a backbone that was fine-tuned on them."""
    data = old.path.parent / "data"
    return fit("digits_cnn", data, MOVED, out=tmp_path_factory.mktemp("moved") / "run", seed=1, **QUICK)


@pytest.fixture(scope="module")
def grown(digits, tmp_path_factory):
    """More images of five of them, two new classes; elsewhere on disk."""
    folder = tmp_path_factory.mktemp("grown") / "data"
    put(folder, digits, FIRST[1:], range(40))
    return put(folder, digits, FRESH, range(30))


@pytest.fixture(scope="module")
def continued(old, grown, tmp_path_factory):
    before = sha256_of_folder(old.path)
    out = tmp_path_factory.mktemp("new") / "run"
    run = fit(f"run:{old.path}", grown, out=out, recipe="probe", drop_class=["eight"], **QUICK)
    assert sha256_of_folder(old.path) == before  # it is only read
    return run


def test_old_classes_keep_their_numbers_and_old_images_their_parts(old, continued):
    assert continued.class_names == (*FIRST[1:], *FRESH)
    assert continued.model.output_shape == (None, 7)
    told = continued.info["continued"]
    assert told["classes"] == {"kept": list(FIRST[1:]), "new": list(FRESH), "dropped": ["eight"]}
    before, now = parts_of(old), parts_of(continued)
    assert (
        sum(digest in before for digest in now) == 5 * 24 == sum(n["old"] for n in told["images"].values() if n != 24)
    )
    assert all(now[digest] == part for digest, part in before.items() if digest in now)
    assert {"train", "val", "test"} == {part for digest, part in now.items() if digest not in before}
    assert told["images"]["no_longer_in_the_data"] == 24
    held = continued.metrics["validation"]
    # Choices are made on what is new to the old run alone, since every class has enough of that.
    assert held["num_images_seen_before"] == 0
    assert held["num_images"] == sum(part != "test" for digest, part in now.items() if digest not in before)
    with (continued.path / "earlier.csv").open(newline="") as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"eight"}


def test_both_models_are_scored_on_the_same_test_part(old, grown, continued):
    told = continued.info["continued"]
    data = load_data(grown, split=continued.path / "split.csv", image_size=32).with_classes(continued.class_names)
    test, pixels = data.part("test"), data.pixels("test", 32)
    new, theirs = (run.model.predict(pixels, verbose=0) for run in (continued, old))
    masked = theirs[:, 1:].argmax(1)  # "eight" is gone; the others have kept their order
    right = {"new": new.argmax(1) == test.labels, "old": masked == test.labels}
    known = test.labels < 5
    assert not right["old"][~known].any()
    for name, rows in (("all", np.ones(len(known), bool)), ("known", known)):
        assert told[name]["num_images"] == rows.sum()
        for side in ("new", "old"):
            assert told[name][side] == pytest.approx(right[side][rows].mean())
        assert told[name]["difference"] == pytest.approx(told[name]["new"] - told[name]["old"])
        assert told[name]["low"] <= told[name]["difference"] <= told[name]["high"]
    for k, row in enumerate(told["per_class"]):
        rows = test.labels == k
        assert (row["name"], row["images"]) == (FIRST[1:][k], rows.sum())
        assert row["old"] == pytest.approx(right["old"][rows].mean())
        assert row["new"] == pytest.approx(right["new"][rows].mean())
    assert [row["name"] for row in told["losses"]] == [
        row["name"] for row in sorted(told["per_class"], key=lambda row: row["difference"]) if row["difference"] < 0
    ]
    assert told["verdict"] == "promote" and told["all"]["difference"] > 0.2
    assert continued.metrics["test"]["accuracy"]["value"] == pytest.approx(told["all"]["new"])
    np.testing.assert_allclose(in_classes(theirs, old.class_names, FIRST)[:, 0], theirs[:, 0], atol=1e-6)


@pytest.mark.slow
def test_the_backbone_is_the_tuned_one_and_the_head_begins_with_the_old_rows(moved, grown, tmp_path):
    """With the head of known classes held for good, their rows are the old run's to the bit."""
    run = fit(f"run:{moved.path}", grown, "probe", out=tmp_path / "run", drop_class=["eight"], **QUICK)
    assert moved.info["chosen"] == "fine_tune"
    inner = [model.get_layer("digits_cnn").get_layer("conv2").get_weights() for model in (moved.model, run.model)]
    assert all(np.array_equal(a, b) for a, b in zip(*inner, strict=True))
    kernels = [model.get_layer("logits").get_weights()[0] for model in (moved.model, run.model)]
    chosen = run.info["selection"]["probe"]["stiffness"]
    assert chosen in ("inf", "30.0", "1.0", "0.0")
    assert np.array_equal(kernels[0][:, 1:], kernels[1][:, :5]) == (chosen == "inf")


@pytest.mark.slow
def test_more_epochs_on_the_same_images_never_test_on_what_was_trained_on(old, moved, tmp_path):
    old, data = moved, old.path.parent / "data"
    run = fit(f"run:{old.path}", data, out=tmp_path / "run", **TUNED, **QUICK)
    told = run.info["continued"]
    assert parts_of(run) == parts_of(old) and run.class_names == old.class_names
    assert all(told["images"][part]["new"] == 0 for part in ("train", "val", "test"))
    assert told["all"] == told["known"] and told["verdict"] in ("promote", "keep", "unclear")
    assert told["all"]["old"] == pytest.approx(old.metrics["test"]["accuracy"]["value"])
    assert not (run.path / "earlier.csv").exists()
    held = run.metrics["validation"]
    assert held["num_images_seen_before"] == held["num_images"] and "The run before was trained on" in held["note"]


@pytest.mark.slow
def test_a_chain_of_runs_remembers_what_the_first_one_saw(continued, digits, tmp_path):
    """Eights were dropped by the second run; the third one has them again, and those that were trained on stay so."""
    data = put(tmp_path / "data", digits, FIRST[:5] + FIRST[5:] + FRESH, range(24))
    run = fit(f"run:{continued.path}", data, "probe", out=tmp_path / "run", **QUICK)
    first = {row["sha256"]: row["part"] for row in csv.DictReader((continued.path / "earlier.csv").open(newline=""))}
    now = parts_of(run)
    assert len(first) == 24 and {digest: now[digest] for digest in first} == first
    assert run.class_names == (*FIRST[1:], *FRESH, "eight")


@pytest.mark.slow
def test_a_continued_run_that_broke_goes_on_to_the_same_weights(moved, grown, tmp_path):
    out, options = tmp_path / "run", {"drop_class": ["eight"], "checkpoint_seconds": 0.0, **TUNED, **QUICK}
    before = shutil.copytree(moved.path, tmp_path / "before")
    whole = fit(f"run:{before}", grown, out=tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="the power failed"):
        fit(f"run:{before}", grown, out=out, callbacks=[Fail(7)], **options)
    # Another model in the place of the one that was begun with is refused.
    info, model = json.loads((before / "run.json").read_text()), (before / "model.keras").read_bytes()
    load_run(whole.path).model.save(before / "model.keras")
    other = {**info, "model": {**info["model"], "sha256": sha256_of_file(before / "model.keras")}}
    (before / "run.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"is no longer what .* was begun with"):
        fit(f"run:{before}", grown, out=out, resume=True, **options)
    (before / "run.json").write_text(json.dumps(info))
    (before / "model.keras").write_bytes(model)
    run = fit(f"run:{before}", grown, out=out, resume=True, **options)
    assert run.info["resumed"] and run.info["status"] == "complete"
    assert all(np.array_equal(a, b) for a, b in zip(run.model.get_weights(), whole.model.get_weights(), strict=True))
    assert run.info["continued"] == whole.info["continued"]


def test_what_does_not_go_on_is_refused_in_one_sentence(old, grown, digits, tmp_path):
    source = f"run:{old.path}"

    def refused(message, data=grown, source=source, **options):
        with pytest.raises(InputError, match=message):
            fit(source, data, "probe", out=tmp_path / "run", **QUICK, **options)
        assert not (tmp_path / "run").exists()

    refused(r"knows 'eight', of which data has no image; add images, or let the class go: --drop-class eight")
    refused(r"'height' is no class of .*\. Did you mean 'eight'", drop_class=["height"])
    refused(r"'one' is to go, but data has images of it", drop_class=["eight", "one"])
    refused(r"--drop-class is for a run that is continued", source="digits_cnn", drop_class=["eight"])
    refused(r"goes on with its own split, so --split would do nothing", split=old.path / "split.csv")
    loaded = load_data(old.path.parent / "data", seed=5)
    refused(r"was tested on \d+ images that data now trains on, such as \w+/\d+\.png", data=loaded)
    without = shutil.copytree(old.path, tmp_path / "without")
    (without / "split.csv").unlink()
    refused(r"has no split.csv, so which images it was trained on is not known", source=f"run:{without}")


def test_without_a_common_class_the_backbone_alone_goes_on(old, digits, tmp_path):
    data = put(tmp_path / "data", digits, FRESH, range(20))
    run = fit(f"run:{old.path}", data, "probe", out=tmp_path / "run", **QUICK)
    told = run.info["continued"]
    assert told["what"] == "backbone only" and told["verdict"] == "not compared"
    assert told["classes"] == {"kept": [], "new": list(FRESH), "dropped": []}
    assert "stiffness" not in run.info["selection"]["probe"]
    with pytest.raises(InputError, match=r"No class of data is one of .*, so only its backbone goes on"):
        fit(f"run:{old.path}", data, out=tmp_path / "other", drop_class=["one"], **QUICK)


def test_grouping_and_metric_go_on_unless_they_are_given(old, grown, tmp_path):
    from tfxfer.workflow.planning import make_plan

    before = shutil.copytree(old.path, tmp_path / "before")
    info = json.loads((before / "run.json").read_text())
    info["plan"] |= {"metric": "macro_f1", "near_duplicates": "off"}
    (before / "run.json").write_text(json.dumps(info))
    plan = make_plan(source=f"run:{before}", near_duplicates="on")
    assert (plan.metric, plan.near_duplicates, plan.image_size) == ("macro_f1", "on", 32)


def test_a_model_of_the_user_s_own_keeps_its_order_of_classes(old, grown, tmp_path):
    from tfxfer import build_model

    model = build_model(f"run:{old.path}", list(load_data(grown).class_names))
    run = fit(model, grown, "probe", out=tmp_path / "run", **QUICK)
    assert run.class_names == tuple(sorted((*FIRST[1:], *FRESH)))
    assert run.info["continued"]["what"] == "backbone only"
    before, now = parts_of(old), parts_of(run)
    assert all(now[digest] == part for digest, part in before.items() if digest in now)
    assert isinstance(run.model, keras.Model)
