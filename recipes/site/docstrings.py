"""Docstrings as the site needs them: roles such as ``:class:`~a.b.C``` become links, examples become code."""

from __future__ import annotations

import re
from typing import Any

from griffe import AliasResolutionError, Class, Extension, Function, Module, NameResolutionError, Object

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")


class Docstrings(Extension):
    """Rewrites every docstring once, as the package is read."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Called when all modules are there, so that names can be looked up."""
        self._visit(pkg)

    def _visit(self, item: Object) -> None:
        if item.docstring is not None:
            item.docstring.value = rewritten(item.docstring.value, item)
        for member in item.members.values():
            if not member.is_alias:
                self._visit(member)  # type: ignore[arg-type]


def rewritten(text: str, item: Object) -> str:
    """A docstring of ``item`` with links for roles and ``Examples:`` for its one example."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return _ROLE.sub(lambda match: link(match[2], short=bool(match[1]), item=item), text)


def link(name: str, short: bool, item: Object) -> str:
    """A reference that is a link where its target is on a page, and code elsewhere."""
    target = name
    if not name.startswith("lit_thought."):
        target = resolved(name, item)
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'


def resolved(name: str, item: Object) -> str:
    """The full name of ``name`` as it is written at ``item``, or ``name`` itself."""
    first, _, rest = name.partition(".")
    scope: Any = item.parent if isinstance(item, Function) and isinstance(item.parent, Class) else item
    try:
        found = scope[first].path if first in scope.members else scope.resolve(first)
    except (NameResolutionError, AliasResolutionError, KeyError):
        return name
    return f"{found}.{rest}" if rest else found
