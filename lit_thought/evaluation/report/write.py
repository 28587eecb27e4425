"""Writing a report: HTML, Markdown, JSON and the results in the adapter's card, all of them or none."""

from __future__ import annotations

import importlib
import json
import os
from contextlib import ExitStack
from typing import Any

from lit_thought.errors import ThoughtError
from lit_thought.evaluation.report.content import gather
from lit_thought.files import atomic_file, expanded
from lit_thought.patch.adapter import read_adapter
from lit_thought.patch.card import CARD, model_card, read_card, with_results

__all__ = ["write_report"]


def write_report(
    adapter: str | os.PathLike[str],
    evaluation: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    samples: int = 20,
) -> dict[str, Any]:
    """Write ``report.html``, ``report.md`` and ``report.json`` of a fit, and its results into the adapter's README.md.

    The HTML is one file that needs no network and runs no scripts. Where one file cannot be written, none is.

    Args:
        adapter: adapter folder of a fit.
        evaluation: folder that ``lit-thought evaluate --out`` wrote; ``adapter``/evaluation, if it is there, when left
            out.
        out: folder for the three files; ``adapter`` when left out.
        samples: how many of the evaluation's pairs to show.

    Returns:
        What ``report.json`` holds (see :func:`~lit_thought.evaluation.report.content.gather`).

    Raises:
        ThoughtError: for a damaged or foreign evaluation, a place that cannot be written, or where jinja2 or matplotlib
            is missing.
        PatchError: when ``adapter`` is not an adapter folder.
    """
    _require("jinja2", "matplotlib")
    from lit_thought.evaluation.report.render import render_html, render_markdown

    run, folder = expanded(adapter, "adapter"), expanded(adapter if out is None else out, "out")
    if folder.exists() and not folder.is_dir():
        raise ThoughtError(f"out={str(out)!r} is a file; expected a folder. Choose another path.")
    content = gather(run, evaluation, samples)
    text = read_card(run)
    text = with_results(model_card(read_adapter(run)) if text is None else text, content["evaluation"])
    with ExitStack() as stack:
        names = [folder / f"report.{suffix}" for suffix in ("html", "md", "json")]
        html, markdown, data, card = (stack.enter_context(atomic_file(name)) for name in (*names, run / CARD))
        html.write_text(render_html(content), encoding="utf-8")
        markdown.write_text(render_markdown(content), encoding="utf-8")
        data.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        card.write_text(text, encoding="utf-8")
    return content


def _require(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ThoughtError(f"a report needs {package}. Install it: pip install 'lit-thought[report]'") from error
