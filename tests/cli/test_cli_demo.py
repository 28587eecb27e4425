"""``lit-thought demo``: what its server answers, and its page in a browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import open_browser
from fits import TOKENIZER, make_patch, readable
from models import make_model

from lit_thought.cli import main
from lit_thought.cli.server import DemoServer
from lit_thought.patch.chat import Chat

INSTRUCTION = "You are a pirate. Talk like a <b>pirate</b>."


@pytest.fixture(scope="module")
def chat() -> Chat:
    model = readable(make_model())
    patch = make_patch(model, instruction=INSTRUCTION, template="chat")
    return patch.chat(model, TOKENIZER, max_new_tokens=8)


@pytest.fixture
def server(chat: Chat, tmp_path: Path) -> Iterator[DemoServer]:
    chat.new()
    chat.scale = 1
    with DemoServer(("127.0.0.1", 0), tmp_path) as running:
        running.chat = chat
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def request(server: DemoServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=120)  # type: ignore[arg-type]
    content = body if isinstance(body, str) else json.dumps(body)
    own = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method, path, content if method == "POST" else None, own)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_answers_come_as_they_are_written(server: DemoServer) -> None:
    status, body = request(server, "POST", "/ask", {"message": "fox", "scale": 0.5})
    lines = [json.loads(line) for line in body.splitlines()]
    assert status == 200
    assert len(lines) > 8
    (answers,) = server.chat.history
    assert answers.scale == 0.5
    names = ["plain", "instructed", "patched × 0.5"]
    assert [column["name"] for column in lines[-1]["columns"]] == names
    for column, (_, answer) in zip(lines[-1]["columns"], answers.columns(), strict=True):
        assert "".join(text for _, text in column["pieces"]) == answer.text
        assert column["tokens"] == answer.tokens
    request(server, "POST", "/new", {})
    assert server.chat.history == []


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/other", None, {}, 404),
        ("GET", "/report", None, {}, 404),  # none is written yet
        ("POST", "/other", {}, {}, 404),
        ("POST", "/ask", "{", {}, 400),
        ("POST", "/ask", "[" * 100_000, {}, 400),
        ("POST", "/ask", {}, {"Content_Length": "9999999"}, 400),
        ("POST", "/ask", {}, {"Content_Type": "text/plain"}, 415),  # a form of another site
        ("POST", "/ask", {}, {"Host": "evil.example:80"}, 403),
        ("GET", "/", None, {"Host": "evil.example"}, 403),
        ("PUT", "/ask", {}, {}, 501),
    ],
)
def test_refused(method: str, path: str, body: Any, headers: dict[str, str], status: int, server: DemoServer) -> None:
    assert request(server, method, path, body, **headers)[0] == status
    assert server.chat.history == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "localhost:80", "[::1]:8000"])
def test_this_machine_by_any_of_its_names(host: str, server: DemoServer) -> None:
    """Browsers leave port 80 out."""
    assert request(server, "GET", "/", None, Host=host)[0] == 200


@pytest.mark.parametrize("values", [{"message": " "}, {}, {"message": "fox", "scale": "x"}, {"message": ["fox"]}, [1]])
def test_a_message_that_cannot_be_asked_is_explained(values: Any, server: DemoServer) -> None:
    status, body = request(server, "POST", "/ask", values)
    assert status == 200
    assert re.match(r'{"error": "(message|scale) must be', body)
    assert server.chat.history == []


@pytest.mark.slow
def test_the_page(server: DemoServer, tmp_path: Path) -> None:
    server.report.write_text("<title>the report</title>", encoding="utf-8")
    for browser in open_browser(tmp_path / "profile"):
        browser.get(server.address)
        assert not browser.find_element("id", "instruction").get_attribute("hidden")
        assert browser.find_element("css selector", "#instruction pre").get_attribute("textContent") == INSTRUCTION
        browser.execute_script(
            "const s = document.getElementById('scale'); s.value = 0; s.dispatchEvent(new Event('input'))"
        )
        browser.find_element("id", "message").send_keys("fox\n")
        ui = pytest.importorskip("selenium.webdriver.support.ui")
        ui.WebDriverWait(browser, 120).until(
            lambda it: server.chat.history and it.find_element("css selector", "[type=submit]").is_enabled()
        )
        (answers,) = server.chat.history
        shown = [part.get_attribute("textContent") for part in browser.find_elements("css selector", "section div")]
        assert shown == [answer.text for _, answer in answers.columns()]
        assert answers.scale == 0
        for width, columns in ((1200, 3), (360, 1)):
            screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            lefts = {part.rect["x"] for part in browser.find_elements("tag name", "section")}
            assert len(lefts) == columns
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.get_log("browser") == []
        browser.find_element("css selector", "#report a").click()
        assert browser.title == "the report"


@pytest.mark.slow
def test_the_command(files: Path) -> None:
    from command_line import fit_arguments

    main([*fit_arguments(files), "--quiet", "--verdict=0"])
    command = [sys.executable, "-m", "lit_thought", "demo", str(files / "adapter"), f"--model={files / 'model'}"]
    with subprocess.Popen([*command, "--port=0"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = next(line for line in process.stderr if "shows the demo" in line)
        place = re.match(r"http://127\.0\.0\.1:(\d+)/ shows the demo", told)
        assert place is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(place[1]), timeout=120)
        connection.request("GET", "/")
        assert "One question, three answers" in connection.getresponse().read().decode()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(120) == 0


def test_a_place_that_is_taken(files: Path, server: DemoServer, capsys: pytest.CaptureFixture[str]) -> None:
    make_patch(readable(make_model())).save_adapter(files / "adapter")
    for port, message in ((server.server_address[1], "cannot be served at"), (99999, "from 0 to 65535")):
        with pytest.raises(SystemExit, match="2"):
            main(["demo", str(files / "adapter"), f"--port={port}"])
        assert message in capsys.readouterr().err


def test_an_answer_that_breaks_off_is_told(server: DemoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Chat, message: str, watch: Any = None) -> Any:
        raise RuntimeError("CUDA error")

    _, body = request(server, "POST", "/ask", {"message": "fox"})
    assert [line.get("done") for line in map(json.loads, body.splitlines())][-1] is True
    monkeypatch.setattr(Chat, "ask", broken)
    monkeypatch.setattr(DemoServer, "handle_error", lambda *args: None)  # it prints a stack trace
    _, body = request(server, "POST", "/ask", {"message": "fox"})
    assert [json.loads(line) for line in body.splitlines()] == [{"error": "RuntimeError: CUDA error"}]
    assert not server.chat.history[1:]


def test_a_report_is_the_adapter_s_own_and_runs_no_scripts(server: DemoServer, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}.html"
    outside.write_text("of another", encoding="utf-8")
    server.report.symlink_to(outside)
    assert request(server, "GET", "/report")[0] == 404
    server.report.unlink()
    server.report.write_text("mine", encoding="utf-8")
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=120)  # type: ignore[arg-type]
    connection.request("GET", "/report")
    answer = connection.getresponse()
    policy = answer.getheader("Content-Security-Policy") or ""
    assert answer.read() == b"mine"
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_a_host_that_is_none_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_patch(readable(make_model())).save_adapter(files / "adapter")
    with pytest.raises(SystemExit, match=r"[12]"):  # where names are looked up, it is the network's
        main(["demo", str(files / "adapter"), "--host=no.such.host.invalid", "--port=0"])
    assert re.search(r"--host no\.such\.host\.invalid.*Correct the host", capsys.readouterr().err)


def test_the_sixth_version_of_addresses(chat: Chat, tmp_path: Path) -> None:
    try:
        server = DemoServer(("::1", 0), tmp_path)
    except OSError as error:  # a machine without it
        pytest.skip(str(error))
    with server:
        assert re.fullmatch(r"http://\[::1\]:\d+/", server.address)
        assert server.local
