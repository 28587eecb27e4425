"""The tutorial notebook: it runs from its first cell to its last, which has these figures."""

from __future__ import annotations

import ast
import copy
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from recipes.harness import ROOT

NOTEBOOK = nbformat.read(ROOT / "recipes" / "tutorial.ipynb", as_version=4)


KEYS = ["rank", "KL to the instructed model, plain", "KL to the instructed model, patched", "report", "PEFT agrees"]


def test_the_stored_one_can_be_shown() -> None:
    nbformat.validate(NOTEBOOK)
    outputs = [output for cell in NOTEBOOK.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert str(Path.home()) not in str(outputs)


@pytest.mark.real_model
@pytest.mark.usefixtures("smollm2")  # skips where it is not installed
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of other libraries
    fresh = copy.deepcopy(NOTEBOOK)
    NotebookClient(fresh, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = fresh.cells[-1].outputs
    assert list(ast.literal_eval(output.data["text/plain"])) == KEYS
