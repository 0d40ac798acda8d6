"""The public surface: sorted, documented, never hidden behind a module, and free of TensorFlow until it is used."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types

import pytest

import tfxfer

MODULES = sorted(module.name for module in pkgutil.walk_packages(tfxfer.__path__, "tfxfer."))


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_names_are_sorted_and_listed():
    assert tfxfer.__all__ == sorted(set(tfxfer.__all__))
    assert set(tfxfer.__all__) <= set(dir(tfxfer))
    assert len(tfxfer.__all__) > 30


def test_every_name_is_what_its_module_calls_it_after_all_submodules_are_imported():
    """A function named like a folder would be the module from its second use on."""
    for name in MODULES:
        importlib.import_module(name)
    for name in tfxfer.__all__:
        value = getattr(tfxfer, name)
        assert callable(value) and not isinstance(value, types.ModuleType), name
        assert value is getattr(importlib.import_module(value.__module__), name), name
        assert value.__name__ == name and value.__module__.startswith("tfxfer."), name


def test_no_name_is_that_of_a_submodule():
    submodules = {name.split(".")[1] for name in MODULES}
    assert {"cli", "metrics", "workflow"} <= submodules
    assert submodules & set(tfxfer.__all__) == set()


@pytest.mark.parametrize("name", tfxfer.__all__)
def test_every_name_has_a_docstring_of_its_own(name):
    value = getattr(tfxfer, name)
    text = inspect.getdoc(value)
    assert text and text.splitlines()[0].endswith((".", ":")), name
    bases = value.__mro__[1:] if inspect.isclass(value) else ()
    assert all(text != base.__doc__ for base in bases), name
    assert not text.startswith(f"{name}("), "a dataclass without a docstring gets its signature as one"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tfxfer' has no attribute 'finetune'"):
        _ = tfxfer.finetune


def test_importing_and_help_load_neither_tensorflow_nor_keras():
    code = """
import sys
import tfxfer
from tfxfer import Recipe, TfxferError, load_data, load_run, verify
from tfxfer.cli import app
try:
    app(["--help"])
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"keras", "onnxruntime", "tensorflow", "tensorflow_hub", "tf2onnx"} & set(sys.modules)
assert not heavy, heavy
"""
    # -W error: importing warns of nothing, neither of ours nor of what we use.
    done = python("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "sources", "train", "evaluate", "predict", "export", "verify"):
        assert f" {command} " in done.stdout
