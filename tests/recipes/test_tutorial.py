"""The tutorial notebook: it runs from its first cell to its last, which has the figures that the stored one has."""

from __future__ import annotations

import ast
import copy
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from recipes.harness import ROOT

NOTEBOOK = nbformat.read(ROOT / "recipes" / "tutorial.ipynb", as_version=4)


def last_keys(notebook: Any) -> list[str]:
    """The names in the last cell's output."""
    (output,) = notebook.cells[-1].outputs
    return list(ast.literal_eval(output.data["text/plain"]))


def test_the_stored_one_was_run_from_its_first_cell_to_its_last() -> None:
    nbformat.validate(NOTEBOOK)
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert str(Path.home()) not in str(outputs)
    assert str(ROOT) not in str(outputs)


@pytest.mark.real_model
@pytest.mark.usefixtures("smollm2")  # skips where it is not installed
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    fresh = copy.deepcopy(NOTEBOOK)
    NotebookClient(fresh, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert last_keys(fresh) == last_keys(NOTEBOOK)
