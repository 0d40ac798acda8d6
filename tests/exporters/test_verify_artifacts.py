"""verify: what passes, and every way in which it must not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_network import FAULTS

import tfxfer.exporters
from tfxfer.errors import CheckError, InputError
from tfxfer.exporters import EXPORTERS
from tfxfer.exporters.layout import Artifact, describe_artifact
from tfxfer.exporters.runtimes import Outcome
from tfxfer.exporters.samples import Expected, Task
from tfxfer.exporters.verify import CertificateError, compare, same_first_class, verify
from tfxfer.runtime.files import sha256_of_file, sha256_of_folder


def keep_only_onnx(exports: Path) -> None:
    """Without the SavedModel a test need not import TensorFlow in another process."""
    shutil.rmtree(exports / "saved_model")
    record = json.loads((exports / "certificate.json").read_text())
    record["certificates"] = [entry for entry in record["certificates"] if entry["format"] == "onnx"]
    (exports / "certificate.json").write_text(json.dumps(record))
    make_digests_right(exports)


def make_digests_right(exports: Path) -> None:
    """As a forger would, so that only the comparison of numbers can tell."""
    record = json.loads((exports / "certificate.json").read_text())
    artifacts = [describe_artifact(entry["format"], exports, Path(entry["path"])) for entry in record["certificates"]]
    record["files"] = {name: digest for artifact in artifacts for name, digest in artifact.files.items()}
    record["samples_sha256"] = sha256_of_file(exports / "samples.npz")
    (exports / "certificate.json").write_text(json.dumps(record))


def replace_artifacts(exports: Path, model) -> None:
    record = json.loads((exports / "certificate.json").read_text())
    shutil.rmtree(exports / "saved_model", ignore_errors=True)
    for entry in record["certificates"]:
        EXPORTERS[entry["format"]](model, exports, class_names=record["class_names"], metadata=record["metadata"])
    make_digests_right(exports)


def flip_a_byte(path: Path, share: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 1
    path.write_bytes(content)


def test_a_moved_run_passes_and_is_not_changed(run, certified):
    assert str(certified[0]) not in (run / "exports/certificate.json").read_text()
    before = sha256_of_folder(run)
    certificates = verify(run)
    assert [entry.format for entry in certificates] == ["saved_model", "onnx"]
    for fresh, first in zip(certificates, certified[1], strict=True):
        assert fresh.passed
        assert fresh.sha256 == first.sha256
        assert (fresh.num_images, fresh.batch_sizes) == (64, (1, 3, 64))
        assert fresh.max_abs_difference < 2e-5
    assert sha256_of_folder(run) == before


@pytest.mark.parametrize("fault", FAULTS)
def test_artifacts_that_compute_something_else_fail(run, model, wrong_exporters, fault):
    wrong_exporters(fault)
    replace_artifacts(run / "exports", model)
    with pytest.raises(CertificateError, match="does not compute what the model computes") as caught:
        verify(run)
    assert [(entry.format, entry.passed) for entry in caught.value.certificates] == [
        ("saved_model", False),
        ("onnx", False),
    ]
    for entry in caught.value.certificates:
        assert entry.max_abs_difference > 1e-3
        assert any("at batch 64: probabilities differ by" in problem for problem in entry.problems)


@pytest.mark.parametrize(
    "name",
    [
        "saved_model/1/variables/variables.data-00000-of-00001",
        "saved_model/1/saved_model.pb",
        "saved_model/1/assets.extra/metadata.json",
        "model.onnx",
        "samples.npz",
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.31, 0.999])
def test_one_flipped_byte_is_found_and_its_file_named(run, name, share):
    flip_a_byte(run / "exports" / name, share)
    with pytest.raises(CheckError, match=f"not what was certified: {name} was changed"):
        verify(run / "exports")


def test_missing_and_added_files_are_named(run):
    (run / "exports/saved_model/1/variables/variables.index").unlink()
    (run / "exports/saved_model/1/assets/extra.txt").write_text("x")
    with pytest.raises(CheckError, match=r"assets/extra.txt was added; .*variables.index is missing"):
        verify(run)


def test_a_flipped_weight_in_the_artifact_is_found_by_its_numbers_too(run):
    exports = run / "exports"
    keep_only_onnx(exports)
    content = (exports / "model.onnx").read_bytes()
    import onnx

    proto = onnx.load(exports / "model.onnx")
    kernel = max((item for item in proto.graph.initializer if item.data_type == 1), key=lambda item: len(item.raw_data))
    values = np.frombuffer(kernel.raw_data, np.float32).copy()
    values[len(values) // 2] += 0.5
    kernel.raw_data = values.tobytes()
    onnx.save(proto, exports / "model.onnx")
    assert (exports / "model.onnx").read_bytes() != content
    make_digests_right(exports)
    with pytest.raises(CheckError, match=r"onnx \(model.onnx\): on the samples at batch 1: probabilities differ by"):
        verify(run)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["bee", "ångström", "c/d", "d"], "it names class 0 'ångström', not 'bee'"),
        (["ångström", "bee", "c/d"], "it has 4 class names, not 3"),
    ],
)
def test_other_class_names_fail(run, names, sentence):
    keep_only_onnx(run / "exports")
    record = json.loads((run / "exports/certificate.json").read_text())
    record["class_names"] = names
    (run / "exports/certificate.json").write_text(json.dumps(record))
    with pytest.raises(CheckError, match=sentence):
        verify(run)


def test_not_a_number_fails(run):
    exports = run / "exports"
    keep_only_onnx(exports)
    with np.load(exports / "samples.npz") as stored:
        arrays = dict(stored)
    arrays["probabilities"][7] = np.nan
    np.savez(exports / "samples.npz", **arrays)
    make_digests_right(exports)
    with pytest.raises(CheckError, match="probabilities differ by nan"):
        verify(run)


def test_the_tolerance_is_the_one_asked_for(run):
    keep_only_onnx(run / "exports")
    with pytest.raises(CertificateError, match="allowed 1e-12"):
        verify(run, tolerance=1e-12)


@pytest.mark.parametrize("content", ["", "[]", '{"certificates": []}', "not json"])
def test_a_damaged_certificate_is_a_failed_check(run, content):
    (run / "exports/certificate.json").write_text(content)
    with pytest.raises(CheckError, match=r"certificate\.json is damaged"):
        verify(run)


def test_damaged_samples_are_a_failed_check(run):
    (run / "exports/samples.npz").write_bytes(b"PK")
    make_digests_right(run / "exports")
    with pytest.raises(CheckError, match="Cannot read the kept samples"):
        verify(run)


def test_nothing_to_verify(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        verify(tmp_path / "missing")
    with pytest.raises(InputError, match="export the model first"):
        verify(tmp_path)
    (tmp_path / "exports.failed").mkdir()
    (tmp_path / "exports.failed/certificate.json").write_text("{}")
    with pytest.raises(InputError, match=r"export of .* failed"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("got", "classes", "sentence"),
    [
        ([[0.50008, 0.49992]], ["a"], None),
        ([[0.50002, 0.49998]], ["a"], None),
        ([[0.499995, 0.500005]], ["b"], "the first class differs for 1 of 1 images"),
        ([[0.50008, 0.49992]], ["b"], "`classes` does not name the largest"),
        ([[0.50025, 0.49975]], ["a"], "probabilities differ by 0.00017"),
        ([[0.5, 0.3, 0.2]], ["a"], "it gives shape (1, 3), not (1, 2)"),
        (None, None, "it computed nothing"),
    ],
)
def test_the_judge(got, classes, sentence):
    task = Task("batch_1", "images", ("images.npy",), 1, 1)
    want = np.array([[0.50008, 0.49992]])
    outcome = Outcome("by hand", ("a", "b"))
    if got is not None:
        outcome.probabilities["batch_1"], outcome.classes["batch_1"] = np.array(got), np.array(classes)
    certificate = compare(
        Artifact("onnx", "model.onnx", "0", {}),
        outcome,
        [task],
        Expected(want, want[:0], want[:0]),
        class_names=("a", "b"),
        tolerance=1e-4,
    )
    assert certificate.passed == (sentence is None)
    assert [sentence in problem for problem in certificate.problems] == ([] if sentence is None else [True])


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [(8e-4, None), (1.2e-3, "image other_1 of another size: probabilities differ by 0.0012")],
)
def test_a_made_up_image_may_differ_ten_times_as_much_and_does_not_count(difference, sentence):
    tasks = [Task("batch_1", "images", (), 1, 1), Task("other_1", "images", (), 1, 1, made_up=(0,))]
    want = np.array([[0.7, 0.3]])
    outcome = Outcome("by hand", ("a", "b"))
    outcome.probabilities.update(batch_1=want + 5e-5, other_1=want + difference)
    outcome.classes.update(batch_1=np.array(["a"]), other_1=np.array(["a"]))
    certificate = compare(
        Artifact("onnx", "model.onnx", "0", {}),
        outcome,
        tasks,
        Expected(want, np.concatenate([want, want]), want[:0]),
        class_names=("a", "b"),
        tolerance=1e-4,
    )
    assert certificate.max_abs_difference == pytest.approx(5e-5)
    assert [sentence in problem for problem in certificate.problems] == ([] if sentence is None else [True])


def test_ties_may_fall_either_way():
    want = np.array([[0.4, 0.4, 0.2], [0.40004, 0.39996, 0.2], [0.4002, 0.3998, 0.2]])
    got = want[:, [1, 0, 2]]
    assert same_first_class(got, want, 1e-4).tolist() == [True, True, False]
    assert same_first_class(want, want, 1e-4).all()


@pytest.mark.parametrize(
    ("format_name", "absent"), [("onnx", {"tfxfer", "tensorflow", "keras"}), ("saved_model", {"tfxfer", "keras"})]
)
def test_the_process_that_reopens_cannot_import_what_a_server_lacks(tmp_path, format_name, absent):
    """The real program, asked to import all that once its runtime is there."""
    folder = Path(tfxfer.exporters.__file__).parent
    curious = tmp_path / "curious.py"
    curious.write_text(
        f"""
import importlib, runpy
real = runpy.run_path({str(folder / f"reopen_{format_name}.py")!r})
ABSENT = real["ABSENT"]
assert set(ABSENT) >= {absent!r}

def import_runtime():
    print(real["import_runtime"]().__name__)
    for name in ABSENT:
        try:
            importlib.import_module(name)
            print(name)
        except ImportError:
            pass
    raise SystemExit
"""
    )
    command = [sys.executable, "-P", str(folder / "reopen.py"), str(curious)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [{"onnx": "onnxruntime", "saved_model": "tensorflow"}[format_name]]
