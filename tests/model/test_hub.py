"""The hub: only needed files of a model are fetched, and data is read at the commit in the key.

The tests start a local server that speaks the part of the hub's API that huggingface_hub uses.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import ROOT, TINY
from sqft_export.model.hub import needed_files

COMMITS = ("a" * 40, "b" * 40)
MISTRAL = [
    *(".gitattributes", "README.md", "config.json", "generation_config.json", "params.json"),
    *("consolidated.safetensors", "tokenizer.model", "tokenizer.model.v3", "tokenizer.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    *("model.safetensors.index.json", "original/consolidated.00.pth", "original/params.json"),
    *("pytorch_model.bin", "model.fp16.safetensors", "model.gguf", "onnx/model.safetensors"),
]


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


@pytest.fixture
def hub(tmp_path):
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


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


def test_the_same_weights_in_other_forms_are_not_needed():
    def index():
        return {"weight_map": {"a": MISTRAL[9], "b": MISTRAL[10]}}

    assert set(needed_files(MISTRAL, index)) == {
        *("config.json", "generation_config.json", "params.json", "tokenizer.model"),
        *("tokenizer.json", "model.safetensors.index.json", MISTRAL[9], MISTRAL[10]),
    }
    one = ["config.json", "model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"]
    assert needed_files(one, index) == ["config.json", "model.safetensors"]


LOAD = """
from pathlib import Path
from sqft_export.model.hub import model_folder, planned_download
from sqft_export.recipe.load import load_recipe
recipe = load_recipe(Path("recipes/tiny.yaml"), ("model={hub: some/model}",))
assert model_folder(recipe, download=False) is None
print(planned_download(recipe).bytes)
print(model_folder(recipe, download=True))
assert model_folder(recipe, download=False) is not None
print(planned_download(recipe).bytes)
"""


def test_a_download_is_what_the_model_needs_and_is_counted(hub, tmp_path):
    files = {file.name: file.read_bytes() for file in TINY.iterdir() if file.is_file()}
    needed = [n for n in files if n.endswith((".json", ".txt", ".jinja", ".model"))]
    needed.append("model.safetensors")
    extra = {"consolidated.safetensors": bytes(10**6), "original/params.json": b"{}"}
    hub.repositories["models/some/model"] = {COMMITS[0]: files | extra}
    done = ask(hub, tmp_path / "home", LOAD)
    assert done.returncode == 0, done.stderr[-3000:]
    before, folder, after = done.stdout.split()
    assert int(before) == sum(len(files[name]) for name in needed) and int(after) == 0
    assert {file.name for file in Path(folder).rglob("*")} == set(needed)
    assert not [path for path in hub.fetched if "consolidated" in path or "original" in path]


FULL = """
import shutil, sys
from sqft_export.run import host
host.shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000)
from sqft_export.cli import main
hub = "model={hub: some/model}"
sys.argv = ["sqft-export", "run", "recipes/tiny.yaml", hub, "--runs", RUNS]
main()
"""


def test_a_download_that_the_disk_has_no_room_for_is_not_begun(hub, tmp_path):
    files = {file.name: file.read_bytes() for file in TINY.iterdir() if file.is_file()}
    hub.repositories["models/some/model"] = {COMMITS[0]: files}
    code = FULL.replace("RUNS", repr(str(tmp_path / "runs")))
    done = ask(hub, tmp_path / "home", code)
    assert done.returncode == 3, done.stderr
    assert "needed, 1000 bytes free; some/model is downloaded there" in done.stderr
    assert not [path for path in hub.fetched if "safetensors" in path]


READ = """
from pathlib import Path
from sqft_export.data.calibration import _stream_dataset
from sqft_export.data.datasets import hub_rows
from sqft_export.recipe.load import load_recipe
from sqft_export.run.digests import Digests, pin_revisions
from sqft_export.run.artifact import Store
import os, urllib.request
calibration = "calibration={source: 'hub:some/text', samples: 1}"
settings = ("task={kind: dataset, name: gsm8k}", calibration)
recipe = load_recipe(Path("recipes/tiny.yaml"), settings)
pinned = pin_revisions(recipe, online=True)
found = Digests(pinned, None, Store(Path("nowhere")))
print(found["train"], found["calibration"])
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/push")
rows = hub_rows("gsm8k", "train", "recipe", pinned.revisions)
print([row["question"] for row in rows])
class Words:
    bos_token_id = eos_token_id = None
    def __call__(self, texts):
        return {"input_ids": [text.split() for text in texts]}
print(_stream_dataset(pinned, Words()))
"""


def test_data_is_read_at_the_commit_in_the_key(hub, tmp_path):
    """Training starts hours after the keys were made, and somebody has pushed in between."""

    def commits(kind: str, *texts: str) -> dict[str, dict[str, bytes]]:
        rows = [json.dumps({kind: text, "answer": "#### 1"}).encode() for text in texts]
        return {
            commit: {"README.md": CARD[kind].encode(), "main/train.jsonl": row + b"\n"}
            for commit, row in zip(COMMITS, rows, strict=False)
        }

    words = [" ".join([word] * 20) for word in ("old", "new")]
    hub.repositories["datasets/openai/gsm8k"] = commits("question", "old")
    hub.repositories["datasets/some/text"] = commits("text", words[0])

    def push() -> None:
        hub.repositories["datasets/openai/gsm8k"] |= commits("question", "old", "new")
        hub.repositories["datasets/some/text"] |= commits("text", *words)

    hub.push = push
    done = ask(hub, tmp_path / "home", READ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(hub.repositories["datasets/some/text"]) == 2, "the push came before the rows"
    keyed, *_, questions, texts = done.stdout.splitlines()
    assert keyed.count(COMMITS[0]) == 2
    assert questions == "['old']"
    assert "'old'" in texts and "'new'" not in texts


SPLITS = "configs: [{config_name: CONFIG, data_files: [{split: train, path: main/train.jsonl}]}]"
CARD = {
    kind: f"---\n{SPLITS.replace('CONFIG', config)}\n---\n"
    for kind, config in (("question", "main"), ("text", "default"))
}
