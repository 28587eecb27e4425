"""A finished fit and its evaluation as one HTML page, Markdown and JSON (``lit-thought report``)."""

from __future__ import annotations

from lit_thought.evaluation.report.content import gather
from lit_thought.evaluation.report.write import write_report

__all__ = ["gather", "write_report"]
