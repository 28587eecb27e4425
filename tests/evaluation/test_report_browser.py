"""The report in a real browser, headless Chromium: on a phone and on a desk, light and dark."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from browsing import visit
from report_run import SCRIPT, make_run

from lit_thought.evaluation.report import write_report

webdriver = pytest.importorskip("selenium.webdriver")

_VIEWS = [(width, scheme) for width in (375, 1280) for scheme in ("light", "dark")]
_HEADINGS = {
    *("What was asked", "Results", "Before and after", "By block", "Side effects", "The fit"),
    *("Time and memory", "Settings and versions", "Plain, instructed and patched", "Accuracy by step"),
    *("Error left by block", "Effective rank by block", "Spectrum of the patch", "Time by phase"),
}
# for each visible element with text of its own: text, colour, and the colours of what lies behind it, nearest first
_COLOURS = """
const found = [];
for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("");
    if (!text || !element.getClientRects().length || element.closest(".hidden")) continue;
    const style = getComputedStyle(element), behind = [];
    for (let e = element; e; e = e.parentElement) behind.push(getComputedStyle(e).backgroundColor);
    found.push([text, element instanceof SVGElement ? style.fill : style.color, behind]);
}
return found;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("run") / "adapter")
    write_report(run)
    return run / "report.html"


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two CSS colours without transparency."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_checks_see_what_they_look_for(browser: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<script>console.error("no")</script><img src="other.png"><p style="width: 900px">wide', "utf-8")
    console, asked = visit(browser, bad, width=375)
    assert any("no" in message for message in console)
    assert asked == [bad.as_uri(), (tmp_path / "other.png").as_uri()]
    assert browser.execute_script("return document.documentElement.scrollWidth") > 375
    assert contrast("rgb(255, 255, 255)", "rgb(0, 0, 0)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)  # known to fall short


@pytest.mark.parametrize(("width", "scheme"), _VIEWS)
def test_page(browser: Any, page: Path, width: int, scheme: str) -> None:
    console, asked = visit(browser, page, width, scheme)
    assert console == []
    assert [url for url in asked if url != "data:,"] == [page.as_uri()]
    # nothing wider than the window, even with all details open
    browser.execute_script("for (const e of document.querySelectorAll('details')) e.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.innerWidth") == width
    headings = browser.execute_script("return [...document.querySelectorAll('h1, h2, h3')].map(e => e.innerText)")
    assert set(headings) >= _HEADINGS
    colours = browser.execute_script(_COLOURS)
    assert len(colours) > 200
    for text, colour, behind in colours:
        background = next(value for value in behind if value != "rgba(0, 0, 0, 0)")
        assert contrast(colour, background) >= 4.5, f"{text!r}: {colour} on {background}"
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (contrast(paper, "rgb(0, 0, 0)") > 10) == (scheme == "light")


def test_text_of_others_stays_text(browser: Any, page: Path) -> None:
    visit(browser, page)
    assert browser.execute_script("return window.hit === undefined")
    assert browser.execute_script("return document.querySelectorAll('script, img, [onerror], [onload]').length") == 0
    assert SCRIPT in browser.execute_script("return document.querySelector('.instruction').innerText")
    assert browser.execute_script("return document.querySelector('.samples').innerText").count(SCRIPT) >= 3


def test_tables_scroll_in_their_own_box_and_figures_are_named(browser: Any, page: Path) -> None:
    visit(browser, page, width=375)
    browser.execute_script("for (const e of document.querySelectorAll('details')) e.open = true")
    outside = "return [...document.querySelectorAll('table')].filter(e => !e.closest('.scroll')).map(e => e.className)"
    assert browser.execute_script(outside) == ["samples"]  # whose rows become blocks on a phone
    wide = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.execute_script(wide) > 0
    labels = browser.execute_script("return [...document.querySelectorAll('svg')].map(e => e.ariaLabel)")
    assert len(labels) == 6
    assert all(labels)
    names = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(names) == len(set(names))


def test_without_an_evaluation(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "adapter", history=[], diagnostics={}, seconds={}, memory=None, settings={})
    shutil.rmtree(run / "evaluation")
    write_report(run)
    console, asked = visit(browser, run / "report.html", width=375, scheme="dark")
    assert console == []
    assert len(asked) == 1
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
    assert "lit-thought evaluate" in browser.execute_script("return document.body.innerText")
