"""A small hub: what huggingface_hub asks of huggingface.co to make, fill and read model repositories, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_me": "me", "hf_reader": None}
"""Tokens that the hub knows, and whose repositories each may write."""
LICENCES = ("apache-2.0", "mit", "llama3.1", "other")


@dataclass
class Repo:
    """A repository: the files of each commit, and the commit of each branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]

    def commit(self, changes: dict[str, bytes], branch: str = "main") -> str:
        files = {**self.commits[self.branches[branch]], **changes}
        name = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    body: bytes


class Refusal(Exception):
    """An answer that is an error: its status, the hub's word for it, and more of the answer's body."""

    def __init__(self, status: int, code: str | None = None, message: str = "no", **more: str) -> None:
        super().__init__(status, code, message, more)


@dataclass
class Hub:
    """The state of the server, and what it has been asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    trouble: dict[str, int] = field(default_factory=dict)
    """Statuses to answer with, by pattern of ``METHOD path``; 0 breaks the connection off."""

    def sent(self, pattern: str) -> list[Request]:
        return [asked for asked in self.requests if re.search(pattern, f"{asked.method} {asked.path}")]

    def answer(self, asked: Request) -> tuple[dict[str, str], bytes]:
        """Headers and body of the answer."""
        path, query = unquote(urlsplit(asked.path).path), parse_qs(urlsplit(asked.path).query)
        if asked.token is not None and asked.token not in TOKENS:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        for method, pattern, reply in (
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/repos/create", self._create),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>.+))?", self._info),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)/?", self._tree),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>.+)", self._branch),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>.+)", self._preupload),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>.+)", self._commit),
            ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", self._put),
            ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)", self._resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match and asked.method in method.split("|"):
                return reply(asked, query, **match.groupdict())
        raise Refusal(501, message=f"no such thing here: {asked.method} {path}")

    def _find(self, asked: Request, repo: str, write: bool = False) -> Repo:
        found, owner = self.repos.get(repo), TOKENS.get(asked.token or "")
        if found is None or (found.private and owner != repo.split("/")[0]):
            raise Refusal(401 if asked.token is None else 404, "RepoNotFound", "Repository not found")
        if found.gated and asked.token is None:
            raise Refusal(401, "GatedRepo")
        if write and owner != repo.split("/")[0]:
            raise Refusal(401 if asked.token is None else 403, message="You don't have the rights to this")
        return found

    def _files(self, asked: Request, repo: str, rev: str | None) -> tuple[str, dict[str, bytes]]:
        found = self._find(asked, repo)
        commit = found.branches.get(rev or "main", rev or "")
        if commit not in found.commits:
            raise Refusal(404, "RevisionNotFound", "Invalid rev id")
        return commit, found.commits[commit]

    def _validate(self, asked: Request, query: Any) -> Any:
        content = json.loads(asked.body)["content"]
        header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        known = yaml.safe_load(header[1]) if header else {}
        if known.get("license", "mit") not in LICENCES:
            raise Refusal(400, message='"license" must be one of a long list')
        return as_json({"errors": [], "warnings": []})

    def _create(self, asked: Request, query: Any) -> Any:
        wanted = json.loads(asked.body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        if asked.token is None:
            raise Refusal(401)
        if TOKENS[asked.token] != wanted["organization"]:
            raise Refusal(403, message="You don't have the rights to create a model there")
        if repo in self.repos:
            raise Refusal(409, message="You already created this model repo", url=f"{self.url}/{repo}")
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repos[repo] = Repo(private=bool(private))
        return as_json({"url": f"{self.url}/{repo}"})

    def _info(self, asked: Request, query: Any, repo: str, rev: str | None) -> Any:
        commit, files = self._files(asked, repo, rev)
        header = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), re.DOTALL)
        info = {"id": repo, "sha": commit, "private": self.repos[repo].private}
        return as_json({**info, **({"cardData": yaml.safe_load(header[1])} if header else {})})

    def _tree(self, asked: Request, query: Any, repo: str, rev: str) -> Any:
        _, files = self._files(asked, repo, rev)
        return as_json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
        )

    def _branch(self, asked: Request, query: Any, repo: str, rev: str) -> Any:
        found = self._find(asked, repo, write=True)
        if rev in found.branches:
            raise Refusal(409, message="Reference already exists")
        found.branches[rev] = found.branches["main"]
        return as_json({})

    def _preupload(self, asked: Request, query: Any, repo: str, rev: str) -> Any:
        self._files(asked, repo, rev)
        self._find(asked, repo, write="create_pr" not in query)
        return as_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(asked.body)["files"]
                ]
            }
        )

    def _batch(self, asked: Request, query: Any, repo: str) -> Any:
        self._find(asked, repo)
        wanted = json.loads(asked.body)["objects"]
        return as_json(
            {
                "transfer": "basic",
                "objects": [
                    {**item, "actions": {"upload": {"href": f"{self.url}/large/{item['oid']}"}}} for item in wanted
                ],
            }
        )

    def _put(self, asked: Request, query: Any, oid: str) -> Any:
        assert hashlib.sha256(asked.body).hexdigest() == oid
        self.large[oid] = asked.body
        return as_json({})

    def _commit(self, asked: Request, query: Any, repo: str, rev: str) -> Any:
        found = self._find(asked, repo, write="create_pr" not in query)
        _, *lines = [json.loads(line) for line in asked.body.splitlines()]
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                changes[value["path"]] = self.large[value["oid"]]
            else:
                assert line["key"] == "file"
                changes[value["path"]] = base64.b64decode(value["content"])
        branch = rev
        if "create_pr" in query:
            branch = "refs/pr/1"
            found.branches[branch] = found.branches[rev]
        commit = found.commit(changes, branch)
        reply = {"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit}
        return as_json({**reply, "pullRequestUrl": f"{self.url}/{repo}/discussions/1"})

    def _resolve(self, asked: Request, query: Any, repo: str, rev: str, file: str) -> Any:
        commit, files = self._files(asked, repo, rev)
        if file not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha1(files[file]).hexdigest()
        return {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[file]


def as_json(value: Any) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at its ``url`` as long as the block lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            asked = Request(self.command, self.path, token, body)
            hub.requests.append(asked)
            status, headers, content = 200, {}, b""
            try:
                for pattern, trouble in hub.trouble.items():
                    if re.search(pattern, f"{self.command} {self.path}"):
                        if not trouble:
                            self.close_connection = True
                            return
                        raise Refusal(trouble)
                headers, content = hub.answer(asked)
            except Refusal as refusal:
                status, code, message, more = refusal.args
                headers, content = as_json({"error": message, "errors": [{"message": message}], **more})
                headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
