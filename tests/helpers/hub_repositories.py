"""What a small Hugging Face Hub holds and replies: repositories with branches and commits, Git LFS, and tokens."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any

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


def _require(condition: bool, status: int, message: str, code: str = "") -> None:
    if not condition:
        raise Refused(status, message, code)


def _describe(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
    return entry


class HubRepositories:
    """The Hub without HTTP: a method for each endpoint. {repo} is user/name; {rev} and {path} arrive decoded.

    ``writer`` and ``reader`` are its tokens; the writer's account is "user". What it holds is in ``repos`` and ``lfs``
    (by SHA-256), to look at and to tamper with.
    """

    writer, reader = "hf_writer", "hf_reader"
    url: str

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self._lock = threading.RLock()

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
