"""
A Hugging Face Hub on the loopback interface: what the Hub client 2.4 asks of it to create, push, list and download.

Repositories live in memory. Constants of the client (`HF_ENDPOINT`, `HF_HOME`, offline mode) are read when it is
imported, so the code under test runs in a process of its own:

```python
with HubServer(token="hf_secret", role="write") as hub, client_process(hub.environment(home), log) as call:
    hub.fail(r"POST .*/commit/", status=503, times=2)
    call(push, "user/repo")  # a function of the test module, because an `HfApi` made here has another endpoint
    assert hub.files("dataset", "user/repo").keys() == {".gitattributes", "README.md"}
```
"""

import base64
import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit


_LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".parquet", ".pt", ".safetensors")
_LFS_BYTES = 10_000_000


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        """Hash of the content: SHA-256 of a large file, git's of another."""
        return self.sha256 if self.lfs else _git_hash(self.content)

    def entry(self, path: str) -> dict[str, Any]:
        """The file as `tree` and `paths-info` list it."""
        if not self.lfs:
            return {"type": "file", "path": path, "size": len(self.content), "oid": self.etag}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(pointer)}
        oid = _git_hash(pointer.encode())
        return {"type": "file", "path": path, "size": len(self.content), "oid": oid, "lfs": lfs}


@dataclass(frozen=True)
class Commit:
    """A commit with all files of its tree."""

    sha: str
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    """A repository: the commits in the order they were made, and where its branches point."""

    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def commit(self, message: str, files: dict[str, File], branch: str) -> Commit:
        sha = hashlib.sha1(f"{message}{sorted(files)}{len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(sha, message, files))
        self.branches[branch] = self.commits[-1]
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        known = {**{commit.sha: commit for commit in self.commits}, **self.tags, **self.branches}
        if revision not in known:
            raise _Refusal(404, "Revision not found", "RevisionNotFound")
        return known[revision]


@dataclass
class Fault:
    """Requests that are to fail, see [`HubServer.fail`]."""

    pattern: str
    status: int | None
    times: int
    applied: bool


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **details: str):
        super().__init__(message)
        self.details = {"error": message, **details}
        # The headers by which the client tells a missing repository, revision and file apart
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status, self.headers = status, {name: value for name, value in headers.items() if value is not None}


@dataclass
class _Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    role: str | None

    def json(self) -> Any:
        return json.loads(self.body)


_REPO = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
_FILES = r"/((?P<kind>dataset)s/)?(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", "_whoami"),
    ("POST", "/api/repos/create", "_create"),
    ("POST", "/api/validate-yaml", "_validate_yaml"),
    ("GET", rf"{_REPO}(/revision/(?P<revision>[^/]+))?", "_info"),
    ("GET", rf"{_REPO}/auth-check(?P<write>/write)?", "_auth_check"),
    ("GET", rf"{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "_tree"),
    ("POST", rf"{_REPO}/paths-info/(?P<revision>[^/]+)", "_paths_info"),
    ("GET", rf"{_REPO}/refs", "_refs"),
    ("POST", rf"{_REPO}/branch/(?P<revision>[^/]+)", "_branch"),
    ("POST", rf"{_REPO}/tag/(?P<revision>[^/]+)", "_tag"),
    ("POST", rf"{_REPO}/preupload/(?P<revision>[^/]+)", "_preupload"),
    ("POST", rf"{_REPO}/commit/(?P<revision>[^/]+)", "_commit"),
    ("POST", rf"{_FILES}\.git/info/lfs/objects/batch", "_lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "_lfs_put"),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", "_lfs_verify"),
    ("GET", rf"{_FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "_resolve"),
)


class HubServer:
    """
    Hub of one user, served from a thread while the context is open.

    Args:
        token (`str`):
            Token that is accepted. More may be put into `tokens`.
        role (`str`):
            What it may do: `"read"`, `"write"`, or `"fineGrained"`, which may write too and does not say where.
        user (`str`):
            Name of the user, and the namespace of the repositories.

    Attributes:
        endpoint (`str`): Value for `HF_ENDPOINT`.
        tokens (`dict[str, str]`): Roles by token.
        repositories (`dict[tuple[str, str], Repository]`): Repositories by type (`"model"`, `"dataset"`) and id.
        requests (`list[str]`): Requests so far, as `"METHOD /path"`. Clear it to see those of the next step.
        faults (`list[Fault]`): What [`fail`] asked for.
    """

    def __init__(self, token: str = "hf_loopback", role: str = "write", user: str = "user"):
        self.tokens = {token: role}
        self.user = user
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self._objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self._lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, pattern: str, *, status: int | None = 503, times: int = 1, applied: bool = False) -> None:
        """
        Makes the next requests fail.

        Args:
            pattern (`str`):
                Regular expression searched in `"METHOD /path"`.
            status (`int` or `None`):
                Status of the answer; `None` closes the connection without one.
            times (`int`):
                Number of matching requests that fail.
            applied (`bool`):
                Whether the request takes effect all the same, as when only its answer is lost.
        """
        self.faults.append(Fault(pattern, status, times, applied))

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a repository by path."""
        return {path: file.content for path, file in self.repositories[kind, name].at(revision).files.items()}

    def environment(self, home: str | os.PathLike, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Environment of a client of this server: no other Hub, no cache and no login but those in `home`."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": next(iter(self.tokens)) if token is None else token,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def answer(self, request: _Request) -> tuple[int | None, dict[str, str], bytes]:
        """Status (`None`: no answer), headers and body of the answer to a request."""
        line = f"{request.method} {request.path}"
        with self._lock:
            self.requests.append(line)
            fault = next((f for f in self.faults if f.times and re.search(f.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
                if fault.applied:
                    self._route(request)
                return fault.status, {}, b'{"error": "injected"}'
            try:
                return self._route(request)
            except _Refusal as refusal:
                return refusal.status, refusal.headers, json.dumps(refusal.details).encode()

    def _route(self, request: _Request) -> tuple[int, dict[str, str], bytes]:
        authorization = request.headers.get("Authorization")
        if authorization is not None:
            request.role = self.tokens.get(authorization.removeprefix("Bearer "))
            if request.role is None:
                raise _Refusal(401, "Invalid credentials in Authorization header")
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and route_method == method:
                found = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                if "name" in found:
                    found["repo"] = self._repository(request, found.setdefault("kind", "model"), found["name"])
                answer = getattr(self, handler)(request, **found)
                return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        raise _Refusal(404, f"The loopback Hub does not know {request.method} {request.path}")

    def _repository(self, request: _Request, kind: str, name: str) -> Repository:
        repo = self.repositories.get((kind, name))
        if repo is None or (repo.private and request.role is None):
            raise _Refusal(401 if request.role is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _require_write(self, request: _Request) -> None:
        if request.role is None:
            raise _Refusal(401, "Invalid username or password.")
        if request.role == "read":
            raise _Refusal(403, "You must use a write token to upload to a repository.")

    def _whoami(self, request):
        if request.role is None:
            raise _Refusal(401, "Invalid username or password.")
        token = {"displayName": "loopback", "role": request.role}
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}

    def _create(self, request):
        self._require_write(request)
        asked = request.json()
        namespace, kind = asked.get("organization") or self.user, asked.get("type", "model")
        if namespace != self.user:
            raise _Refusal(403, f"You don't have the rights to create a {kind} under the namespace {namespace}")
        name = f"{namespace}/{asked['name']}"
        if (kind, name) in self.repositories:
            raise _Refusal(409, f"You already created this {kind} repo", url=self._url(kind, name))
        repo = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("initial commit", {".gitattributes": File(b"", lfs=False)}, "main")
        self.repositories[kind, name] = repo
        return {"url": self._url(kind, name), "name": name}

    def _url(self, kind: str, name: str) -> str:
        return f"{self.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"

    def _validate_yaml(self, request):
        return {"errors": [], "warnings": []}

    def _info(self, request, kind, name, repo, revision="main"):
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": name, "sha": commit.sha, "private": repo.private, "tags": [], "siblings": siblings}

    def _auth_check(self, request, kind, name, repo, write=None):
        if write:
            self._require_write(request)
        return {}

    def _entries(self, commit: Commit) -> dict[str, dict[str, Any]]:
        entries = {path: file.entry(path) for path, file in commit.files.items()}
        for path in commit.files:
            for parent in list(Path(path).parents)[:-1]:
                folder = parent.as_posix()
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": _git_hash(folder.encode())}
        return dict(sorted(entries.items()))

    def _tree(self, request, kind, name, repo, revision, path=""):
        commit = repo.at(revision)
        entries = self._entries(commit)
        if path and path not in entries:
            raise _Refusal(404, "Entry not found", "EntryNotFound", commit.sha)
        if request.query.get("recursive", ["False"])[0].lower() != "true":
            return [entry for entry in entries.values() if Path(entry["path"]).parent == Path(path)]
        return [entry for entry in entries.values() if not path or entry["path"].startswith(f"{path}/")]

    def _paths_info(self, request, kind, name, repo, revision):
        form = parse_qs(request.body.decode())
        entries = self._entries(repo.at(revision))
        return [entries[path] for path in form.get("paths", []) if path in entries]

    def _branch(self, request, kind, name, repo, revision):
        self._require_write(request)
        if revision in repo.branches:
            raise _Refusal(409, f"Reference {revision} already exists")
        repo.branches[revision] = repo.at((request.json() or {}).get("startingPoint", "main"))
        return {}

    def _tag(self, request, kind, name, repo, revision):
        self._require_write(request)
        tag = request.json()["tag"]
        if tag in repo.tags:
            raise _Refusal(409, f"Tag {tag} already exists")
        repo.tags[tag] = repo.at(revision)
        return {}

    def _refs(self, request, kind, name, repo):
        def listed(folder, refs):
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.sha} for n, c in refs.items()]

        return {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []}

    def _preupload(self, request, kind, name, repo, revision):
        self._require_write(request)
        held = repo.at(revision).files
        files = []
        for asked in request.json()["files"]:
            path = asked["path"]
            lfs = path.endswith(_LFS_SUFFIXES) or asked["size"] > _LFS_BYTES
            oid = held[path].etag if path in held else None
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _lfs_batch(self, request, kind, name, repo):
        self._require_write(request)
        objects = request.json()["objects"]
        for item in objects:
            if item["oid"] not in self._objects:
                href = f"{self.endpoint}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, request, oid):
        # As to a signed address, without the token
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise _Refusal(400, "The content does not have this hash")
        self._objects[oid] = request.body
        return 200, {}, b""

    def _lfs_verify(self, request, oid):
        if len(self._objects.get(oid, b"")) != request.json()["size"]:
            raise _Refusal(404, "The object was not uploaded")
        return {}

    def _commit(self, request, kind, name, repo, revision):
        self._require_write(request)
        head = repo.at(revision)
        files, header = dict(head.files), {}
        for line in request.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                header = value
                if value.get("parentCommit", head.sha) != head.sha:
                    raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self._objects:
                    raise _Refusal(400, f"The large file {value['path']} was not uploaded")
                files[value["path"]] = File(self._objects[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                folder = value["path"].rstrip("/") + "/"
                gone = [p for p in files if p == value["path"] or (key == "deletedFolder" and p.startswith(folder))]
                if not gone:
                    raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                for path in gone:
                    del files[path]
        commit = repo.commit(header["summary"], files, revision)
        return {"success": True, "commitOid": commit.sha, "commitUrl": f"{self._url(kind, name)}/commit/{commit.sha}"}

    def _resolve(self, request, kind, name, repo, revision, path):
        commit = repo.at(revision)
        if path not in commit.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound", commit.sha)
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            return 200, headers, file.content
        start, size = int(asked[1]), len(file.content)
        end = min(int(asked[2] or size), size - 1)
        if start >= size:
            raise _Refusal(416, "The file has no such bytes")
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return 206, headers, file.content[start : end + 1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body in one piece: in two, each answer would wait for a delayed acknowledgement
    wbufsize = -1

    def _handle(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = _Request(self.command, url.path, parse_qs(url.query), self.headers, body, None)
        status, headers, content = self.server.hub.answer(request)
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, format: str, *args) -> None:
        pass


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def client_process(environment: dict[str, str], log: str | os.PathLike) -> Iterator[Callable]:
    """
    A fresh process with its own environment, in which functions are called one after the other.

    Args:
        environment (`dict[str, str]`):
            Environment, see [`HubServer.environment`].
        log (`str` or `os.PathLike`):
            File that receives everything the process prints.

    Yields:
        `Callable`: `call(function, *args, **kwargs)` calls an importable function there; returns or raises what it does.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with patch.dict(os.environ, environment, clear=True):
            # The process starts with its first task, and keeps the environment of that moment
            pool.submit(_print_to, str(log)).result(timeout=60)

        def call(function: Callable, *args, **kwargs) -> Any:
            return pool.submit(function, *args, **kwargs).result(timeout=180)

        yield call


def _print_to(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
