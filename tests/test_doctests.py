"""The examples in the docstrings give what they say."""

import contextlib
import doctest
import importlib
import importlib.util
import io
import pkgutil
from pathlib import Path

import pytest

import tfxfer


def modules_with_examples():
    for module in pkgutil.walk_packages(tfxfer.__path__, "tfxfer."):
        origin = importlib.util.find_spec(module.name).origin
        lines = Path(origin).read_text(encoding="utf-8").splitlines() if origin else []
        if any(">>> " in line and "# doctest: +SKIP" not in line for line in lines):
            yield module.name


MODULES = sorted(modules_with_examples())


def test_the_pure_modules_have_examples():
    pure = {"errors", "metrics", "registry", "select.verdict", "runtime.images"}
    assert {f"tfxfer.{name}" for name in pure} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0, report.getvalue()
    assert list(tmp_path.iterdir()) == []
