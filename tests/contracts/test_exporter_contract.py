"""Every export format computes in its own runtime what the model computes, carries its facts, and shows damage."""

from pathlib import Path

import numpy as np
import pytest

import tfxfer
from tfxfer import exporters
from tfxfer.exporters import EXPORTERS
from tfxfer.exporters.layout import OWN_NAMES
from tfxfer.runtime.files import sha256_of_file, sha256_of_folder

NAMES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def exported(digit_arrays, tmp_path_factory):
    """A model of the digits, exported in every format at once, and its certificates by format."""
    images, _ = digit_arrays
    samples = np.repeat(np.repeat(images, 4, axis=1), 4, axis=2)  # 32 px, the network's size
    model = tfxfer.build_model("digits_cnn", NAMES)
    folder = tmp_path_factory.mktemp("contract") / "exports"
    found = tfxfer.export(
        model, folder, formats=list(EXPORTERS), samples=samples, class_names=NAMES, metadata={"licence": "Apache-2.0"}
    )
    return folder, {certificate.format: certificate for certificate in found}


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_format_has_a_program_that_reopens_it(name):
    program = Path(exporters.__file__).with_name(f"reopen_{name}.py")
    text = program.read_text(encoding="utf-8")
    assert "tfxfer" in text.split("ABSENT = ")[1].splitlines()[0], "it must run where tfxfer is not installed"
    assert "def import_runtime(" in text and "def open_artifact(" in text


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_format_is_certified_in_its_runtime(name, exported):
    folder, certificates = exported
    certificate = certificates[name]
    assert certificate.passed and certificate.problems == ()
    assert certificate.max_abs_difference <= certificate.tolerance <= 1e-4
    assert certificate.top1_agreement == 1.0 and certificate.num_images == 36
    assert 1 in certificate.batch_sizes and 36 in certificate.batch_sizes
    artifact = folder / certificate.path
    assert certificate.path.split("/")[0] in OWN_NAMES
    digest = sha256_of_folder(artifact) if artifact.is_dir() else sha256_of_file(artifact)
    assert digest == certificate.sha256


def test_verify_repeats_the_proof_of_every_format(exported):
    assert {certificate.format for certificate in tfxfer.verify(exported[0])} == set(EXPORTERS)


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_flipped_byte_in_any_format_fails(name, exported):
    folder, certificates = exported
    artifact = folder / certificates[name].path
    files = [file for file in artifact.rglob("*") if file.is_file()] if artifact.is_dir() else [artifact]
    file = max(files, key=lambda file: file.stat().st_size)
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    try:
        with pytest.raises(tfxfer.CheckError, match=file.name):
            tfxfer.verify(folder)
    finally:
        file.write_bytes(content)
