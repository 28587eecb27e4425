"""The wheel and the source distribution: what they hold, and that the wheel works where the source tree is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from command_line import fit_arguments, make_files
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both distributions, built by the declared backend from a copy of the tree."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lit_thought", source / "lit_thought", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta as b; print(b.build_sdist('..')); print(b.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.suffix: path for path in folder.iterdir() if path.is_file()}


def test_both_hold_the_whole_package(built: dict[str, Path]) -> None:
    tree = (path for path in (ROOT / "lit_thought").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    wanted = {path.relative_to(ROOT).as_posix() for path in tree}
    assert {"lit_thought/py.typed", "lit_thought/prompts/text/preserve.txt"} <= wanted
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = set(wheel.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "lit-thought = lit_thought.cli:main" in wheel.read(entry).decode()
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(built[".gz"]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert wanted | {"LICENSE", "README.md", "pyproject.toml"} <= inside


def test_the_wheel_states_what_pyproject_does(built: dict[str, Path]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(built[".whl"]) as wheel:
        lines = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode().splitlines()
    assert f"Version: {project['version']}" in lines
    assert "License-Expression: Apache-2.0" in lines
    stated = {Requirement(line) for line in project["dependencies"]}
    required = {Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")}
    assert {requirement for requirement in required if "extra" not in str(requirement.marker)} == stated


@pytest.mark.slow
def test_the_wheel_fits_a_model_without_the_source_tree(built: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "site"
    with zipfile.ZipFile(built[".whl"]) as wheel:
        wheel.extractall(place)
    make_files(tmp_path)
    code = "import sys, lit_thought.cli as c; print(c.__file__); c.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *fit_arguments(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(place), "LIT_THOUGHT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(str(place))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("module", ["lit_thought", "lit_thought.cli"])
def test_an_import_is_cheap_until_something_is_used(module: str) -> None:
    heavy = ["torch", "transformers", "lightning", "peft", "matplotlib"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
