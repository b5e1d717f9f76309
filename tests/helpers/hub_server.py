"""A small Hugging Face Hub on loopback, for the real ``huggingface_hub`` client, with faults on demand.

Xet must be off in the client (HF_HUB_DISABLE_XET=1).
"""

import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.hub_repositories import Blob, HubRepositories, Refused


class HubServer(HubRepositories):
    """``with HubServer() as hub``: at ``hub.url`` until the block ends.

    ``fault(method, path, times, action)`` spoils requests to come; ``log`` lists those that came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self._faults: list[list[Any]] = []

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn_url = f"http://localhost:{self._server.server_port}"  # another host, as the Hub redirects to
        # At its end it is waited for as long as it sleeps between looks, half a second by default.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
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
