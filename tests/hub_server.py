"""
A Hugging Face Hub on the loopback interface: what the Hub client 2.4 asks of it to create, push, list and download.

Repositories live in a folder, so that another server can go on with them. Constants of the client (`HF_ENDPOINT`, `HF_HOME`, offline mode) are read when it is
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
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


_LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".parquet", ".pt", ".safetensors")
_LFS_BYTES = 10_000_000
# Metadata of a card that the Hub looks at, and what each may be
_CARD_TYPES = dict.fromkeys(("license", "license_name", "license_link", "library_name", "pipeline_tag"), (str,))
_CARD_TYPES |= dict.fromkeys(("base_model", "datasets", "tags", "language", "metrics"), (str, list))
_CARD_TYPES |= {"base_model_relation": (str,), "model-index": (dict, list), "inference": (bool, str, dict)}


@dataclass(frozen=True)
class File:
    """A file of a commit: where its content is, and its hashes."""

    blob: Path
    lfs: bool
    size: int
    sha256: str
    git_sha1: str

    @property
    def content(self) -> bytes:
        return self.blob.read_bytes()

    @property
    def etag(self) -> str:
        """Hash of the content: SHA-256 of a large file, git's of another."""
        return self.sha256 if self.lfs else self.git_sha1

    def entry(self, path: str) -> dict[str, Any]:
        """The file as `tree` and `paths-info` list it."""
        if not self.lfs:
            return {"type": "file", "path": path, "size": self.size, "oid": self.etag}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer)}
        oid = _git_hash(pointer.encode())
        return {"type": "file", "path": path, "size": self.size, "oid": oid, "lfs": lfs}


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
    how: str
    status: int
    times: int
    applied: bool
    headers: dict[str, str]
    body: bytes
    after: str | None
    action: Callable[[], None] | None
    hits: int = 0


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **details: str):
        super().__init__(message)
        self.details = {"error": message, **details}
        # The headers by which the client tells a missing repository, revision and file apart
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status, self.headers = status, {name: value for name, value in headers.items() if value is not None}


class _Invalid(_Refusal):
    def __init__(self, message: str):
        super().__init__(400, "Invalid metadata")
        self.details = {"errors": [{"message": message}], "warnings": []}


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
        root (`str` or `os.PathLike`, *optional*):
            Folder of the repositories: `repositories.json`, and the content of the files by hash in `blobs`. Those that
            are there are served. By default, a temporary one.
        port (`int`):
            Port to listen on, such as that of a server that was closed. By default, any that is free.

    Attributes:
        endpoint (`str`): Value for `HF_ENDPOINT`.
        tokens (`dict[str, str]`): Roles by token.
        repositories (`dict[tuple[str, str], Repository]`): Repositories by type (`"model"`, `"dataset"`) and id.
        requests (`list[str]`): Requests so far, as `"METHOD /path"`. Clear it to see those of the next step.
        faults (`list[Fault]`): What [`fail`] asked for.
        upload_query (`str`): Put after the addresses to upload to, as the signature of a real one.
    """

    def __init__(
        self,
        token: str = "hf_loopback",
        role: str = "write",
        user: str = "user",
        root: str | os.PathLike | None = None,
        port: int = 0,
    ):
        self.tokens = {token: role}
        self.user = user
        self.root = None if root is None else Path(root)
        self.port = port
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.upload_query = ""
        self._lock = threading.RLock()
        self._closing = threading.Event()

    def __enter__(self) -> "HubServer":
        self._temporary = tempfile.TemporaryDirectory() if self.root is None else None
        if self._temporary is not None:
            self.root = Path(self._temporary.name)
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        self._load()
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.hub = self
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        with self._lock:  # what is answered now is answered to its end, and nothing afterwards
            self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def fail(
        self,
        pattern: str,
        how: str = "answer",
        *,
        status: int = 503,
        times: int = 1,
        applied: bool = False,
        headers: dict[str, str] | None = None,
        body: bytes = b'{"error": "injected"}',
        after: str | None = None,
        action: Callable[[], None] | None = None,
    ) -> None:
        """
        Makes the next requests fail.

        Args:
            pattern (`str`):
                Regular expression searched in `"METHOD /path"`.
            how (`str`):
                `"answer"`: as the arguments below say. `"drop"`: the connection is closed without an answer; `"reset"`: even
                before the request was read; `"cut"`: in the middle of its body. `"stall"`: nothing comes, until the client
                gives up. `"half"`: the connection is closed in the middle of the right answer. `"none"`: the right answer,
                for what `action` does meanwhile.
            status (`int`):
                Status of the answer.
            times (`int`):
                Number of matching requests that fail.
            applied (`bool`):
                Whether the request takes effect all the same, as when only its answer is lost.
            headers (`dict[str, str]`, *optional*):
                Headers of the answer.
            body (`bytes`):
                Body of the answer.
            after (`str`, *optional*):
                Regular expression of a request before which none fails.
            action (`Callable`, *optional*):
                Called at each failing request: after it took effect, or before that with `"none"`.
        """
        applied = applied or how in ("half", "none")
        self.faults.append(Fault(pattern, how, status, times, applied, headers or {}, body, after, action))

    def _load(self) -> None:
        if not (self.root / "repositories.json").is_file():
            return
        for found in json.loads((self.root / "repositories.json").read_text()):
            repo = Repository(found["private"])
            for commit in found["commits"]:
                files = {path: self._file(sha256, lfs) for path, (sha256, lfs) in commit["files"].items()}
                repo.commits.append(Commit(commit["sha"], commit["message"], files))
            by_sha = {commit.sha: commit for commit in repo.commits}
            repo.branches = {name: by_sha[sha] for name, sha in found["branches"].items()}
            repo.tags = {name: by_sha[sha] for name, sha in found["tags"].items()}
            self.repositories[found["type"], found["id"]] = repo

    def _save(self) -> None:
        kept = []
        for (kind, name), repo in self.repositories.items():
            commits = [
                {
                    "sha": commit.sha,
                    "message": commit.message,
                    "files": {path: [file.sha256, file.lfs] for path, file in commit.files.items()},
                }
                for commit in repo.commits
            ]
            refs = {
                "branches": {branch: commit.sha for branch, commit in repo.branches.items()},
                "tags": {tag: commit.sha for tag, commit in repo.tags.items()},
            }
            kept.append({"type": kind, "id": name, "private": repo.private, "commits": commits, **refs})
        _write_whole(self.root / "repositories.json", json.dumps(kept, indent=1).encode())

    def _store(self, content: bytes, lfs: bool) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        _write_whole(self.root / "blobs" / sha256, content)
        return self._file(sha256, lfs)

    def _file(self, sha256: str, lfs: bool) -> File:
        blob = self.root / "blobs" / sha256
        content = blob.read_bytes()
        return File(blob, lfs, len(content), sha256, _git_hash(content))

    def add(self, kind: str, name: str, folder: str | os.PathLike) -> None:
        """Makes a folder a repository, of whatever namespace."""
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        files = {
            path.relative_to(folder).as_posix(): self._store(path.read_bytes(), path.suffix in _LFS_SUFFIXES)
            for path in paths
        }
        self.repositories[kind, name] = repo = Repository(private=False)
        repo.commit("initial commit", files, "main")

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a repository by path."""
        return {path: file.content for path, file in self.repositories[kind, name].at(revision).files.items()}

    def create(self, kind: str, name: str, *, private: bool = False) -> Repository:
        """Creates a repository, as somebody else may."""
        repo = self.repositories[kind, name] = Repository(private)
        repo.commit("initial commit", {".gitattributes": self._store(b"", lfs=False)}, "main")
        return repo

    def commit(self, kind: str, name: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        """Adds files to a branch, as somebody else may."""
        repo = self.repositories[kind, name]
        added = {path: self._store(content, lfs=False) for path, content in files.items()}
        return repo.commit("Somebody else's", {**repo.at(branch).files, **added}, branch)

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

    def fault(self, line: str) -> Fault | None:
        """Notes a request, and whether it is to fail."""
        with self._lock:
            fault = next((f for f in self.faults if self._fails(f, line)), None)
            self.requests.append(line)
            if fault is not None:
                fault.times -= 1
                fault.hits += 1
            return fault

    def _fails(self, fault: Fault, line: str) -> bool:
        if fault.after is not None:
            if not any(re.search(fault.after, request) for request in self.requests):
                return False
        return fault.times > 0 and re.search(fault.pattern, line) is not None

    def stall(self) -> None:
        """Waits until the server is closed."""
        self._closing.wait()

    def answer(self, request: _Request) -> tuple[int, dict[str, str], bytes] | None:
        """Status, headers and body of the answer to a request; `None` if the server has been closed."""
        with self._lock:
            if self._closing.is_set():
                return None
            try:
                answer = self._route(request)
            except _Refusal as refusal:
                return refusal.status, refusal.headers, json.dumps(refusal.details).encode()
            if request.method != "GET":
                self._save()
            return answer

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
        self.create(kind, name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": self._url(kind, name), "name": name}

    def _url(self, kind: str, name: str) -> str:
        return f"{self.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"

    def _validate_yaml(self, request):
        found = re.match(r"---\n(.*?)\n---", request.json()["content"], re.DOTALL)
        if found is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            data = yaml.safe_load(found[1])
        except yaml.YAMLError as error:
            raise _Invalid(f"YAML: {error}") from error
        if not isinstance(data, dict):
            raise _Invalid("The metadata is no object")
        for name, types in _CARD_TYPES.items():
            values = data.get(name)
            for value in values if isinstance(values, list) and list in types else [values]:
                if value is not None and not isinstance(value, types):
                    raise _Invalid(f'"{name}" must be {" or ".join(kind.__name__ for kind in types)}')
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
            if not (self.root / "blobs" / item["oid"]).is_file():
                href = f"{self.endpoint}/lfs/{item['oid']}"
                item["actions"] = {
                    "upload": {"href": href + self.upload_query},
                    "verify": {"href": f"{href}/verify"},
                }
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, request, oid):
        # As to a signed address, without the token
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise _Refusal(400, "The content does not have this hash")
        self._store(request.body, lfs=True)
        return 200, {}, b""

    def _lfs_verify(self, request, oid):
        blob = self.root / "blobs" / oid
        if not blob.is_file() or blob.stat().st_size != request.json()["size"]:
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
                files[value["path"]] = self._store(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if not (self.root / "blobs" / value["oid"]).is_file():
                    raise _Refusal(400, f"The large file {value['path']} was not uploaded")
                files[value["path"]] = self._file(value["oid"], lfs=True)
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
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            return 200, headers, file.content
        start, size = int(asked[1]), file.size
        end = min(int(asked[2] or size), size - 1)
        if start >= size:
            raise _Refusal(416, "The file has no such bytes")
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return 206, headers, file.content[start : end + 1]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body in one piece: in two, each answer would wait for a delayed acknowledgement
    wbufsize = -1

    def _handle(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        fault = hub.fault(f"{self.command} {url.path}")
        if fault is not None and fault.how == "reset":
            self.close_connection = True
            return
        size = int(self.headers.get("Content-Length", 0))
        if fault is not None and fault.how == "cut":
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        body = self.rfile.read(size)
        if len(body) < size:  # of a client that was killed: half a commit is none
            self.close_connection = True
            return
        if fault is not None and fault.how == "none" and fault.action is not None:
            fault.action()
        request = _Request(self.command, url.path, parse_qs(url.query), self.headers, body, None)
        answer = hub.answer(request) if fault is None or fault.applied else (None, {}, b"")
        if answer is None:
            self.close_connection = True
            return
        status, headers, content = answer
        length = len(content)
        if fault is not None and fault.how != "none":
            if fault.action is not None:
                fault.action()
            self.close_connection = fault.how != "answer"
            if fault.how == "stall":
                hub.stall()
            if fault.how in ("drop", "stall"):
                return
            if fault.how == "answer":
                status, headers, content = fault.status, fault.headers, fault.body
                length = len(content)
            else:
                content = content[: length // 2]
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": length}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def handle(self) -> None:
        # A client that was killed or does not wait any longer
        with suppress(ConnectionError):
            super().handle()

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, format: str, *args) -> None:
        pass


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


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
