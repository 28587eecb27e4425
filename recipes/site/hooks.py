"""Puts into the site what has its home elsewhere in the repository, so that no text is there twice.

README.md is the first page, recipes/README.md and recipes/serving.md are pages, and so is each of recipes/results with
its figures. A script or module that a page links to becomes a page with its text, a recipe's with its config. Links
stay as they work in the repository; here they are rewritten to where their targets are in the site. The page on the
command line is what ``--help`` prints. A line ``<!-- section: FILE "Heading" -->`` stands for that section of a file.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = "recipes/site/pages"
MOVED = {"README.md": "index.md", "recipes/README.md": "guide.md", "recipes/serving.md": "how_to/serving.md"}
"""Where pages of the repository are in the site."""

_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(?:#[^)\s]*)?\))")
_SECTION = re.compile(r'^<!-- section: (\S+) "(.+)" -->$', re.MULTILINE)
_HIDDEN = "---\nsearch:\n  exclude: true\n---\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the results to the navigation."""
    assert config.nav is not None
    config.nav.append({"Results": ["results/index.md", *(f"results/{path.name}" for path in results())]})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made of other files."""
    own = [ROOT / PAGES / file.src_uri for file in files.documentation_pages()]
    homes = [*own, *(ROOT / path for path in MOVED), *results()]
    for path in MOVED:
        files.append(File.generated(config, MOVED[path], abs_src_path=str(ROOT / path)))
    for path in results():
        files.append(File.generated(config, f"results/{path.name}", content=titled(path)))
    for path in sorted((ROOT / "recipes/results").glob("*.svg")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "results/index.md", content=results_page()))
    files.append(File.generated(config, "command_line.md", content=command_line_page()))
    recipes = {recipe for path in results() if (recipe := recipe_of(path)) is not None}
    for source in sorted(recipes.union(*map(linked_sources, homes))):
        page = File.generated(
            config, site_uri(source), content=source_page(source), inclusion=InclusionLevel.NOT_IN_NAV
        )
        files.append(page)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in the sections of other files and point links to where their targets are in the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    home = repository_path(uri)
    return _SECTION.sub(lambda match: section(match[1], match[2], uri), relinked(markdown, home, uri))


def repository_path(uri: str) -> str:
    """The file of the repository that a page of the site is made of."""
    back = {site: path for path, site in MOVED.items()}
    if uri in back:
        return back[uri]
    return f"recipes/{uri}" if uri.startswith("results/") else f"{PAGES}/{uri}"


def site_uri(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in MOVED:
        return MOVED[path]
    if path == "recipes/results":
        return "results/index.md"
    if path.startswith("recipes/results/"):
        return path.removeprefix("recipes/")
    if path.startswith(f"{PAGES}/"):
        return path.removeprefix(f"{PAGES}/")
    return f"source/{path}.md"


def relinked(markdown: str, home: str, uri: str) -> str:
    """``markdown`` of the repository's file ``home`` with its links as the page ``uri`` needs them."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(home), match[1]))
        if not (ROOT / target).exists():
            return match[0]  # left for mkdocs to report, unless it is a page that only the site has
        return posixpath.relpath(site_uri(target), posixpath.dirname(uri) or ".")

    return _LINK.sub(link, markdown)


def section(path: str, heading: str, uri: str) -> str:
    """What stands below a second-level heading of a file, its links as the page ``uri`` needs them."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"{path} has no section {heading!r}, which {uri} asks for.")
    return relinked(found[1].strip(), path, uri)


def results() -> list[Path]:
    """The pages of figures."""
    return sorted((ROOT / "recipes/results").glob("*.md"))


def titled(path: Path) -> str:
    """A page with a title above it, without which its first line could be taken for metadata (``Seconds: …``)."""
    text = path.read_text(encoding="utf-8")
    return text if text.startswith("# ") else f"# {path.stem.replace('_', ' ').capitalize()}\n\n{text}"


def results_page() -> str:
    """A list of the pages of figures, with the recipe that makes each."""
    rows = ["# Results", "", "Figures as the recipes wrote them.", "", "| figures | recipe |", "|---|---|"]
    for path in results():
        recipe = recipe_of(path)
        link = "the tests" if recipe is None else f"[{Path(recipe).stem}](../{site_uri(recipe)})"
        rows.append(f"| [{path.stem}]({path.name}) | {link} |")
    return "\n".join(rows) + "\n"


def recipe_of(path: Path) -> str | None:
    """The script whose name a page of figures begins with, the longest if there are several."""
    scripts = [script for script in (ROOT / "recipes").rglob("*.py") if script.with_suffix(".yaml").is_file()]
    fitting = [script for script in scripts if f"{path.stem}_".startswith(f"{script.stem}_")]
    return max(fitting, key=lambda script: len(script.stem)).relative_to(ROOT).as_posix() if fitting else None


def linked_sources(home: Path) -> set[str]:
    """The files that a page links to and that are no pages themselves, as paths in the repository."""
    targets = {os.path.normpath(home.parent / target) for target in _LINK.findall(home.read_text(encoding="utf-8"))}
    inside = [Path(target) for target in targets if Path(target).is_file() and Path(target).is_relative_to(ROOT)]
    paths = {path.relative_to(ROOT).as_posix() for path in inside}
    return {path for path in paths if site_uri(path).startswith("source/")}


def source_page(path: str) -> str:
    """A page that shows a file, and below a recipe its config."""
    if path.endswith(".ipynb"):
        return notebook_page(path)
    shown = [path]
    config = Path(path).with_suffix(".yaml").as_posix()
    if path.endswith(".py") and (ROOT / config).is_file():
        shown.append(config)
    parts = [f"{_HIDDEN}# {path}"]
    for name in shown:
        language = {".py": "python", ".yaml": "yaml"}.get(Path(name).suffix, "text")
        parts.append(f"````{language}\n{(ROOT / name).read_text(encoding='utf-8')}````")
    return "\n\n".join(parts) + "\n"


def notebook_page(path: str) -> str:
    """A notebook's texts, its code and what that printed."""
    parts = []
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"````python\n{source}\n````")
        for output in cell.get("outputs", ()):
            printed = "".join(output.get("text") or output["data"]["text/plain"])
            parts.append(f"````text\n{printed.rstrip()}\n````")
    return "\n\n".join(parts) + "\n"


def command_line_page() -> str:
    """What ``lit-thought --help`` prints, and each command's help."""
    top = help_of()
    commands = re.search(r"\{([\w,-]+)\}", top)
    assert commands is not None
    parts = ["# Command line", "", "```text", top, "```"]
    for command in commands[1].split(","):
        parts += ["", f"## lit-thought {command}", "", "```text", help_of(command), "```"]
    return "\n".join(parts) + "\n"


def help_of(*command: str) -> str:
    """What ``lit-thought COMMAND --help`` prints, 80 columns wide."""
    from lit_thought.cli import main

    printed = StringIO()
    with patch.dict(os.environ, {"COLUMNS": "80"}), redirect_stdout(printed), suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue().replace(" \b", "").strip()  # jsonargparse moves the cursor back
