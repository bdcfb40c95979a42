"""A hub on this machine: the few endpoints that huggingface_hub calls to make a repository, commit to it and read it.

Repositories are dicts in memory. Weights travel as LFS objects, everything else inside the commit.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A repository: each revision is a name, of a branch or a commit, with the files that it has."""

    private: bool
    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    heads: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    @property
    def files(self) -> dict[str, bytes]:
        return self.revisions["main"]

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = {**self.revisions[branch], **files}
        oid = hashlib.sha1(repr((branch, self.heads[branch], sorted(content.items()))).encode()).hexdigest()
        self.revisions[branch] = self.revisions[oid] = content
        self.heads[branch] = oid
        return oid


class FakeHub(ThreadingHTTPServer):
    """`repositories` by type and id, and the `requests` it got as (method, path)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        return self.repositories[repo_type, repo_id].files


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits until its head has been acknowledged
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        path, body = self._begin()
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        _, types, owner, name, action, revision = parts
        repository = self.server.repositories[types.removesuffix("s"), f"{owner}/{name}"]
        if action == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if action == "branch":
            branch = unquote(revision)
            repository.revisions[branch], repository.heads[branch] = dict(repository.files), repository.heads["main"]
            return self._json({})
        assert action == "commit"
        files: dict[str, bytes] = {}
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        oid = repository.commit(unquote(revision), files)
        return self._json({"commitUrl": f"{self.server.endpoint}/{owner}/{name}/commit/{oid}", "commitOid": oid})

    def do_PUT(self) -> None:
        path, body = self._begin()
        oid = path.rsplit("/", 1)[-1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._json({})

    def do_GET(self) -> None:
        path, _ = self._begin()
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "api" and len(parts) < 4:
            return self._missing("EntryNotFound")  # what the client would like to know about itself
        if parts[0] == "api":
            _, types, owner, name, *rest = parts
            repository = self.server.repositories.get((types.removesuffix("s"), f"{owner}/{name}"))
            if repository is None:
                return self._missing("RepoNotFound")
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in repository.revisions:
                return self._missing("RevisionNotFound")
            files = repository.revisions[revision]
            if rest[:1] == ["tree"]:
                tree = [{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in files.items()]
                return self._json(tree)
            info = {"sha": repository.heads.get(revision, revision), "private": repository.private}
            return self._json(
                {"id": f"{owner}/{name}", **info, "siblings": [{"rfilename": file} for file in files], "tags": []}
            )
        repo_type = parts.pop(0).removesuffix("s") if parts[0] == "datasets" else "model"
        owner, name, resolve, revision, *file = parts
        assert resolve == "resolve"
        repository = self.server.repositories.get((repo_type, f"{owner}/{name}"))
        if repository is None:
            return self._missing("RepoNotFound")
        if revision not in repository.revisions:
            return self._missing("RevisionNotFound")
        content = repository.revisions[revision].get("/".join(file))
        if content is None:
            return self._missing("EntryNotFound")
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": repository.heads.get(revision, revision),
            "Accept-Ranges": "bytes",
        }
        return self._answer(200, content, headers)

    do_HEAD = do_GET

    def _create(self, wanted: dict[str, Any]) -> None:
        owner, repo_type = wanted.get("organization") or "me", wanted.get("type") or "model"
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.server.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        exists = (repo_type, repo_id) in self.server.repositories
        if not exists:
            # Like the real one: public where nothing is said.
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.server.repositories[repo_type, repo_id] = Repository(private)
        self._json({"url": url, "name": repo_id}, 409 if exists else 200)

    def _begin(self) -> tuple[str, bytes]:
        self.server.requests.append((self.command, self.path))
        return urlsplit(self.path).path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
