"""The README is true: its commands, options, names, tables and code are those of the package."""

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import typer

import tfxfer
from tfxfer import errors
from tfxfer.cli import app
from tfxfer.methods import METHODS
from tfxfer.sources.catalog import get_source, list_sources, load_backbone
from tfxfer.train.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = Path(os.environ.get("TFXFER_DATA", ROOT.parent / "shared" / "data"))
COMMANDS = typer.main.get_command(app).commands
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title):
    """Cells of the section's table, without header and ruler."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def options_of(command):
    return {option for parameter in COMMANDS[command].params for option in parameter.opts}


# -- the two commands --------------------------------------------------------------------------------


def test_the_first_two_commands_are_one_line_each():
    """.ci/run takes them from here."""
    first, second = blocks("sh")[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert first.startswith("python3 -m venv .venv && ") and first.endswith(".venv/bin/tfxfer demo\n")
    assert second.endswith(" && .venv/bin/python -m pytest\n")
    extras = re.findall(r"\.\[(\w+)\]", first + second)
    assert extras == ["test"] and set(extras) <= set(PROJECT["optional-dependencies"])


def test_the_weights_that_the_tests_need_are_those_of_the_card():
    assert get_source("mobilenet_v2_imagenet").weights["install"] in blocks("sh")[1]


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.split("\n")[0][:40])
def test_shell_blocks_parse(block):
    assert subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).stderr == ""


# -- command line --------------------------------------------------------------------------------


def quoted_commands():
    """Every `tfxfer COMMAND ...` in shell blocks and in running text."""
    lines = [line for block in blocks("sh") for line in block.splitlines()] + re.findall(
        r"`(tfxfer [a-z][^`]*)`", README
    )
    for line in lines:
        if match := re.search(r"\btfxfer ([a-z]+.*)", line):
            yield match[1]


def test_commands_and_their_options_exist():
    found = [shlex.split(line) for line in quoted_commands()]
    assert {words[0] for words in found} >= {"demo", "train", "predict", "evaluate", "verify", "sources"}
    for command, *words in found:
        assert command in COMMANDS, command
        unknown = {word for word in words if word.startswith("--")} - options_of(command) - {"--help"}
        assert not unknown, f"tfxfer {command} has no {unknown}"


def test_the_options_that_matter_are_options_of_train():
    named = [option for row in rows("Options that matter") for option in re.findall(r"--[a-z-]+", row[0])]
    assert len(named) > 12 and set(named) <= options_of("train")


def test_recipes_and_statuses_are_all_there():
    assert [row[0].strip("`") for row in rows("Recipes")] == list(RECIPES)
    kinds = (errors.CheckError, errors.InputError, errors.Interrupted, errors.Terminated)
    assert [int(row[0]) for row in rows("Exit statuses")] == [0, *(kind.exit_status for kind in kinds)]
    assert set(METHODS) == {"fine_tune", "probe"}, "a new method wants a word in the README"


# -- tables --------------------------------------------------------------------------------


def test_the_source_table_is_the_catalogue():
    table = {re.search(r"`(\w+)`", row[0])[1]: row for row in rows("Sources")}
    assert set(table) == {card.name for card in list_sources()}
    for card in list_sources():
        _, _, licence, parameters, size, _, install = table[card.name]
        assert licence == card.licence
        network = load_backbone(card, weights=False, include_top=True)
        count = sum(int(np.prod(weight.shape)) for weight in network.trainable_weights)
        assert parameters == f"{count / 1e6:.2f} M"
        assert size == (
            f"{card.image_size_px} px only"
            if card.fixed_size
            else f"{card.image_size_px} px, at least {card.min_image_size_px}"
        )
        if install == "comes with tfxfer":
            package = card.weights.get("package", "").replace("_", "-")
            assert not package or any(line.startswith(package) for line in PROJECT["dependencies"])
        else:
            assert install == f"`{card.weights['install']}`"


def test_links_lead_somewhere():
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), target


# -- Python --------------------------------------------------------------------------------


def test_names_in_the_text_are_public():
    named = set(re.findall(r"`tfxfer\.([a-zA-Z_]+)", README))
    assert len(named) >= 5 and named <= set(tfxfer.__all__)


def calls():
    snippets = [*blocks("python"), *re.findall(r"`(tfxfer\.\w+\(.*?\))`", README)]
    for tree in map(ast.parse, snippets):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("tfxfer."):
                yield node


def test_calls_fit_the_signatures():
    seen = set()
    for call in calls():
        name = ast.unparse(call.func).removeprefix("tfxfer.")
        seen.add(name)
        assert name in tfxfer.__all__
        keywords = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(getattr(tfxfer, name)).bind(*call.args, **keywords)
    assert seen >= {"fit", "build_model", "freeze", "export", "load_matching_weights", "Recipe"}


def test_the_six_lines_are_six():
    six = [block for block in blocks("python") if "tfxfer.fit(" in block]
    assert len(six) == 1 and len([line for line in six[0].splitlines() if line]) == 6


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder as the README's reader has it: photos/ of three classes, more photos, and the checkout's models/."""
    kinds = sorted(folder for folder in (DATA / "clothing" / "train").glob("*") if folder.is_dir())[:3]
    if len(kinds) < 3:
        from tfxfer.workflow.digits import NAMES, write_digits

        digits = write_digits(tmp_path / "digits", per_class=24)
        kinds = [digits / "train" / name for name in NAMES[:3]]
    for kind in kinds:
        files = sorted(file for file in kind.iterdir() if file.is_file())
        for folder, picked in (("photos", files[:20]), ("other_photos", files[20:24])):
            (tmp_path / folder / kind.name).mkdir(parents=True)
            for file in picked:
                shutil.copy(file, tmp_path / folder / kind.name)
    (tmp_path / "more_photos").mkdir()
    for name in ("photo.jpg", "more_photos/another.jpg"):
        shutil.copy(files[24 % len(files)], tmp_path / name)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_code_runs(newcomer, capsys):
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    report = next(block for block in blocks("text") if block.startswith("models/digits_cnn"))
    assert report in printed
    scores = re.findall(r"\[[0-9.]+, ([0-9.]+)\]", printed)
    assert float(scores[-1]) > 0.9, "the tutorial's digits"

    named = re.findall(
        r"[\w.]+\.(?:toml|json|csv|keras|onnx|npz)\b|saved_model/1/", section("What a run holds").split("```")[1]
    )
    assert len(set(named)) >= 9
    for name in set(named):
        assert list((newcomer / "runs" / "photos").rglob(name.rstrip("/"))), name

    lines = next(block for block in blocks("sh") if block.startswith("tfxfer train")).splitlines()
    for line in lines[1:]:  # the run is that of the Python block
        _, *words = shlex.split(line)
        done = subprocess.run(
            [sys.executable, "-c", "from tfxfer.cli import main; main()", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), line
