"""certify: what it proves, and what is left after a failure."""

import json

import numpy as np
import pytest
from tiny_network import FAULTS, METADATA, NAMES, SIZE_PX, assemble

from tfxfer.errors import CheckError, InputError
from tfxfer.exporters import EXPORTERS
from tfxfer.exporters.certify import certify
from tfxfer.exporters.verify import CertificateError
from tfxfer.runtime.files import sha256_of_file, sha256_of_folder


def certify_onnx(model, folder, images, **changes):
    arguments = {
        "formats": ("onnx",),
        "class_names": NAMES,
        "metadata": METADATA,
        "samples": images,
        "labels": np.zeros(len(images), int),
    }
    return certify(model, folder, **(arguments | changes))


def test_certificates_of_a_good_export(certified):
    run, certificates = certified
    assert [(entry.format, entry.path) for entry in certificates] == [
        ("saved_model", "saved_model/1"),
        ("onnx", "model.onnx"),
    ]
    for entry in certificates:
        assert entry.passed
        assert entry.problems == ()
        assert entry.num_images == 64
        assert entry.batch_sizes == (1, 3, 64)
        assert entry.top1_agreement == 1.0
        assert 0 <= entry.mean_abs_difference <= entry.max_abs_difference < 2e-5
    assert certificates[0].sha256 == sha256_of_folder(run / "exports/saved_model/1")
    assert certificates[1].sha256 == sha256_of_file(run / "exports/model.onnx")
    assert certificates[0].runtime.startswith("tensorflow ")
    assert certificates[1].runtime.startswith("onnxruntime ")
    assert sorted(path.name for path in run.iterdir()) == ["exports"]
    assert sorted(path.name for path in (run / "exports").iterdir()) == [
        "certificate.json",
        "model.onnx",
        "samples.npz",
        "saved_model",
    ]


def test_the_samples_hold_what_predict_gives(certified, model, images):
    run, _ = certified
    with np.load(run / "exports/samples.npz") as stored:
        np.testing.assert_array_equal(stored["images"], images)
        np.testing.assert_array_equal(stored["labels"], np.arange(64) % 4)
        want = model.predict(images.astype("float32"), verbose=0)
        np.testing.assert_allclose(stored["probabilities"], want, atol=1e-6)
        other = model.predict(stored["other_0"][None].astype("float32"), verbose=0)
        np.testing.assert_allclose(stored["other_probabilities"][:1], other, atol=1e-6)


def test_accuracy_on_the_test_part(certified, model, images):
    run, _ = certified
    part = json.loads((run / "exports/certificate.json").read_text())["test_part"]
    right = model.predict(images[::-1].astype("float32"), verbose=0).argmax(axis=1) == np.arange(64) % 4
    assert part == {
        "num_images": 64,
        "accuracy": {"predict": right.mean(), "saved_model": right.mean(), "onnx": right.mean()},
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_exporter_is_caught_and_nothing_looks_finished(model, images, tmp_path, wrong_exporters, fault):
    wrong_exporters(fault)
    with pytest.raises(CertificateError, match="probabilities differ by") as caught:
        certify_onnx(model, tmp_path / "exports", images)
    assert isinstance(caught.value, CheckError)
    (certificate,) = caught.value.certificates
    assert not certificate.passed
    assert certificate.max_abs_difference > 1e-3
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        "exports.failed/certificate.json"
    ]
    assert json.loads((tmp_path / "exports.failed/certificate.json").read_text())["certificates"][0]["passed"] is False


def test_an_earlier_export_survives_a_failure_and_gives_way_to_a_success(model, images, run):
    folder = run / "exports"
    before = sha256_of_folder(folder)
    with pytest.raises(CertificateError):
        certify_onnx(model, folder, images, tolerance=1e-12)
    assert sha256_of_folder(folder) == before
    certify_onnx(model, folder, images[:5])
    assert sorted(path.name for path in folder.iterdir()) == ["certificate.json", "model.onnx", "samples.npz"]
    assert sorted(path.name for path in run.iterdir()) == ["exports"]


def test_wrong_probabilities_of_the_test_part_fail(model, images, tmp_path):
    wrong = np.full((64, 4), 0.25, np.float32)
    with pytest.raises(CheckError, match="on the test part: probabilities differ"):
        certify_onnx(
            model,
            tmp_path / "exports",
            images[:3],
            test_images=images,
            test_labels=np.zeros(64, int),
            test_probabilities=wrong,
        )


def test_an_artifact_that_does_not_run_fails(model, images, tmp_path, monkeypatch):
    def broken(_, folder, **about):
        path = EXPORTERS["saved_model"](model, folder, **about)
        return path / "saved_model.pb"  # a file, but no ONNX

    monkeypatch.setitem(EXPORTERS, "onnx", broken)
    with pytest.raises(CheckError, match="does not run in a fresh process"):
        certify_onnx(model, tmp_path / "exports", images[:3])
    assert not (tmp_path / "exports").exists()


def test_an_exporter_that_raises_is_named_and_leaves_nothing(model, images, tmp_path, monkeypatch):
    def raises(*_, **__):
        raise RuntimeError("no such operator: Frobnicate\nmore")

    monkeypatch.setitem(EXPORTERS, "onnx", raises)
    with pytest.raises(CheckError, match=r"does not convert to onnx: RuntimeError: no such operator: Frobnicate$"):
        certify_onnx(model, tmp_path / "exports", images[:3])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"formats": ("onxx",)}, "Unknown export format 'onxx'. Did you mean 'onnx'"),
        ({"formats": ()}, "at least one"),
        ({"formats": ("onnx", "onnx")}, "once"),
        ({"class_names": NAMES[:3]}, "3 class names were given for the 4 outputs"),
        ({"samples": np.zeros((2, SIZE_PX, SIZE_PX, 3), np.float32)}, "must be uint8 images"),
        ({"samples": np.zeros((64, 8, 8, 3), np.uint8)}, "8 x 8 pixels, and the model resizes to 24"),
        ({"labels": [0]}, "1 labels"),
        ({"test_images": np.zeros((2, SIZE_PX, SIZE_PX, 3), np.uint8)}, "test_labels"),
    ],
)
def test_bad_arguments_get_one_sentence(model, images, tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        certify_onnx(model, tmp_path / "exports", images, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_content_is_not_touched(model, images, tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match=r"other content \(thesis.tex\)"):
        certify_onnx(model, tmp_path, images)
    assert (tmp_path / "thesis.tex").read_text() == "dear"


def test_logits_are_no_probabilities(parts, images, tmp_path):
    with pytest.raises(InputError, match=r"not probabilities.*logits=True"):
        certify_onnx(assemble(*parts, softmax=False), tmp_path / "exports", images[:3])
    assert list(tmp_path.iterdir()) == []
