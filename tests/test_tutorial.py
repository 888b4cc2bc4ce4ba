"""The notebook, cell by cell, with few steps."""

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")


def test_every_cell_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.setenv("TUTORIAL", str(tmp_path))
    monkeypatch.setenv("MORE", "--max-steps 2")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    notebook = nbformat.read(ROOT / "scripts" / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.count("macro F1 on the test rows") == 4
    assert "[MASK]" in printed
