"""The code of the notebook, cell by cell, with few steps, on a part of Python's library."""

import json
import shlex
import shutil
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT, script


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "sklearn", "IPython"):
        pytest.importorskip(name)
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("asyncio", "email", "importlib", "logging", "multiprocessing", "xml"):
        shutil.copytree(library / name, tmp_path / "library" / name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: tmp_path / "library")
    for name in ("set_verbosity_error", "disable_progress_bar"):  # for all tests that follow
        monkeypatch.setattr(f"transformers.utils.logging.{name}", lambda: None)
    for name, value in (("TUTORIAL", tmp_path), ("MORE", "--max-steps 2"), ("MPLBACKEND", "agg")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(ROOT)
    notebook = json.loads((ROOT / "scripts" / "tutorial.ipynb").read_text("utf-8"))
    first, *cells = ["".join(cell["source"]) for cell in notebook["cells"] if "outputs" in cell]
    values = {}
    exec(first, values)
    values["run"]("show_masks.py --help", hide=("usage",))
    assert "--sampled" in capsys.readouterr().out

    def run(command, hide=()):
        name, *argv = shlex.split(command)
        script(name.removesuffix(".py")).main(argv)

    values["run"] = run  # without a new process
    for cell in cells:
        exec(cell.replace("%matplotlib inline", ""), values)
    printed = capsys.readouterr().out
    assert printed.count("macro F1 on the test rows") == 4 and "[MASK]" in printed
    assert "display.Image" in printed
