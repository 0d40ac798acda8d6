import sys
import warnings

import pytest


@pytest.fixture(autouse=True)
def own_warnings(monkeypatch):
    """The command line replaces how warnings are shown; put back what pytest had."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def tfxfer(monkeypatch, capsys):
    """Run the command line in this process: exit status, stdout, stderr."""
    from tfxfer.cli import main

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tfxfer", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = 0 if end.code is None else end.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def no_exports(monkeypatch):
    """Train without exports: they are tried elsewhere, and here would only take time."""
    from tfxfer.workflow.training import train

    monkeypatch.setattr(train, "__kwdefaults__", {**train.__kwdefaults__, "formats": ()})
