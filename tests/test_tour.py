"""examples/tour.ipynb runs from top to bottom, and is stored without outputs."""

import json
import os
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "examples" / "tour.ipynb"


def test_it_is_stored_without_outputs():
    code = [cell for cell in json.loads(FILE.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_it_runs(monkeypatch, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    search_path = [str(FILE.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search_path)))
    notebook = nbformat.read(FILE, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 44", "STEPS = 2")
    assert any("STEPS = 2" in cell.source for cell in notebook.cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    kinds = [set().union(*(o.get("data", ()) for o in cell.get("outputs", ()))) for cell in notebook.cells]
    assert sum("image/png" in kind for kind in kinds) == 2  # crops, neighbors
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    assert "nearest messages of the first [0, " in text
