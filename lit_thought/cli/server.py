"""The small web server of ``lit-thought demo``."""

from __future__ import annotations

import html
import ipaddress
import json
import re
import socket
import threading
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from lit_thought.errors import ThoughtError
from lit_thought.files import is_own_file
from lit_thought.patch.chat import Answers, Chat

__all__ = ["DemoServer"]

_MOST_BYTES = 1_000_000
"""Of a request."""
_REPORT = "report.html"
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""No scripts: the report may be anyone's."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class DemoServer(ThreadingHTTPServer):
    """Serves one conversation with a patch to a web page, one message at a time.

    Args:
        place: host and port.
        folder: the adapter's, whose report is shown.

    Attributes:
        chat: the conversation.
        address: of the page.
    """

    daemon_threads = True
    chat: Chat

    def __init__(self, place: tuple[str, int], folder: Path) -> None:
        self.report, self.turn = folder / _REPORT, threading.Lock()
        if ":" in place[0]:
            self.address_family = socket.AF_INET6
        super().__init__(place, _Handler)
        host, port = str(self.server_address[0]), self.server_address[1]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        self.local = _is_local(host)

    def page(self) -> str:
        """The web page."""
        text = files("lit_thought.cli").joinpath("pages/demo.html").read_text(encoding="utf-8")
        chat = self.chat
        facts = {
            "instruction": chat.instruction,
            "scale": chat.scale,
            "report": is_own_file(self.report),
            "patch": repr(chat.patch),
            "history": [_values(answers) for answers in chat.history],
        }
        return text.replace("{{ facts }}", html.escape(json.dumps(facts), quote=True))


class _Handler(BaseHTTPRequestHandler):
    """``GET /`` and ``/report``; ``POST /ask`` with a message and a scale, answered by a JSON object a line as the
    answers are written; ``POST /new`` starts over."""

    server: DemoServer
    server_version, sys_version = "lit-thought", ""
    protocol_version = "HTTP/1.0"  # a body ends with its connection

    def do_GET(self) -> None:
        if not self._is_for_us():
            return
        if self.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page(), policy=_POLICY)
        elif self.path == "/report" and is_own_file(self.server.report):
            text = self.server.report.read_text(encoding="utf-8")
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", text, policy=_REPORT_POLICY)
        else:
            self._fail(HTTPStatus.NOT_FOUND, "There is no such page.")

    def do_POST(self) -> None:
        # JSON is what no form of another site can send
        if not self._is_for_us():
            return
        if self.headers.get("Content-Type", "").partition(";")[0] != "application/json":
            self._fail(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Expected application/json.")
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= _MOST_BYTES:
                raise ValueError
            values = json.loads(self.rfile.read(length))
            act = {"/ask": self._ask, "/new": self._new}[self.path]
        except KeyError:
            self._fail(HTTPStatus.NOT_FOUND, "There is no such page.")
            return
        except (ValueError, RecursionError):
            self._fail(HTTPStatus.BAD_REQUEST, f"Expected a JSON object of at most {_MOST_BYTES:,} bytes.")
            return
        with self.server.turn:
            act(values if isinstance(values, dict) else {})

    def log_message(self, format: str, *args: Any) -> None:
        """The console is for messages to the user."""

    def _ask(self, values: dict[str, Any]) -> None:
        chat = self.server.chat
        self._head(HTTPStatus.OK, "application/x-ndjson")
        try:
            chat.scale = values.get("scale", chat.scale)
            answers = chat.ask(values.get("message", ""), self._show)
            self._line({**_values(answers), "done": True})
        except ThoughtError as error:
            self._line({"error": str(error)})
        except ConnectionError:  # the reader has gone; what was said is not kept
            return
        except Exception as error:
            self._line({"error": f"{type(error).__name__}: {error}"})
            raise

    def _new(self, values: dict[str, Any]) -> None:
        self.server.chat.new()
        self._send(HTTPStatus.OK, "application/json", "{}")

    def _show(self, answers: Answers) -> None:
        self._line(_values(answers))

    def _line(self, values: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(values).encode() + b"\n")
        self.wfile.flush()

    def _is_for_us(self) -> bool:
        """Whether the request names this server, rather than a site whose name was made to lead here."""
        host = re.sub(r":\d*$", "", self.headers.get("Host", "")).strip("[]")
        fits = not self.server.local or host == "localhost" or _is_local(host)
        if not fits:
            self._fail(HTTPStatus.FORBIDDEN, "This page is served to this machine alone.")
        return fits

    def _fail(self, status: HTTPStatus, text: str) -> None:
        self._send(status, "application/json", json.dumps({"error": text}))

    def _send(self, status: HTTPStatus, kind: str, text: str, policy: str | None = None) -> None:
        body = text.encode()
        with suppress(ConnectionError):
            self._head(
                status,
                kind,
                ("Content-Length", str(len(body))),
                *([("Content-Security-Policy", policy)] if policy is not None else []),
            )
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Cache-Control", "no-store"), *headers):
            self.send_header(name, value)
        self.end_headers()


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _values(answers: Answers) -> dict[str, Any]:
    """The answers, with what is marked in them, as the page reads them."""
    columns = [
        {"name": name, "tokens": answer.tokens, "pieces": answers.pieces(answer)} for name, answer in answers.columns()
    ]
    return {"message": answers.message, "scale": answers.scale, "columns": columns}
