"""What a public forge reads, CITATION.cff and the files under .github: that it parses, has the form the forge expects,
and says what pyproject.toml, README.md and .ci say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import lit_thought

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHONS = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)]

TEXT = {"type": "string", "minLength": 1}
PERSON = {"required": ["family-names"], "properties": {"family-names": TEXT}, "additionalProperties": False}
ENTITY = {"required": ["name"], "properties": {"name": TEXT}, "additionalProperties": False}
AUTHORS = {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"oneOf": [PERSON, ENTITY]}}
URL = {"type": "string", "pattern": "^https://"}
IDENTIFIER = {
    "required": ["type", "value"],
    "properties": {"type": {"enum": ["other"]}, "value": TEXT, "description": TEXT},
    "additionalProperties": False,
}
REFERENCE = {
    "required": ["authors", "title", "type"],
    "properties": {
        "type": {"enum": ["article"]},
        "title": TEXT,
        "authors": AUTHORS,
        "year": {"type": "integer"},
        "url": URL,
        "identifiers": {"type": "array", "minItems": 1, "items": IDENTIFIER},
    },
    "additionalProperties": False,
}
CFF = {
    "type": "object",
    "required": ["authors", "cff-version", "message", "title"],
    "properties": {
        "cff-version": {"const": "1.2.0"},
        **dict.fromkeys(("message", "title", "abstract", "version", "license"), TEXT),
        "type": {"enum": ["software", "dataset"]},
        "repository-code": URL,
        "keywords": {"type": "array", "minItems": 1, "uniqueItems": True, "items": TEXT},
        "authors": AUTHORS,
        "references": {"type": "array", "minItems": 1, "items": REFERENCE},
    },
    "additionalProperties": False,
}
"""The Citation File Format 1.2.0, as far as it is used."""


def read(path: str) -> Any:
    """A YAML file; of a workflow all values are texts, for else its ``on`` would be a truth value."""
    loader = yaml.BaseLoader if "workflows" in path else yaml.SafeLoader
    return yaml.load((ROOT / path).read_text(encoding="utf-8"), loader)


def test_the_citation() -> None:
    citation, project = read("CITATION.cff"), PROJECT["project"]
    jsonschema.validate(citation, CFF)
    assert citation["version"] == project["version"] == lit_thought.__version__
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]
    assert citation["repository-code"] == project["urls"]["Source"]
    quoted = " ".join(README.partition("## Citation")[2].split())
    for work in citation["references"]:
        number = work["url"].rpartition("/")[2]
        assert f"{work['title']}*, {work['year']}, arXiv {number}" in quoted
        assert work["identifiers"][0]["value"] == f"arXiv:{number}"
        assert work["authors"][0]["family-names"] in quoted


def test_the_addresses_are_of_one_repository() -> None:
    urls = PROJECT["project"]["urls"]
    assert all(url.startswith(urls["Source"]) for url in urls.values())
    assert urls["Source"] in (ROOT / ".github/SECURITY.md").read_text(encoding="utf-8")


def test_the_tests_run_on_every_python_of_the_classifiers() -> None:
    matrix = read(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == PYTHONS == ["3.11", "3.12", "3.13"]
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{PYTHONS[0].replace('.', '')}"
    assert f"Python {PYTHONS[0]} or newer" in README


def test_the_workflow_runs_the_scripts_of_the_repository() -> None:
    workflow = read(".github/workflows/tests.yml")
    assert workflow["permissions"] == {"contents": "read"}
    job = workflow["jobs"]["tests"]
    steps = {step["if"]: step["run"] for step in job["steps"] if "run" in step}
    wanted = {"pinned": ".ci/run", "oldest": ".ci/oldest", "newest": ".ci/newest"}
    assert job["strategy"]["matrix"]["dependencies"] == list(wanted)
    assert steps == {f"matrix.dependencies == '{name}'": script for name, script in wanted.items()}
    assert all(os.access(ROOT / script, os.X_OK) for script in wanted.values())


def test_links_of_a_released_readme_lead_to_its_tag(tmp_path: Path) -> None:
    """On the package index there are no files beside it."""
    steps = read(".github/workflows/release.yml")["jobs"]["build"]["steps"]
    (command,) = [step["run"] for step in steps if "sed" in step.get("run", "")]
    shutil.copy(ROOT / "README.md", tmp_path)
    names = {"GITHUB_REPOSITORY": "own/name", "GITHUB_REF_NAME": "v1.2"}
    subprocess.run(["bash", "-e", "-c", command], cwd=tmp_path, env={**os.environ, **names}, check=True)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"(!?)\[[^]]*\]\(([^)#]+)\)", text)
    assert len(links) > 20
    for picture, link in links:
        root = "raw.githubusercontent.com/own/name/v1.2/" if picture else "github.com/own/name/blob/v1.2/"
        assert link.startswith(f"https://{root}recipes/")
        assert (ROOT / link.removeprefix(f"https://{root}")).exists()


def test_a_release_is_tested_and_built_before_it_is_published() -> None:
    workflow = read(".github/workflows/release.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    jobs = workflow["jobs"]
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert "workflow_call" in read(".github/workflows/tests.yml")["on"]
    assert jobs["publish"]["needs"] == ["tests", "build"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "permissions" not in jobs["build"]
    assert workflow["permissions"] == {"contents": "read"}
    lines = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    assert [line for line in lines if "python -m" in line] == [
        "python -m pip install build twine",
        "python -m build",
        "python -m twine check --strict dist/*",
    ]
    used = [step["with"]["python-version"] for step in jobs["build"]["steps"] if "setup-python" in step.get("uses", "")]
    assert len(used) == 1
    assert used[0] in PYTHONS
    check = next(line for line in lines if line.startswith("test "))
    for tag, code in ((f"v{lit_thought.__version__}", 0), (lit_thought.__version__, 1), ("v99", 1)):
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        assert subprocess.run(["bash", "-c", check], cwd=ROOT, env=environment, check=False).returncode == code


@pytest.mark.parametrize("name", ["bug", "model_family", "question"])
def test_issue_forms(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form.keys() == {"name", "description", "labels", "body"}
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in ("input", "textarea")
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        allowed = {"label", "description", "placeholder"} | ({"render"} if field["type"] == "textarea" else set())
        assert {"label"} <= field["attributes"].keys() <= allowed
        assert all(isinstance(text, str) for text in field["attributes"].values())


def test_what_the_policy_names_is_there() -> None:
    policy = " ".join((ROOT / ".github/SECURITY.md").read_text(encoding="utf-8").split())
    linked = re.findall(r"\]\(([^)]+)\)", policy)
    assert "../recipes/site/pages/safety.md" in linked
    assert all((ROOT / ".github" / path).exists() for path in linked)
    assert all((ROOT / path).exists() for path in re.findall(r"`(tests/\S+)`", policy))


def test_the_oldest_are_tried_over_what_the_readme_installs(tmp_path: Path) -> None:
    """The script, with programs that only say how they are called."""
    for name in ("pip", "python", "python3"):
        file = tmp_path / name
        file.write_text(
            f'#!/bin/bash\necho {name} "$@" >>"{tmp_path}/calls"\n'
            '[ "$2" != venv ] || { mkdir -p "$3/bin"; echo >"$3/bin/activate"; }\n'
        )
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([ROOT / ".ci" / "oldest"], env=environment, check=True)
    first, *installs, last = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("python3 -m venv ")
    shown = next(line for line in README.splitlines() if ".[dev]" in line)
    assert installs == [part.replace('"', "") for part in shown.split(" && ") if part.startswith("pip")]
    assert re.match(
        r"python -m recipes\.robustness\.versions --config (\S+) --combinations \[oldest\] --out \S+$", last
    )
