import shutil

import numpy as np
import pytest
from PIL import Image

from tfxfer.errors import InputError
from tfxfer.workflow.scoring import evaluate, predict, predict_files, predict_with_source


def test_the_test_part_is_scored_as_it_was_while_training(trained, digits_folder):
    found = evaluate(trained, digits_folder)
    told = trained.metrics["test"]
    assert found["num_images"] == 100 and found["quarantined"] == []
    assert found["confusion_matrix"] == told["confusion_matrix"]
    for name in ("accuracy", "macro_f1", "balanced_accuracy"):
        assert found[name] == pytest.approx(told[name], abs=1e-9)
    assert found["log_loss"]["value"] == pytest.approx(told["log_loss"]["value"], abs=1e-4)


def test_a_folder_without_parts_is_scored_whole_and_may_lack_classes(trained, digits_folder, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(digits_folder / "test" / name, tmp_path / "some" / name)
    (tmp_path / "some" / "two" / "broken.png").write_bytes(b"no image")
    found = evaluate(trained.path, tmp_path / "some")
    assert found["num_images"] == 20
    assert [entry["path"] for entry in found["quarantined"]] == ["two/broken.png"]
    matrix = np.array(found["confusion_matrix"])
    assert matrix.shape == (10, 10) and matrix.sum(1).tolist() == [0, 0, 0, 0, 10, 0, 0, 0, 10, 0]
    np.testing.assert_array_equal(matrix[[4, 8]], np.array(trained.metrics["test"]["confusion_matrix"])[[4, 8]])


def test_groups_widen_the_interval(trained, digits_folder):
    alone = evaluate(trained, digits_folder)
    grouped = evaluate(trained, digits_folder, group_by=r"test/\w+/digit_(\d\d)")
    assert grouped["num_groups"] < alone["num_groups"] == 100
    assert grouped["accuracy"]["value"] == alone["accuracy"]["value"]
    assert grouped["accuracy"] != alone["accuracy"]


def test_a_class_the_run_does_not_know_is_refused(trained, digits_folder, tmp_path):
    shutil.copytree(digits_folder / "test" / "one", tmp_path / "some" / "eleven")
    with pytest.raises(InputError, match=r"eleven"):
        evaluate(trained, tmp_path / "some")


def test_predict_takes_a_run_or_its_folder(trained, digits_folder):
    paths = sorted((digits_folder / "test").rglob("*.png"))[::25]
    np.testing.assert_array_equal(predict(trained.path, paths), trained.predict(paths))
    assert predict(trained, paths, top_k=2) == trained.predict(paths, 2)


def test_a_source_answers_with_its_own_classes(digits):
    images, labels = digits
    found = predict_with_source("digits_cnn", list(images[:60]), top_k=2)
    names = [best[0][0] for best in found]
    assert np.mean([name == str(label) for name, label in zip(names, labels[:60], strict=True)]) > 0.6
    for best in found:
        assert len(best) == 2 and best[0][1] >= best[1][1] > 0


def test_files_and_folders_are_predicted_and_what_is_no_image_is_refused(trained, digits_folder, tmp_path):
    one = sorted((digits_folder / "test" / "one").iterdir())
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    Image.new("RGB", (40, 30)).save(tmp_path / "black.webp")
    found = predict_files([trained.path, digits_folder / "test" / "one", tmp_path], top_k=3)
    kept = [*map(str, one), str(tmp_path / "black.webp")]
    assert [entry["path"] for entry in found["predictions"]] == kept
    assert {entry["path"] for entry in found["refused"]} == {str(tmp_path / "empty.jpg"), str(tmp_path / "text.png")}
    assert all(entry["reason"] for entry in found["refused"])
    expected = trained.predict(kept, 3)
    for entry, best in zip(found["predictions"], expected, strict=True):
        assert [(c["name"], pytest.approx(c["probability"], abs=1e-6)) for c in entry["classes"]] == best


def test_nothing_but_refused_files_gives_no_predictions(trained, tmp_path):
    (tmp_path / "empty.jpg").touch()
    found = predict_files([trained.path, tmp_path / "empty.jpg"])
    assert found["predictions"] == [] and len(found["refused"]) == 1


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        ([], r"Nothing to predict on"),
        (["{tmp}/gone.png"], r"There is no file .*gone\.png"),
        (["{tmp}"], r"No images in "),
    ],
)
def test_nothing_to_predict_on_is_refused(trained, tmp_path, paths, sentence):
    from pathlib import Path

    with pytest.raises(InputError, match=sentence):
        predict_files([trained.path, *(Path(path.format(tmp=tmp_path)) for path in paths)])
