"""The hub: only needed files of a model are fetched, and data is read at the commit in the key.

The tests start a local server that speaks the part of the hub's API that huggingface_hub uses.
"""

import json
from pathlib import Path

import pytest
from hub_server import Hub, ask

from conftest import TINY
from sqft_export.model.hub import needed_files

COMMITS = ("a" * 40, "b" * 40)
MISTRAL = [
    *(".gitattributes", "README.md", "config.json", "generation_config.json", "params.json"),
    *("consolidated.safetensors", "tokenizer.model", "tokenizer.model.v3", "tokenizer.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    *("model.safetensors.index.json", "original/consolidated.00.pth", "original/params.json"),
    *("pytorch_model.bin", "model.fp16.safetensors", "model.gguf", "onnx/model.safetensors"),
]


@pytest.fixture
def hub(tmp_path):
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


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
from sqft_export.machine import host
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
from sqft_export.artifacts.store import Store
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


READ_CHATS = """
import os, urllib.request
from pathlib import Path
from sqft_export.data.conversations import read_conversations
from sqft_export.recipe.load import load_recipe
from sqft_export.artifacts.store import Store
from sqft_export.run.digests import Digests, pin_revisions
task = "task={kind: chat, train: 'hub:some/chats', test_share: 0.5}"
pinned = pin_revisions(load_recipe(Path("recipes/tiny.yaml"), (task,)), online=True)
found = Digests(pinned, None, Store(Path("nowhere")))
print(found["train"], found["test"])
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/push")
for split in ("train", "test"):
    (chat,) = read_conversations(pinned, pinned.task, split)
    print(split, chat.place, chat.messages[-1]["content"])
"""


def test_conversations_are_read_from_the_hub_at_the_commit_in_the_key(hub, tmp_path):
    def commits(*words: str) -> dict[str, dict[str, bytes]]:
        found = {}
        for commit, word in zip(COMMITS, words, strict=False):
            rows = [
                {
                    "messages": [
                        {"role": "user", "content": "?"},
                        {"role": "assistant", "content": a},
                    ]
                }
                for a in (f"{word} first", f"{word} second")
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            found[commit] = {"README.md": CARD["text"].encode(), "main/train.jsonl": lines.encode()}
        return found

    hub.repositories["datasets/some/chats"] = commits("old")
    hub.push = lambda: hub.repositories["datasets/some/chats"].update(commits("old", "new"))
    done = ask(hub, tmp_path / "home", READ_CHATS)
    assert done.returncode == 0, done.stderr[-3000:]
    keyed, train, test = done.stdout.splitlines()[-3:]
    assert keyed.count(COMMITS[0]) == 2
    assert train == "train hub:some/chats:1 old first"
    assert test == "test hub:some/chats:2 old second"
