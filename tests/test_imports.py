"""The order of the packages: imports run one way, those in functions and for type checkers too."""

from __future__ import annotations

import ast
from pathlib import Path

import lit_thought

PACKAGE = Path(lit_thought.__file__).parent
ROOT = {"settings", "errors", "files", "timing", "tensor_files"}
BELOW = {
    "prompts": set(),
    "model": set(),
    "solve": set(),
    "runs": {"prompts", "model", "solve"},
    "patch": {"prompts", "model", "solve"},
    "statistics": {"prompts", "model", "solve", "runs", "patch"},
    "evaluation": {"prompts", "model", "solve", "runs", "patch"},
    "theory": {"prompts", "model", "solve", "runs", "patch", "evaluation"},
    "inputs": {"prompts", "model", "solve", "runs", "patch", "statistics"},
    "fit": {"prompts", "model", "solve", "runs", "patch", "statistics", "evaluation", "inputs"},
    "cli": {"prompts", "model", "solve", "runs", "patch", "statistics", "evaluation", "theory", "inputs", "fit"},
}
"""What each package may import, besides itself and the root."""
DOORS = {"lit_thought", "lit_thought.__main__", "lit_thought.selection"}
"""Names that users import; each stands for something further in."""


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def imported(file: Path) -> set[str]:
    """Modules of the package, and of others their first names, wherever in the file they are imported."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{one.name}" for one in node.names]
            found |= {name if name in MODULES else node.module or "" for name in names}
        elif isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
    return {name if name.startswith("lit_thought") else name.partition(".")[0] for name in found}


def package(module: str) -> str:
    return [*module.split("."), ""][1]


def test_arrows_point_one_way() -> None:
    packages = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert packages == BELOW.keys()
    wrong = []
    for module, file in MODULES.items():
        if module in DOORS:
            continue
        own = package(module)
        for other in (package(name) for name in imported(file) if name.startswith("lit_thought.")):
            allowed = ROOT if own in ROOT else ROOT | BELOW[own] | {own}
            if other not in allowed:
                wrong.append(f"{module} imports lit_thought.{other}")
    assert not wrong


def test_no_circles() -> None:
    """Also within a package."""
    arrows = {module: {name for name in imported(file) if name in MODULES} for module, file in MODULES.items()}
    arrows["lit_thought"] = set()  # it imports when asked
    while leaves := {module for module, others in arrows.items() if not others & arrows.keys()}:
        arrows = {module: others for module, others in arrows.items() if module not in leaves}
    assert not arrows


def test_who_imports_what_from_outside() -> None:
    for module, file in MODULES.items():
        outside, own = imported(file), package(module)
        assert own == "fit" or not outside & {"lightning", "pytorch_lightning"}, module
        assert own != "solve" or not outside & {"transformers", "peft", "safetensors"}, module
        assert own not in {"settings", "errors"} or not outside & {"torch", "lightning", "transformers"}, module


def test_every_package_says_what_it_is_for() -> None:
    for name in BELOW:
        assert ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8")))
