"""Puts into the site what has its home elsewhere in the repository, so that no text is there twice.

recipes/README.md and recipes/serving.md are pages, and so is each of recipes/results with its figures. A script or
module that a page links to becomes a page with its text, a recipe's with its config. Links stay as they work in the
repository; here they are rewritten to where their targets are in the site. The pages on the command line are what
``--help`` prints. A line ``<!-- section: FILE "Heading" -->`` stands for that section of a file.

The page of results has a sentence for each study, from headlines.yml; a figure in it that does not stand on the study's
own page stops the build.
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

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = "recipes/site/pages"
MOVED = {"recipes/README.md": "guide.md", "recipes/serving.md": "how_to/serving.md"}
"""Where pages of the repository are in the site."""
INSTEAD = {"README.md": "index.md", "recipes/results": "results/index.md"}
"""What is linked to in the repository, and the page that the site has for it."""
HEADLINES = ROOT / "recipes/site/headlines.yml"

_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(?:#[^)\s]*)?\))")
_SECTION = re.compile(r'^<!-- section: (\S+) "(.+)" -->$', re.MULTILINE)
_FIGURE = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\w])")
_HIDDEN = "---\nsearch:\n  exclude: true\n---\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the commands and the results to the navigation."""
    assert config.nav is not None
    lines = ["command_line/index.md", *(f"command_line/{command}.md" for command in commands())]
    studies = [f"results/{path.name}" for path in results() if not path.name.startswith("gallery")]
    config.nav += [{"Command line": lines}, {"Results": ["results/index.md", "figures.md", *studies]}]
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
    for command in commands():
        files.append(File.generated(config, f"command_line/{command}.md", content=command_page(command)))
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
    markdown = relinked(markdown, home, uri).replace("<!-- commands -->", command_list())
    return _SECTION.sub(lambda match: section(match[1], match[2], uri), markdown)


def repository_path(uri: str) -> str:
    """The file of the repository that a page of the site is made of."""
    back = {site: path for path, site in MOVED.items()}
    if uri in back:
        return back[uri]
    return f"recipes/{uri}" if uri.startswith("results/") else f"{PAGES}/{uri}"


def site_uri(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in {**MOVED, **INSTEAD}:
        return {**MOVED, **INSTEAD}[path]
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
    """What each study found, in a sentence, with its first picture; and the recipe that makes it.

    Raises:
        ValueError: A study has no headline, or one with a figure that its page does not have.
    """
    groups = yaml.safe_load(HEADLINES.read_text(encoding="utf-8"))
    said = {name: sentence for group in groups.values() for name, sentence in group.items()}
    pages = {path.stem: path.read_text(encoding="utf-8") for path in results()}
    if said.keys() != pages.keys():
        raise ValueError(f"{HEADLINES.name} and recipes/results differ: {sorted(said.keys() ^ pages.keys())}.")
    parts = [
        "# Results",
        "",
        "What each study found, in a sentence; its page has all that was measured, and the command.",
    ]
    for group, headlines in groups.items():
        parts += ["", f"## {group}"]
        for name, sentence in headlines.items():
            missing = sorted(figures(sentence) - figures(pages[name]))
            if missing:
                raise ValueError(f"{HEADLINES.name}: {name}: {', '.join(missing)} not in recipes/results/{name}.md.")
            recipe = recipe_of(ROOT / f"recipes/results/{name}.md")
            made = "the tests" if recipe is None else f"[{Path(recipe).stem}](../{site_uri(recipe)})"
            title = titled(ROOT / f"recipes/results/{name}.md").partition("\n")[0].removeprefix("# ")
            parts += ["", f"**[{title}]({name}.md).** {sentence} *By {made}.*"]
            picture = re.search(r"^!\[.*\]\(.*\.svg\)$", pages[name], re.MULTILINE)
            parts += ["", picture[0]] if picture else []
    return "\n".join(parts) + "\n"


def figures(text: str) -> set[str]:
    """The numbers in a text, as they are written."""
    return set(_FIGURE.findall(text))


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


def commands() -> list[str]:
    """The commands, in the order of the help."""
    found = re.search(r"\{([\w,-]+)\}", help_of())
    assert found is not None
    return found[1].split(",")


def command_list() -> str:
    """A line for each command, with what its help begins with."""
    lines = ["| command | what it does |", "|---|---|"]
    for command in commands():
        about = help_of(command).split("\n\n")[1]
        lines.append(f"| [lit-thought {command}]({command}.md) | {' '.join(about.split())} |")
    return "\n".join(lines)


def command_page(command: str) -> str:
    """What ``lit-thought COMMAND --help`` prints."""
    return f"# lit-thought {command}\n\n```text\n{help_of(command)}\n```\n"


def help_of(*command: str) -> str:
    """What ``lit-thought COMMAND --help`` prints, 80 columns wide."""
    from lit_thought.cli import main

    printed = StringIO()
    with patch.dict(os.environ, {"COLUMNS": "80"}), redirect_stdout(printed), suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue().replace(" \b", "").strip()  # jsonargparse moves the cursor back
