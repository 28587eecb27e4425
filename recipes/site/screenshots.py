"""Takes pictures of the documentation and of a report, to be looked at, into out/screenshots.

    mkdocs build -f recipes/site/mkdocs.yml
    python -m recipes.site.screenshots

Each page at the width of a desktop, light, and of a phone, dark, from its top to its end, in headless Chromium. Says
which pages are wider than the screen.
"""

from __future__ import annotations

import base64
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from lit_thought.errors import ThoughtError
from lit_thought.files import atomic_file
from recipes.harness import ROOT

SCREENS = {"desktop": (1280, "light"), "phone": (390, "dark")}
LONGEST = 6000
"""Pixels of a page that are shown."""


def screenshots(
    pages: Sequence[str] = (
        "index",
        "tutorials/system_prompt",
        "results/gallery",
        "results/index",
        "theory",
        "command_line/fit",
    ),
    report: str | None = None,
    site: str = "out/site",
    out: str = "out/screenshots",
) -> None:
    """Take them all.

    Args:
        pages: names of the site's pages, without suffix.
        report: a report.html to be taken too.
        site: the folder of the built site.
        out: the folder to write them to.
    """
    files = {name.replace("/", "-"): Path(site) / f"{name}.html" for name in pages}
    files |= {} if report is None else {"report": Path(report)}
    for file in files.values():
        if not file.is_file():
            raise ThoughtError(f"pages: expected pages below {site}, and a report; there is no {file}; build the site.")
    browsing = _helper()
    with tempfile.TemporaryDirectory() as profile:
        opened = browsing.open_browser(Path(profile))
        browser = next(opened)
        for name, file in files.items():
            for screen, (width, scheme) in SCREENS.items():
                browsing.visit(browser, file.resolve(), width, scheme)
                wide, high = browser.execute_script(
                    "return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
                )
                print(f"{name}, {screen}: {'fits' if wide <= width else f'{wide} wide'}", flush=True)
                with atomic_file(Path(out) / f"{name}-{screen}.png") as temporary:
                    temporary.write_bytes(_picture(browser, width, min(high, LONGEST)))
        next(opened, None)


def _picture(browser: Any, width: int, height: int) -> bytes:
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(taken["data"])


def _helper() -> Any:
    """The tests' browser."""
    spec = importlib.util.spec_from_file_location("browsing", ROOT / "tests/helpers/browsing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    jsonargparse.auto_cli(screenshots, as_positional=False)
