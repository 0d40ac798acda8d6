"""The tables by which things are found are literal dicts, sorted or ordered on purpose, and import nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tfxfer
from tfxfer.errors import InputError
from tfxfer.registry import lookup

ROOT = Path(tfxfer.__file__).parent
# Table: its file, and whether its order matters (the first reader that can, reads).
TABLES = {
    "KINDS": ("sources/__init__.py", False),
    "BUILDERS": ("sources/builders/__init__.py", False),
    "TORCH_MODULES": ("sources/builders/__init__.py", False),
    "EXPORTERS": ("exporters/__init__.py", False),
    "METHODS": ("methods/__init__.py", False),
    "READERS": ("data/__init__.py", True),
    "SCORES": ("select/scores/__init__.py", False),
}


def literal(name):
    tree = ast.parse((ROOT / TABLES[name][0]).read_text(encoding="utf-8"))
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value
    raise AssertionError(f"{name} is not in {TABLES[name][0]}")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_a_literal_with_each_name_once(name):
    value = literal(name)
    assert isinstance(value, ast.Dict), "a literal dict can be found by grep"
    keys = [key.value for key in value.keys]
    assert len(keys) == len(set(keys)) > 0  # Python would keep the last of two silently
    assert TABLES[name][1] or keys == sorted(keys)


@pytest.mark.parametrize("name", TABLES)
def test_an_unknown_name_gets_near_matches(name):
    keys = [key.value for key in literal(name).keys]
    with pytest.raises(InputError, match=rf"Unknown thing '{keys[0]}x'. Did you mean '{keys[0]}'"):
        lookup(dict.fromkeys(keys), keys[0] + "x", "thing")


def test_looking_into_the_tables_imports_nothing_heavy():
    folders = sorted({Path(file).parent.as_posix().replace("/", ".") for file, _ in TABLES.values()})
    code = "import sys; " + "; ".join(f"import tfxfer.{folder}" for folder in folders)
    code += "; print(sorted({'keras', 'onnxruntime', 'tensorflow', 'tf2onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
