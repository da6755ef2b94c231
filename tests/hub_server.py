"""A small server that speaks the Hugging Face Hub's HTTP interface, and can be told to fail.

It has what `huggingface_hub` asks for: a repository's commit and files, and files by name, of which
large ones are redirected to another host. It remembers every request and how many bytes it sent.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".parquet")
TOKEN = "hf_of_the_tests"  # noqa: S105  # nobody's

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Fault:
    """What is done instead of answering a request properly."""

    status: int | None = None
    """Status to answer with; None: the proper one, but with `cut_after`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Bytes of the body after which the connection is closed."""
    flip: bool = False
    """Whether the first byte of the body is changed."""


FaultRule = Callable[[str, int], Fault | None]
"""From a request, `GET /path`, and how often it came before, to its fault, or None."""


@dataclass
class Repository:
    """A repository: the files of each commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_private: bool = False
    is_gated: bool = False


class HubServer:
    """Serves repositories on loopback; large files from `localhost` instead of 127.0.0.1."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()
        self.tokens_sent_elsewhere: list[str] = []
        self.fault: FaultRule = lambda _request, _times: None
        self._lock, self._num_commits = threading.Lock(), 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        poll = {"poll_interval": 0.02}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=poll, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def large_files_url(self) -> str:
        return f"http://localhost:{self._server.server_port}"

    def close(self) -> None:
        """End."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def clear(self) -> None:
        """Forget repositories, faults and requests."""
        self.repositories.clear()
        self.requests.clear()
        self.sent.clear()
        self.tokens_sent_elsewhere.clear()
        self.fault = lambda _request, _times: None

    def publish(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        kind: str = "models",
        branch: str = "main",
        is_private: bool = False,
        is_gated: bool = False,
    ) -> str:
        """Commit files to a branch; return the commit."""
        repository = self.repositories.setdefault((kind, repo), Repository())
        repository.is_private, repository.is_gated = is_private, is_gated
        self._num_commits += 1  # no two are alike, as with dates
        state = f"{repo} {branch} {self._num_commits}"
        commit = hashlib.sha1(state.encode(), usedforsecurity=False).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[branch] = commit
        return commit

    def sent_of(self, data: bytes) -> int:
        """Return how many bytes of a large file were sent, over all requests."""
        return self.sent[f"/large/{hashlib.sha256(data).hexdigest()}"]

    def note(self, request: str) -> Fault | None:
        """Remember a request, and return its fault."""
        with self._lock:
            times = self.requests.count(request)
            self.requests.append(request)
        return self.fault(request, times)

    def count(self, path: str, num_bytes: int) -> None:
        """Remember what was sent."""
        with self._lock:
            self.sent[path] += num_bytes


def git_blob(data: bytes) -> str:
    """Return the id that git gives a file's content."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def _is_large(name: str) -> bool:
    return name.endswith(LARGE_SUFFIXES)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_blob(data)}
    if _is_large(name):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return entry


def _tree(files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    below = {name: data for name, data in files.items() if name.startswith(prefix)}
    folders = {
        prefix + "/".join(parts[:depth])
        for parts in (name.removeprefix(prefix).split("/") for name in below)
        for depth in range(1, len(parts))
    }
    found = [_entry(name, data) for name, data in below.items()]
    found += [{"type": "directory", "path": one, "oid": "0" * 40} for one in folders]
    if not recursive:
        found = [one for one in found if "/" not in one["path"].removeprefix(prefix)]
    return sorted(found, key=lambda one: one["path"])


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    """Set by `_handler_of`: the server module makes a handler for each connection itself."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path
        fault = self.hub.note(f"{self.command} {path}") or Fault()
        if fault.status is not None:
            self._send(fault.status, b"{}", dict(fault.headers))
            return
        if path.startswith("/large/"):
            self._send_large(path, fault)
        elif found := _API.match(path):
            self._send_api(found, path[found.end() :], parts.query)
        elif found := _FILE.fullmatch(path):
            kind = "datasets" if found[1] else "models"
            self._send_file(kind, found[2], unquote(found[3]), unquote(found[4]), fault)
        else:
            self._send(404, b"", {})

    def _find(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit and its files; None: an error was sent."""
        repository = self.hub.repositories.get((kind, repo))
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.is_private and not has_token):
            # The hub does not tell strangers which of the two it is.
            status = 404 if has_token else 401
            self._send(status, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if repository.is_gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, repository.commits[commit]

    def _send_api(self, found: re.Match[str], rest: str, query: str) -> None:
        kind, repo, what, revision = found.groups()
        one = self._find(kind, repo, unquote(revision or "main"))
        if one is None:
            return
        commit, files = one
        body: Any = {"id": repo, "sha": commit, "private": False, "tags": [], "downloads": 0}
        body["siblings"] = [{"rfilename": name} for name in files]
        if what == "tree":
            recursive = "recursive=true" in query.lower()
            body = _tree(files, unquote(rest).strip("/"), recursive=recursive)
            if not body:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send_file(self, kind: str, repo: str, revision: str, name: str, fault: Fault) -> None:
        one = self._find(kind, repo, revision)
        if one is None:
            return
        commit, files = one
        if name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        data = files[name]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if _is_large(name):
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            headers["Location"] = f"{self.hub.large_files_url}/large/{digest}"
            self._send(302, b"", headers)
        else:
            self._send_bytes(data, headers | {"ETag": f'"{git_blob(data)}"'}, fault)

    def _send_large(self, path: str, fault: Fault) -> None:
        if "Authorization" in self.headers:
            self.hub.tokens_sent_elsewhere.append(path)
        digest = path.removeprefix("/large/")
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                for data in files.values():
                    if hashlib.sha256(data).hexdigest() == digest:
                        self._send_bytes(data, {"ETag": f'"{digest}"'}, fault)
                        return
        self._send(404, b"", {})

    def _send_bytes(self, data: bytes, headers: dict[str, str], fault: Fault) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, status = 0, 200
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        if fault.flip:
            data = bytes([data[0] ^ 1]) + data[1:]
        self._send(status, data, headers, cut_after=fault.cut_after)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut_after])
        self.hub.count(urlsplit(self.path).path, len(body[:cut_after]))
        if cut_after is not None:
            self.wfile.flush()
            self.close_connection = True


def _handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"hub": hub})
