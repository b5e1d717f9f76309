"""A small Hugging Face Hub on loopback, for the real ``huggingface_hub`` client: repositories with branches and
commits, Git LFS, tokens, and faults on demand. Xet must be off in the client (HF_HUB_DISABLE_XET=1)."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt")  # as the Hub's own .gitattributes has it, among others


class Blob:
    """A file. Its digests are those of the data it was made with, also after ``data`` was tampered with."""

    def __init__(self, data: bytes, lfs: bool) -> None:
        self.data, self.lfs = data, lfs
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.git_oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.etag = self.sha256 if lfs else self.git_oid


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        content = [branch, message, len(self.commits), sorted((path, blob.etag) for path, blob in files.items())]
        oid = hashlib.sha1(repr(content).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.branches.get(revision, revision)]

    def put(self, path: str, data: bytes, branch: str = "main") -> str:
        """A commit of one file, as if by somebody else."""
        return self.commit(branch, self.files(branch) | {path: Blob(data, path.endswith(LFS_SUFFIXES))}, f"put {path}")


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class HubServer:
    """``with HubServer() as hub``: at ``hub.url`` until the block ends. ``writer`` and ``reader`` are its tokens, the
    writer's account is "user". ``fault(method, path, times, action)`` spoils requests to come; ``log`` lists those that
    came. What it holds is in ``repos`` and ``lfs`` (by SHA-256), to look at and to tamper with."""

    writer, reader = "hf_writer", "hf_reader"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[str] = []
        self._faults: list[list[Any]] = []
        self._lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn_url = f"http://localhost:{self._server.server_port}"  # another host, as the Hub redirects to
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str, path: str, times: int = 10**9, action: str = "error") -> None:
        """The next requests whose path matches the regular expression: "error" answers 500, "drop" closes the
        connection in the middle of the upload, "cut" in the middle of the download."""
        self._faults.append([method, re.compile(path), times, action])

    def heal(self) -> None:
        self._faults.clear()

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            for fault in self._faults:
                if fault[0] == method and fault[1].search(path) and fault[2] > 0:
                    fault[2] -= 1
                    return fault[3]
        return None

    # What is asked for, by method and path. {repo} is user/name; {rev} and {path} arrive decoded.

    def create(self, body: Any, token: str | None, **_: str) -> Any:
        _require(token == self.writer, 401 if token is None else 403, "Invalid username or password.")
        name = f"{body.get('organization') or 'user'}/{body['name']}"
        reply = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repos:
            raise Refused(409, json.dumps({"error": "You already created this model repo", **reply}))
        repo = self.repos[name] = Repo(private=body.get("visibility") == "private" or bool(body.get("private")))
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return reply

    def validate_yaml(self, body: Any, **_: Any) -> Any:
        match = re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)
        try:
            assert match is not None, "no front matter"
            assert isinstance(yaml.safe_load(match[1]), dict), "front matter is no mapping"
        except (AssertionError, yaml.YAMLError) as error:
            raise Refused(400, json.dumps({"errors": [{"message": str(error)}]})) from error
        return {"errors": [], "warnings": []}

    def branch(self, repo: str, rev: str, body: Any, token: str | None) -> Any:
        found = self.writable(repo, token)
        _require(rev not in found.branches, 409, "Reference already exists")
        found.branches[rev] = self.resolve(found, body.get("startingPoint") or "main")
        return {}

    def info(self, repo: str, token: str | None, rev: str = "main", **_: Any) -> Any:
        found = self.readable(repo, token)
        oid = self.resolve(found, rev)
        siblings = [{"rfilename": path} for path in found.commits[oid]]
        return {"id": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []}

    def refs(self, repo: str, token: str | None, **_: Any) -> Any:
        branches = self.readable(repo, token).branches
        return {
            "branches": [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in branches.items()],
            "tags": [],
            "converts": [],
        }

    def tree(self, repo: str, rev: str, token: str | None, **_: Any) -> Any:
        found = self.readable(repo, token)
        return [_describe(path, blob) for path, blob in found.commits[self.resolve(found, rev)].items()]

    def paths_info(self, repo: str, rev: str, body: Any, token: str | None) -> Any:
        found = self.readable(repo, token)
        files = found.commits[self.resolve(found, rev)]
        return [_describe(path, files[path]) for path in body["paths"] if path in files]

    def preupload(self, repo: str, rev: str, body: Any, token: str | None) -> Any:
        found = self.writable(repo, token)
        files = found.commits[self.resolve(found, rev)]
        return {
            "files": [
                {
                    "path": (path := file["path"]),
                    "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    **({"oid": files[path].etag} if path in files else {}),
                }
                for file in body["files"]
            ]
        }

    def lfs_batch(self, repo: str, body: Any, token: str | None, **_: Any) -> Any:
        self.writable(repo, token)
        objects = []
        for entry in body["objects"]:
            reply = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.lfs:
                upload, verify = f"{self.url}/lfs/upload/{entry['oid']}", f"{self.url}/{repo}.git/info/lfs/verify"
                reply["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify}}
            objects.append(reply)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str, body: Any, **_: Any) -> Any:
        _require(hashlib.sha256(body).hexdigest() == oid, 400, "content is not what its oid says")
        self.lfs[oid] = body
        return {}

    def lfs_verify(self, repo: str, body: Any, token: str | None, **_: Any) -> Any:
        self.writable(repo, token)
        _require(len(self.lfs.get(body["oid"], b"")) == body["size"], 404, "object is not there")
        return {}

    def commit(self, repo: str, rev: str, body: Any, token: str | None) -> Any:
        with self._lock:
            found = self.writable(repo, token)
            _require(rev in found.branches, 404, "Invalid rev id", "RevisionNotFound")
            parent = found.branches[rev]
            files = dict(found.commits[parent])
            header, *operations = [json.loads(line) for line in body.splitlines()]
            expected = header["value"].get("parentCommit")
            _require(expected in (None, parent), 412, "A commit has happened since. Please refresh and try again.")
            for operation in operations:
                kind, value = operation["key"], operation["value"]
                path = value["path"]
                if kind == "file":
                    files[path] = Blob(base64.b64decode(value["content"]), False)
                elif kind == "lfsFile":
                    _require(value["oid"] in self.lfs, 400, f"LFS object of {path} was not uploaded")
                    files[path] = Blob(self.lfs[value["oid"]], True)
                elif kind == "deletedFile":
                    _require(path in files, 404, "A file with this name doesn't exist", "EntryNotFound")
                    del files[path]
                else:
                    raise Refused(400, f"unknown operation {kind}")
            oid = found.commit(rev, files, header["value"]["summary"])
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "hookOutput": ""}

    # Who may

    def readable(self, repo: str, token: str | None) -> Repo:
        found = self.repos.get(repo)
        if found is None or (found.private and token not in (self.reader, self.writer)):
            # Without a token the Hub does not say whether there is such a repository.
            raise Refused(401 if token is None else 404, "Invalid username or password.", "RepoNotFound")
        return found

    def writable(self, repo: str, token: str | None) -> Repo:
        found = self.readable(repo, token)
        _require(token is not None, 401, "Invalid username or password.")
        _require(token == self.writer, 403, "you don't have the rights to write to this repo")
        return found

    @staticmethod
    def resolve(repo: Repo, revision: str) -> str:
        oid = repo.branches.get(revision, revision)
        _require(oid in repo.commits, 404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


def _require(condition: bool, status: int, message: str, code: str = "") -> None:
    if not condition:
        raise Refused(status, message, code)


def _describe(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
    return entry


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = [
    (method, re.compile(pattern + "$"), function)
    for method, pattern, function in [
        ("POST", "/api/repos/create", HubServer.create),
        ("POST", "/api/validate-yaml", HubServer.validate_yaml),
        ("GET", f"/api/models/{_REPO}", HubServer.info),
        ("GET", f"/api/models/{_REPO}/revision/(?P<rev>[^/]+)", HubServer.info),
        ("GET", f"/api/models/{_REPO}/refs", HubServer.refs),
        ("GET", f"/api/models/{_REPO}/tree/(?P<rev>[^/]+)", HubServer.tree),
        ("POST", f"/api/models/{_REPO}/paths-info/(?P<rev>[^/]+)", HubServer.paths_info),
        ("POST", f"/api/models/{_REPO}/branch/(?P<rev>[^/]+)", HubServer.branch),
        ("POST", f"/api/models/{_REPO}/preupload/(?P<rev>[^/]+)", HubServer.preupload),
        ("POST", f"/api/models/{_REPO}/commit/(?P<rev>[^/]+)", HubServer.commit),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
        ("POST", rf"/{_REPO}\.git/info/lfs/verify", HubServer.lfs_verify),
        ("PUT", "/lfs/upload/(?P<oid>[0-9a-f]{64})", HubServer.lfs_upload),
    ]
]
_RESOLVE = re.compile(f"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)$")
_CDN = re.compile(f"/cdn/{_REPO}/(?P<oid>[0-9a-f]{{40}})/(?P<path>.+)$")


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        self.hub.log.append(f"{self.command} {unquote(path)}")
        authorization = self.headers.get("Authorization") or ""
        token = authorization.removeprefix("Bearer ") or None
        fault = self.hub.next_fault(self.command, unquote(path))
        try:
            body = self._body(drop=fault == "drop")
            if fault == "error":
                raise Refused(500, "Internal Server Error")
            if self.command in ("GET", "HEAD") and (match := _CDN.match(path)):
                files = self.hub.repos[match["repo"]].commits[match["oid"]]
                self._send_blob(files[unquote(match["path"])], {}, cut=fault == "cut")
            elif self.command in ("GET", "HEAD") and (match := _RESOLVE.match(path)):
                self._resolve(match, token, cut=fault == "cut")
            else:
                self._send(200, self._call(path, body, token))
        except Refused as refused:
            headers = {"X-Error-Message": refused.message.replace("\n", " ")}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            if refused.message.startswith("{"):
                self._send(refused.status, json.loads(refused.message))
            else:
                self._send(refused.status, {"error": refused.message}, headers)
        except ConnectionError:
            self.close_connection = True

    def _call(self, path: str, body: bytes, token: str | None) -> Any:
        for method, pattern, function in _ROUTES:
            if method == self.command and (match := pattern.match(path)):
                names = {name: unquote(value) for name, value in match.groupdict().items()}
                return function(self.hub, body=self._decoded(body), token=token, **names)
        raise Refused(404, f"this Hub has no {self.command} {path}")

    def _decoded(self, body: bytes) -> Any:
        kind = self.headers.get("Content-Type") or ""
        if kind == "application/x-www-form-urlencoded":
            return parse_qs(body.decode())
        return json.loads(body) if kind.endswith("json") and kind != "application/x-ndjson" else body

    def _body(self, drop: bool) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            if drop:
                self._drop()
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        if drop:
            self.rfile.read(length // 2)
            self._drop()
        return self.rfile.read(length)

    def _drop(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionError

    def _resolve(self, match: re.Match[str], token: str | None, cut: bool) -> None:
        name, rev, path = (unquote(match[group]) for group in ("repo", "rev", "path"))
        repo = self.hub.readable(name, token)
        oid = self.hub.resolve(repo, rev)
        if path not in repo.commits[oid]:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        blob = repo.commits[oid][path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            self._send_blob(blob, headers, cut)
            return
        headers |= {
            "X-Linked-Etag": f'"{blob.etag}"',
            "X-Linked-Size": str(len(blob.data)),
            "Location": f"{self.hub.cdn_url}/cdn/{match['repo']}/{oid}/{match['path']}",
        }
        self._send(302, {}, headers)

    def _send_blob(self, blob: Blob, headers: dict[str, str], cut: bool = False) -> None:
        data, status = blob.data, 200
        if wanted := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
            data, status = data[start : end + 1], 206
        self._send_bytes(status, data, headers | {"Content-Type": "application/octet-stream"}, cut)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send_bytes(self, status: int, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self._drop()
