"""A local server that speaks the part of the hub's API that huggingface_hub uses."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conftest import ROOT


class Hub(ThreadingHTTPServer):
    """Repositories by kind and name; of each its commits, of each its files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.fetched: list[str] = []
        self.push: Callable[[], None] = lambda: None  # commits that come later
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit_of(self, name: str, revision: str) -> str:
        commits = self.repositories[name]
        return revision if revision in commits else list(commits)[-1]


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def do_POST(self):
        self._answer(True)

    def _answer(self, body: bool) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        asked = self.rfile.read(length).decode()
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["push"]:
            self.server.push()
            parts = ["api", *next(iter(self.server.repositories)).split("/")]
        if self.command == "POST" and (answer := self._write(parts[1:], asked)) is not None:
            found = json.dumps(answer).encode(), {"Content-Type": "application/json"}
        else:
            found = self._api(parts[1:], asked) if parts[0] == "api" else self._file(parts)
        content, headers = found or (b"{}", {})
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
            if found and "X-Repo-Commit" in headers:
                self.server.fetched.append(self.path)

    def _write(self, parts: list[str], asked: str) -> dict | None:
        """Create a repository, or commit files to it; None for other requests."""
        if parts == ["validate-yaml"]:
            return {"errors": [], "warnings": []}
        if parts == ["repos", "create"]:
            name = json.loads(asked)["name"]
            owner = json.loads(asked).get("organization") or "me"
            self.server.repositories.setdefault(f"models/{owner}/{name}", {"c" * 40: {}})
            return {"url": f"http://127.0.0.1:{self.server.server_port}/{owner}/{name}"}
        key, action = "/".join(parts[:3]), parts[3:4]
        if action == ["preupload"]:
            files = json.loads(asked)["files"]
            return {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
            }
        if action == ["commit"]:
            lines = [json.loads(line) for line in asked.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            content = {f["path"]: base64.b64decode(f["content"]) for f in files}
            self.server.repositories[key]["d" * 40] = content
            url = f"http://127.0.0.1:{self.server.server_port}/{parts[1]}/{parts[2]}"
            return {"commitUrl": f"{url}/commit/{'d' * 40}", "commitOid": "d" * 40}
        return None

    def _api(self, parts: list[str], asked: str) -> tuple[bytes, dict[str, str]] | None:
        kind, owner, name, *rest = parts
        key = f"{kind}/{owner}/{name}"
        if key not in self.server.repositories:
            return None
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.server.commit_of(key, revision)
        files = self.server.repositories[key][commit]
        if rest[:1] == ["tree"]:
            under = "/".join(rest[2:])
            listed = [(n, c) for n, c in files.items() if n.startswith(under)]
            document: object = [_entry(n, c) for n, c in listed]
        elif rest[:1] == ["paths-info"]:
            paths = [p.split("=")[1] for p in asked.split("&") if p.startswith("paths=")]
            document = [_entry(n, files[n]) for n in paths if n in files]
        else:
            siblings = [{"rfilename": n, "size": len(c), "blobId": "1"} for n, c in files.items()]
            document = {
                **{"id": f"{owner}/{name}", "sha": commit, "siblings": siblings},
                **{"private": False, "disabled": False, "gated": False, "downloads": 0},
                **{"likes": 0, "tags": [], "lastModified": "2026-01-01T00:00:00.000Z"},
            }
        return json.dumps(document).encode(), {"Content-Type": "application/json"}

    def _file(self, parts: list[str]) -> tuple[bytes, dict[str, str]] | None:
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        owner, name, _, revision, *path = parts
        key = f"{kind}/{owner}/{name}"
        if key not in self.server.repositories:
            return None
        commit = self.server.commit_of(key, revision)
        content = self.server.repositories[key][commit].get("/".join(path))
        if content is None:
            return None
        tag = hashlib.sha256(content).hexdigest()
        return content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}


def _entry(name: str, content: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(content), "oid": "1"}


def ask(hub: Hub, home: Path, code: str) -> subprocess.CompletedProcess:
    """Run code in a process that takes this hub for the real one."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
