"""A hub on this machine: the routes that huggingface_hub, transformers and datasets ask, over HTTP.

It answers as huggingface.co does, with its headers and odd codes (what is not there is 401 to a stranger).
What it does not know is a 404 that names the route, and stands in `Hub.unknown`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).parents[1]
TOKEN = "hf_of_a_test"
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit)/([^/]+)(/.*)?)?"
)
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


# What a newcomer's shell lacks: caches, tokens and settings of those who were here before.
_OURS = (
    "HF_",
    "HUGGINGFACE_",
    "TRANSFORMERS_",
    "XDG_",
    "PFTOOLS_",
    "JUPYTER",
    "IPYTHON",
    "PYTHON",
    "TORCH_",
    "PYTEST_",
)


def newcomer(home: Path) -> dict[str, str]:
    """The environment of somebody new on this machine: this HOME, and every cache at its default place in it.

    What pip has fetched once is not fetched again, and comes from where this machine gets it.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    cache = subprocess.run(
        [sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = {"HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT), "PIP_CACHE_DIR": cache.stdout.strip()}
    return {**kept, **told}


@dataclass
class Repository:
    """Files by path. gated: nobody may read them but the card. private: it is there for its owner alone."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        listing = "".join(f"{path} {_oid(content)}" for path, content in sorted(self.files.items()))
        return hashlib.sha1(listing.encode()).hexdigest()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub:
    """Repositories by `models/owner/name` or `datasets/owner/name`, and what was asked of them."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.unknown: list[str] = []
        self.large: dict[str, bytes] = {}  # uploaded, not committed yet
        self.address = ""

    def add(self, name: str, files: dict[str, bytes | str] | Path, **options: Any) -> Repository:
        """A repository with these files, or with those of a folder."""
        if isinstance(files, Path):
            files = {
                str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        held = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        self.repositories[name] = Repository(held, **options)
        return self.repositories[name]

    def environment(self, home: Path, *, token: str = "") -> dict[str, str]:
        """What a process is given that asks this hub, with ``home`` as its HOME."""
        told = {
            "HF_ENDPOINT": self.address,
            "HF_HUB_DISABLE_XET": "1",  # uploads by git-lfs' protocol: xet's store is another server
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return {**newcomer(home), **told, **({"HF_TOKEN": token} if token else {})}


@contextmanager
def serving(hub: Hub):
    """The hub answers inside the block, and is down behind it."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._path()
        if found := _FILE.fullmatch(path):
            kind, name, revision, file = found.groups()
            return self._file(f"{kind or 'models'}/{name}", revision, unquote(file))
        if found := _API.fullmatch(path):
            kind, name, what, revision, below = found.groups()
            repository = self._repository(f"{kind}/{name}", revision)
            if repository is None:
                return None
            if what == "tree":
                return self._json(
                    _tree(repository, unquote(below or "").strip("/"), self._wants("recursive"))
                )
            return self._json(_about(name, repository))
        if path == "/api/whoami-v2" and self._known():
            return self._json({"name": "somebody", "type": "user", "orgs": []})
        return self._unknown(path)

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, b"")

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        found = _API.fullmatch(path)
        if not found or not found[3]:
            return self._unknown(path)
        kind, name, what, revision, _ = found.groups()
        repository = self._repository(f"{kind}/{name}", revision)
        if repository is None:
            return None
        if what == "paths-info":
            return self._json(_paths_info(repository, self._paths(body)))
        if not self._known():
            return self._error(401, "Invalid username or password.")
        if what == "preupload":
            large = (".safetensors", ".bin")
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        return self._commit(name, repository, body)

    # --------------------------------------------------------------------------------------------------------

    def _path(self) -> str:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _wants(self, option: str) -> bool:
        return parse_qs(urlsplit(self.path).query).get(option, ["false"])[0].lower() == "true"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _paths(self, body: bytes) -> list[str]:
        if "json" in self.headers.get("Content-Type", ""):
            return list(json.loads(body)["paths"])
        return parse_qs(body.decode()).get("paths", [])

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, revision: str | None = None) -> Repository | None:
        """The repository of that name; None: it is not there for who asks, who was told so."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._known()):
            code, text = (
                (404, "Repository not found") if self._known() else (401, "Invalid username or password.")
            )
            self._error(code, text, "RepoNotFound")
            return None
        if revision not in (None, "main", repository.sha):
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return repository

    def _file(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        about = {"X-Repo-Commit": repository.sha}
        if repository.gated and file != "README.md":
            if self._known():
                text = f"Access to {name} is restricted and you are not in the list. Ask on its page."
                return self._error(403, text, "GatedRepo", about)
            return self._error(401, f"Access to {name} is restricted. Please log in.", "GatedRepo", about)
        if file not in repository.files:
            return self._error(404, "Entry not found", "EntryNotFound", about)
        content = repository.files[file]
        about |= {"ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not span:
            return self._answer(200, content, about)
        begin, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        about["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        return self._answer(206, content[begin : end + 1], about)

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._known():
            return self._error(401, "Invalid username or password.")
        owner = asked.get("organization") or "somebody"
        if owner != "somebody":
            return self._error(
                403, f"You don't have the rights to create a model under the namespace {owner!r}"
            )
        name = f"{owner}/{asked['name']}"
        there = f"models/{name}" in self.hub.repositories
        if not there:
            self.hub.add(f"models/{name}", {}, private=asked.get("visibility") == "private")
        about = {"url": f"{self.hub.address}/{name}", "name": name}
        return self._json(
            {**about, "error": "You already created this model repo"} if there else about,
            409 if there else 200,
        )

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repository.files[value["path"]]
            else:
                assert entry["key"] == "header", entry
                repository.commits.append(value["summary"])
        address = f"{self.hub.address}/{name}/commit/{repository.sha}"
        self._json({"success": True, "commitOid": repository.sha, "commitUrl": address})

    def _json(self, content: Any, code: int = 200) -> None:
        self._answer(code, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, code: int, text: str, kind: str = "", more: dict[str, str] | None = None) -> None:
        about = {"X-Error-Message": text, **({"X-Error-Code": kind} if kind else {}), **(more or {})}
        self._answer(
            code, json.dumps({"error": text}).encode(), {"Content-Type": "application/json", **about}
        )

    def _unknown(self, path: str) -> None:
        self.hub.unknown.append(f"{self.command} {path}")
        self._error(404, f"the hub of the tests does not know {self.command} {path}")

    def _answer(self, code: int, content: bytes, about: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**(about or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _about(name: str, repository: Repository) -> dict[str, Any]:
    return {
        "id": name,
        "modelId": name,
        "sha": repository.sha,
        "private": repository.private,
        "gated": "auto" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "lastModified": "2026-01-01T00:00:00.000Z",
        "siblings": [{"rfilename": path} for path in repository.files],
    }


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}


def _folders(repository: Repository) -> set[str]:
    return {str(parent) for path in repository.files for parent in Path(path).parents} - {"."}


def _tree(repository: Repository, below: str, recursive: bool) -> list[dict[str, Any]]:
    """What stands in a folder, or in all folders below it."""
    entries = {path: _entry(path, content) for path, content in repository.files.items()}
    entries |= {
        path: {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in _folders(repository)
    }
    inside = {path: entry for path, entry in entries.items() if not below or path.startswith(f"{below}/")}
    depth = below.count("/") + 1 if below else 0
    return [entry for path, entry in sorted(inside.items()) if recursive or path.count("/") == depth]


def _paths_info(repository: Repository, paths: list[str]) -> list[dict[str, Any]]:
    folders = _folders(repository)
    found = [_entry(path, repository.files[path]) for path in paths if path in repository.files]
    return found + [
        {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in paths if path in folders
    ]
