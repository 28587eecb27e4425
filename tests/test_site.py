"""The documentation as a static site: built without network, complete, and readable without network."""

from __future__ import annotations

import inspect
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import griffe
import matplotlib
import pytest
import yaml
from browsing import visit
from click.testing import CliRunner
from mkdocs.__main__ import cli
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

import lit_thought
from lit_thought.cli import COMMANDS, main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SITE = ROOT / "recipes" / "site"
RESULTS = ROOT / "recipes" / "results"
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


class Html(HTMLParser):
    """What a page has: names to link to, links, what it loads, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if found.get(LOADED.get(tag, "")):
            self.loaded.append(found[LOADED[tag]])

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, by the one command, where every attempt to reach another machine is an error."""

    def refuse(*args: Any) -> None:
        raise OSError(f"the build asks for {args[1:]}")

    folder = tmp_path_factory.mktemp("site") / "built"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.setattr(sys, "path", [*sys.path])
        done = CliRunner().invoke(cli, ["build", "-f", str(SITE / "mkdocs.yml"), "-d", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Html]:
    return {path.relative_to(site).as_posix(): Html(path.read_text("utf-8")) for path in site.rglob("*.html")}


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SITE))
    import hooks

    return hooks


# Complete


def test_all_pages_are_there(pages: dict[str, Html]) -> None:
    def named(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from named(value) if isinstance(value, list) else [value]

    config = yaml.safe_load((SITE / "mkdocs.yml").read_text("utf-8"))
    wanted = {*named(config["nav"]), "results/index.md", *(f"results/{path.name}" for path in RESULTS.glob("*.md"))}
    wanted |= {f"command_line/{command}.md" for command in COMMANDS}
    wanted |= {path.relative_to(SITE / "pages").as_posix() for path in (SITE / "pages").rglob("*.md")}
    assert len(wanted) > 35
    assert {re.sub(r"\.md$", ".html", name) for name in wanted} <= pages.keys()
    linked = {urlsplit(link).path for link in pages["index.html"].links}
    assert {name.replace(".md", ".html") for name in named(config["nav"])} - {"index.html"} <= linked


def test_what_has_its_home_elsewhere_is_the_same(site: Path, pages: dict[str, Html]) -> None:
    homes = {"recipes/README.md": "guide", "recipes/serving.md": "how_to/serving"}
    homes |= {f"recipes/results/{path.name}": f"results/{path.stem}" for path in RESULTS.glob("*.md")}
    for home, page in homes.items():
        words = re.findall(
            r"[^\W_]{4,}", re.sub(r"!\[.*?\]\(.*?\)|\]\(.*?\)|<!--.*?-->", "", (ROOT / home).read_text("utf-8"))
        )
        assert set(words) <= set(re.findall(r"[^\W_]{4,}", pages[f"{page}.html"].text)), home
    for figure in RESULTS.glob("*.svg"):
        assert (site / "results" / figure.name).read_bytes() == figure.read_bytes()
    home, readme = pages["index.html"].text, (ROOT / "README.md").read_text("utf-8")
    for heading in ("The same question, three times", "Try it", "Beside other ways"):
        assert heading in home
        part = re.sub(r"!\[.*?\]\(.*?\)|\]\(.*?\)", "", readme.partition(f"## {heading}\n")[2].partition("\n## ")[0])
        assert set(re.findall(r"[^\W_]{4,}", part)) <= set(re.findall(r"[^\W_]{4,}", home)), heading
    limits = pages["limits.html"].text
    assert "Gemma 3n" in limits
    assert "Look things up" in limits


def test_a_recipe_is_shown_with_its_config(pages: dict[str, Html]) -> None:
    text = pages["source/recipes/quickstart.py.html"].text
    for name in ("quickstart.py", "quickstart.yaml"):
        assert (ROOT / "recipes" / name).read_text("utf-8").strip() in text
    assert "source/recipes/quickstart.py.html" in pages["guide.html"].links
    notebook = pages["source/recipes/tutorial.ipynb.html"].text
    assert "From a system prompt to an adapter" in notebook
    assert "patch.save_adapter(folder)" in notebook
    links = pages["results/index.html"].links
    assert {
        "../source/recipes/studies/sweep.py.html",
        "../source/recipes/studies/theory.py.html",
        "sweep_rank.html",
    } <= set(links)


def test_every_public_name_is_documented(pages: dict[str, Html]) -> None:
    assert len(lit_thought.__all__) >= 9
    assert {f"lit_thought.{name}" for name in lit_thought.__all__} <= pages["api/index.html"].ids
    shown = set().union(*(page.ids for name, page in pages.items() if name.startswith("api/")))
    assert "lit_thought.settings.FitSettings" in shown
    assert {f"lit_thought.theory.condense.{name}" for name in ("thought_matrix", "thought_vector")} <= shown
    for name in ("solve.least_squares", "statistics.saved", "patch.export", "fit.strategy", "fit.inspection"):
        module = f"lit_thought.{name}"
        names = import_module(module).__all__
        assert {f"{module}.{entry}" for entry in names} <= shown


def test_docstrings_become_links_examples_and_formulas(site: Path, pages: dict[str, Html]) -> None:
    for name, page in pages.items():
        if name.startswith("api/"):
            assert not re.search(r":(attr|class|data|func|meth|mod):`", page.text), name
    assert "#lit_thought.ThoughtCallback" in pages["api/index.html"].links
    theory = (site / "api" / "theory.html").read_text("utf-8")
    assert "<blockquote>" not in theory
    assert re.search(r'<span class="gp">&gt;&gt;&gt; </span><span class="n">thought_vector', theory)
    assert "Δ(I) = argmin_M Σ wᵢ ‖M aᵢ − δᵢ‖²" in pages["api/theory.html"].text


def test_each_command_has_a_page_with_its_help(
    pages: dict[str, Html], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert {"fit", "chat", "evaluate", "export", "solve"} <= COMMANDS.keys()
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        page = pages[f"command_line/{command}.html"]
        assert f"lit-thought {command}" in page.text
        assert capsys.readouterr().out.replace(" \b", "").strip() in page.text
        assert f"{command}.html" in pages["command_line/index.html"].links
    settings = [*inspect.signature(lit_thought.transmute).parameters][2:]
    absent = {name for name in settings if f"--{name}" not in pages["command_line/fit.html"].text}
    assert absent == {"output_dir"}  # which is --out


def test_results_say_what_was_found(pages: dict[str, Html], hooks: Any) -> None:
    page = pages["results/index.html"]
    groups = yaml.safe_load((SITE / "headlines.yml").read_text("utf-8"))
    said = {name: sentence for group in groups.values() for name, sentence in group.items()}
    assert said.keys() == {path.stem for path in RESULTS.glob("*.md")}
    for name, sentence in said.items():
        assert sentence in page.text
        assert f"{name}.html" in page.links
    assert {"compose.svg", "theory_kept.svg"} <= set(page.loaded)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"word_tasks": "It is 0.775."}, r"headlines\.yml: word_tasks: 0\.775 not in recipes/results/word_tasks\.md"),
        ({"word_tasks": "It is 0.55."}, r"word_tasks: 0\.55 not in"),
        ({"nothing": "It is 0.786."}, r"headlines\.yml and recipes/results differ: .*'nothing'"),
    ],
)
def test_a_headline_that_its_study_does_not_bear_stops_the_build(
    changed: dict[str, str], said: str, hooks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = yaml.safe_load(hooks.HEADLINES.read_text("utf-8"))
    next(iter(groups.values())).update(changed)
    (tmp_path / "headlines.yml").write_text(yaml.safe_dump(groups), "utf-8")
    monkeypatch.setattr(hooks, "HEADLINES", tmp_path / "headlines.yml")
    with pytest.raises(ValueError, match=said):
        hooks.results_page()


def test_the_readme_compares_with_figures_of_its_studies(hooks: Any) -> None:
    section = (ROOT / "README.md").read_text("utf-8").partition("## Beside other ways\n")[2].partition("\n## ")[0]
    studies = re.findall(r"\]\((recipes/results/\w+\.md)\)", section)
    assert len(studies) == 3
    known = {number for study in studies for number in hooks.figures((ROOT / study).read_text("utf-8"))}
    known |= {f"{float(number):.0f}" for number in known if "." in number} | {"0", "1", "1.0", "30", "300"}
    assert hooks.figures(re.sub(r"\(recipes.*?\)", "", section)) <= known


# Without network


def test_every_internal_link_leads_somewhere(site: Path, pages: dict[str, Html]) -> None:
    checked = 0
    for name, page in pages.items():
        if name == "404.html":
            continue  # a server shows it anywhere, so its links are from the root
        for link in (*page.links, *page.loaded):
            address = urlsplit(link)
            if address.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (site / name).parent / unquote(address.path) if address.path else site / name
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{name}: {link}"
            if address.fragment and target.suffix == ".html" and not address.fragment.startswith("__"):
                ids = pages[target.resolve().relative_to(site.resolve()).as_posix()].ids
                assert unquote(address.fragment) in ids, f"{name}: {link}"
            checked += 1
    assert checked > 1000


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[str, Html]) -> None:
    outside = [(name, link) for name, page in pages.items() for link in page.loaded if re.match(r"(https?:)?//", link)]
    assert outside == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text("utf-8")), sheet.name


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_in_a_browser_from_a_folder(
    browser: Any,
    site: Path,
    width: int,
    scheme: str,
) -> None:
    names = (
        "index",
        "tutorials/document",
        "concepts",
        "api/index",
        "results/index",
        "results/gallery",
        "results/families",
    )
    for name in names:
        console, asked = visit(browser, site / f"{name}.html", width, scheme)
        assert console == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        broken = "return [...document.images].filter(e => !e.complete || !e.naturalWidth).map(e => e.src)"
        assert browser.execute_script(broken) == []


def test_the_search_works_from_a_folder(browser: Any, site: Path) -> None:
    visit(browser, site / "index.html")
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    browser.execute_script("arguments[0].focus()", field)
    field.send_keys("salted hash")
    found = WebDriverWait(browser, 15).until(
        lambda driver: driver.find_elements(By.CSS_SELECTOR, ".md-search-result__link")
    )
    assert any("secret_instruction.html" in link.get_attribute("href") for link in found)


# The parts


def test_pictures_are_what_their_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SITE))
    import pictures

    with matplotlib.rc_context({"savefig.bbox": "tight", "font.size": 20}):  # as other recipes may have it
        pictures.pictures(str(tmp_path))
    kept = {path.name: path.read_text("utf-8") for path in (SITE / "pages" / "pictures").iterdir()}
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert kept.keys() == drawn.keys()
    texts = {name: re.findall(r"<text[^>]*>([^<]*)<", text) for name, text in drawn.items()}
    assert {name: re.findall(r"<text[^>]*>([^<]*)<", text) for name, text in kept.items()} == texts
    assert all(len(words) > 5 for words in texts.values())
    for name, text in kept.items():
        drawn_alike = "Matplotlib v" not in text or f"Matplotlib v{matplotlib.__version__}," in text  # others may round
        if drawn_alike and name != "chat.svg":  # which rich lays out, each version in its way
            assert text == drawn[name]
    pages = ("index.md", "concepts.md", "tutorials/system_prompt.md")
    shown = "".join((SITE / "pages" / page).read_text("utf-8") for page in pages)
    found = re.findall(r"!\[[^\]]{20,}\]\((?:\.\./)?([^)]+)\)", shown)
    assert {f"pictures/{name}" for name in kept} <= set(found)
    for name in ("idea", "chat"):
        assert f"](recipes/site/pages/pictures/{name}.svg)" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("home", "uri", "link", "wanted"),
    [
        ("recipes/README.md", "guide.md", "serving.md", "how_to/serving.md"),
        ("recipes/site/pages/index.md", "index.md", "../../README.md#troubleshooting", "guide.md#troubleshooting"),
        ("recipes/README.md", "guide.md", "speed/gpu.py", "source/recipes/speed/gpu.py.md"),
        ("recipes/README.md", "guide.md", "results", "results/index.md"),
        ("recipes/README.md", "guide.md", "results/limits.md", "results/limits.md"),
        ("recipes/serving.md", "how_to/serving.md", "../README.md", "../index.md"),
        ("recipes/results/theory.md", "results/theory.md", "theory_kept.svg", "theory_kept.svg"),
        ("recipes/site/pages/how_to/resume.md", "how_to/resume.md", "../../../results/sweep.md", "../results/sweep.md"),
        ("recipes/site/pages/how_to/resume.md", "how_to/resume.md", "preservation.md", "preservation.md"),
        ("recipes/README.md", "guide.md", "nowhere.md", "nowhere.md"),
        ("recipes/README.md", "guide.md", "https://example.org/README.md", "https://example.org/README.md"),
    ],
)
def test_links_are_those_of_the_site(hooks: Any, home: str, uri: str, link: str, wanted: str) -> None:
    assert hooks.relinked(f"see [it]({link}), `[x](y)`", home, uri) == f"see [it]({wanted}), `[x](y)`"
    if not uri.startswith("source/"):
        assert hooks.repository_path(uri) == home


def test_a_section_ends_at_the_next_heading(hooks: Any) -> None:
    text = hooks.section("recipes/README.md", "What it cannot do", "how_to/x.md")
    assert text.startswith("`python -m recipes.studies.limits")
    assert "](../results/limits.md)" in text
    assert "Troubleshooting" not in text
    with pytest.raises(ValueError, match=r"README\.md has no section 'Nothing'"):
        hooks.section("README.md", "Nothing", "limits.md")


def test_roles_become_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SITE))
    from docstrings import rewritten

    code = "class A:\n    def one(self): ...\n    def two(self): ...\ndef free(): ...\n"
    with griffe.temporary_visited_module(code, module_name="package") as module:
        method = module["A"]["one"]
        reference = '<autoref optional identifier="{}"><code>{}</code></autoref>'
        assert rewritten(":meth:`two`", method) == reference.format("package.A.two", "two")
        assert rewritten(":meth:`A.two`", module) == reference.format("package.A.two", "A.two")
        assert rewritten(":func:`free`", method) == reference.format("package.free", "free")
        long = "lit_thought.patch.patch.ThoughtPatch"
        assert rewritten(f":class:`~{long}`", method) == reference.format(long, "ThoughtPatch")
        assert rewritten(f":class:`{long}`", method) == reference.format(long, long)
        assert rewritten(":func:`elsewhere`", method) == reference.format("elsewhere", "elsewhere")
        assert rewritten("Example:\n    >>> 1\n\nRaises:", method) == "Examples:\n    >>> 1\n\nRaises:"


def test_a_link_to_nowhere_is_an_error(tmp_path: Path) -> None:
    config = yaml.safe_load((SITE / "mkdocs.yml").read_text("utf-8"))
    assert config["strict"] is True
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text("# Here\n\n[there](there.md)\n", "utf-8")
    kept = {"site_name": "x", "strict": True, "docs_dir": "pages", "validation": config["validation"]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(kept), "utf-8")
    done = CliRunner().invoke(cli, ["build", "-f", str(tmp_path / "mkdocs.yml"), "-d", str(tmp_path / "out")])
    assert done.exit_code != 0
    shutil.rmtree(tmp_path / "pages")
