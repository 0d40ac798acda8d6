"""The notebooks run from the first cell to the last, and end as they say."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def code_cells(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_as_it_ran(name):
    _, cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "execute_result"}, "neither errors nor widgets"
    assert all("/tmp/" not in text_of(cell) and "Users" not in text_of(cell) for cell in cells)


@pytest.mark.slow
def test_photos(tmp_path, monkeypatch):
    for name in ("empty", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    notebook, cells = code_cells("photos.ipynb")
    kept = [text_of(cell) for cell in cells]
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "empty")}}
    ).execute()
    parts, _, blocks, audit, accuracy, exported, score, baseline, predicted, verified, damaged = map(text_of, cells)
    assert (parts, blocks, audit, exported, verified) == tuple(kept[cell] for cell in (0, 2, 3, 5, 9))
    assert audit.endswith("True)") and exported.count("True True") == 2
    assert float(accuracy) > 0.85
    assert float(score.split("'value': ")[1].split(",")[0]) > 0.9
    assert " against " in baseline and predicted.count("seven") >= 2
    assert verified == "[True, True]" and "model.onnx was changed" in damaged
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.slow
def test_freeze_depth_search(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook, cells = code_cells("freeze_depth_search.ipynb")
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    _, trials, passes, shape, found, _ = map(text_of, cells)
    assert trials.count("freeze_depth") == 8 and passes == "True\n" and shape == "(None, 10)"
    assert found.startswith("4 trials") and "[True, True] ['search.csv', 'search.png']" in found
