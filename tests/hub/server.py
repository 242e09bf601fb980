"""A Hub on the loopback address, with its commits in memory: what huggingface_hub asks of models, and no more."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_loopback"
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
EMPTY = "0" * 40


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Every commit is a whole tree of path -> bytes."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {EMPTY: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": EMPTY})
    messages: list[str] = field(default_factory=list)

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def commit(self, branch: str, tree: dict[str, bytes], message: str) -> str:
        names = "".join(f"{path}{blob_id(content)}" for path, content in sorted(tree.items()))
        commit = hashlib.sha1(f"{self.branches.get(branch, EMPTY)}{message}{names}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = tree, commit
        self.messages.append(message)
        return commit


class Hub(ThreadingHTTPServer):
    """The server and what it has been told.

    Args:
        cards: every README.md that was sent for validation.
        requests: method and path of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def uploads(self) -> list[str]:
        """What would have changed something."""
        return [request for request in self.requests if re.match(r"PUT|POST .*/(create|commit|branch)\b", request)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.find(revision)]


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_request(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        body = self._read_body()
        self.server.requests.append(f"{self.command} {path}")
        for methods, pattern, name in self.ROUTES:
            if self.command in methods.split("|") and (match := re.fullmatch(pattern, path)):
                values = {key: urllib.parse.unquote(value) for key, value in match.groupdict().items() if value}
                if name != "lfs_put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._answer({"error": "Invalid username or password."}, 401)
                return getattr(self, name)(body, **values)
        self._answer({"error": "not found"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._answer({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def _find(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        """A repository and a commit of it; without one, the answer is given."""
        repository = self.server.repositories.get(repo)
        commit = repository and repository.find(revision)
        if commit:
            return repository, commit
        self._missing("RevisionNotFound" if repository else "RepoNotFound")
        return None

    def whoami(self, body: bytes) -> None:
        self._answer({"type": "user", "name": USER, "orgs": []})

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo = f"{request['organization'] or USER}/{request['name']}"
        exists = repo in self.server.repositories
        if not exists:
            private = request.get("private") or request.get("visibility") == "private"
            self.server.repositories[repo] = Repository(private)
        self._answer({"url": f"{self.server.url}/{repo}"}, 409 if exists else 200)

    def validate(self, body: bytes) -> None:
        card = json.loads(body)["content"]
        self.server.cards.append(card)
        errors = [{"message": "no such license"}] if "license: no-license" in card else []
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        tree = found[0].commits[found[1]]
        files = []
        for file in json.loads(body)["files"]:
            path, content = file["path"], tree.get(file["path"])
            is_lfs = path.endswith(LFS_SUFFIXES)
            oid = content and (hashlib.sha256(content).hexdigest() if is_lfs else blob_id(content))
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.server.blobs:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self._answer(b"")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        repository, parent = found
        tree, summary = dict(repository.commits[parent]), ""
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                tree[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        pull_request = "create_pr=1" in self.path
        commit = repository.commit("refs/pr/1" if pull_request else revision, tree, summary)
        answer = {"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/1"
        self._answer(answer)

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._find(repo, "main")) is not None:
            exists = revision in found[0].branches
            found[0].branches.setdefault(revision, found[1])
            self._answer({}, 409 if exists else 200)

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if (found := self._find(repo, revision)) is not None:
            repository, commit = found
            siblings = [{"rfilename": path} for path in repository.commits[commit]]
            self._answer({"id": repo, "sha": commit, "private": repository.private, "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str, path: str = "") -> None:
        if (found := self._find(repo, revision)) is None:
            return
        entries = []
        for name, content in found[0].commits[found[1]].items():
            if name.startswith(f"{path}/" if path else ""):
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
                if name.endswith(LFS_SUFFIXES):
                    entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                entries.append(entry)
        if path and not entries:
            return self._missing("EntryNotFound")
        self._answer(entries)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        content = found[0].commits[found[1]].get(path)
        headers = {"X-Repo-Commit": found[1]}
        if content is None:
            return self._missing("EntryNotFound", headers)
        headers["ETag"] = f'"{blob_id(content)}"'
        if path.endswith(LFS_SUFFIXES):
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers |= {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        self._answer(content, headers=headers)
