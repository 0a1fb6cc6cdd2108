"""Untrusted deployments: no code runs, no link leaves the folder, no file is half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import xxhash

import sqft_export
from conftest import SQFT
from sqft_export.errors import DamagedError, HostError, UserError
from sqft_export.packed.container import MAGIC, MAX_REGIONS, PackedFile, Writer
from sqft_export.packed.folders import NothingSaved, pack, unpack
from sqft_export.packed.seal import check_seal
from sqft_export.targets.inspect import inspect_folder


@pytest.fixture
def dense(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run["export-onnx"].path / "model", tmp_path / "dense"))


@pytest.fixture
def ir(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run["export-openvino"].path / "model", tmp_path / "ir"))


def container(regions: list[dict], size: int, payload: bytes = b"") -> bytes:
    header = {"version": 1, "file": "model.onnx.data", "size": size, "sha256": "0" * 64}
    text = json.dumps(header | {"regions": regions}).encode()
    whole = MAGIC + len(text).to_bytes(8, "little") + text + xxhash.xxh3_128_digest(text)
    return whole + bytes(-len(whole) % 64) + payload


def raw(at: int, size: int, stored: int | None = None) -> dict:
    digest = xxhash.xxh3_128_hexdigest(b"")
    frames = None if stored is None else [stored]
    piece = {"at": 0, "size": size if stored is None else stored, "bytes": size}
    piece |= {"xxh3_128": digest} | ({} if frames is None else {"frames": frames})
    return {"kind": "raw", "at": at, "size": size, "data": piece}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (container([raw(0, 2**38, 64)], 2**38, bytes(64)), "times its stored bytes"),
        (container([raw(0, 0)] * 3, 0), "an empty region"),
        (container([raw(i, 1) for i in range(MAX_REGIONS + 1)], MAX_REGIONS + 1), "regions, at"),
    ],
)
def test_a_bomb_is_refused_before_anything_is_written(dense, tmp_path, content, message):
    (dense / "model.onnx.data").unlink()
    (dense / "model.onnx.data.sqft").write_bytes(content)
    with pytest.raises(DamagedError, match=message):
        unpack(dense, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_too_little_room_to_unpack_leaves_nothing(dense, tmp_path, monkeypatch):
    pack(dense, tmp_path / "packed")
    nothing = shutil.disk_usage(tmp_path)._replace(free=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nothing)
    with pytest.raises(HostError, match=r"out: 2.* MiB needed, 5 bytes free"):
        unpack(tmp_path / "packed", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_container_of_another_file_is_refused_by_every_loader(dense, ir, tmp_path):
    """Every piece is right by its own digest; only that of the whole file tells."""
    for folder, name, load in (
        (dense, "model.onnx.data", sqft_export.load_onnx),
        (ir, "openvino_model.bin", sqft_export.load_openvino),
    ):
        (folder / "provenance.json").unlink()
        content = np.fromfile(folder / name, np.uint8)
        content[-1] ^= 1
        writer = Writer(folder / f"{name}.sqft", entropy=False)
        writer.raw(0, content)
        writer.finish(name, len(content), "0" * 64)
        (folder / name).unlink()
        with pytest.raises(DamagedError, match="differs from the file that was packed"):
            load(folder)


@pytest.mark.parametrize("where", ["weights", "companion"])
def test_links_out_of_a_folder_are_not_followed(dense, tmp_path, where):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (dense / "link.json").symlink_to(secret if where == "companion" else "/dev/zero")
    with pytest.raises(UserError, match=r"link.json: is a link to .*, outside the folder"):
        pack(dense, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


def test_a_pipe_is_no_file_of_a_deployment(dense, tmp_path):
    os.mkfifo(dense / "pipe.json")
    with pytest.raises(UserError, match=r"pipe.json: is no regular file"):
        pack(dense, tmp_path / "packed")


def test_a_folder_is_not_copied_into_itself(dense):
    with pytest.raises(UserError, match="lies within"):
        pack(dense, dense / "packed")


@pytest.mark.parametrize("key", ["length", "offset"])
def test_lengths_of_an_onnx_graph_are_not_believed(dense, tmp_path, key):
    model = onnx.load(dense / "model.onnx", load_external_data=False)
    stored = next(t for t in model.graph.initializer if t.name.endswith(".B"))
    next(e for e in stored.external_data if e.key == key).value = str(10**15)
    onnx.save(model, dense / "model.onnx")
    with pytest.raises(UserError, match=r"model.onnx: .*: bytes \d+ to \d+ are not in a weight"):
        pack(dense, tmp_path / "packed")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('size="', 'size="18446744073709551'),
        ('offset="', 'offset="-1'),
        ('shape="256, ', 'shape="99999999999, '),
    ],
)
def test_sizes_of_an_ir_are_not_believed(ir, tmp_path, old, new):
    graph = (ir / "openvino_model.xml").read_text()
    assert old in graph
    (ir / "openvino_model.xml").write_text(graph.replace(old, new))
    refused = r"openvino_model.xml: .* (are not|a weight file|digits is expected)"
    with pytest.raises(UserError, match=refused):
        pack(ir, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


def test_a_copy_that_would_not_be_smaller_is_not_made(dense, tmp_path):
    rng = np.random.default_rng(0)
    size = (dense / "model.onnx.data").stat().st_size
    rng.integers(1, 255, size, np.uint8).tofile(dense / "model.onnx.data")
    with pytest.raises(NothingSaved, match="it was not packed"):
        pack(dense, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


def test_a_library_in_a_strangers_config_is_not_run(dense, tmp_path):
    config = json.loads((dense / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]
    options["custom_ops_library"] = "evil.so"
    (dense / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"custom_ops_library: 'evil.so' is a library that would"):
        sqft_export.load_onnx_genai(dense)
    with pytest.raises(UserError, match=r"Runtime GenAI can't load it: .*evil"):  # asked for now
        sqft_export.load_onnx_genai(dense, trust_custom_ops=True)
    del options["custom_ops_library"]
    config["model"]["decoder"]["filename"] = "../elsewhere.onnx"
    (dense / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a file of the folder is expected"):
        sqft_export.load_onnx_genai(dense)


def test_modules_in_the_current_folder_are_not_run(dense):
    mark = dense / "EXECUTED"
    (dense / "resource.py").write_text(f"open({str(mark)!r}, 'w').write('run')\n")
    (dense / "provenance.json").unlink()
    options = ("--rounds", "1", "--prompt-tokens", "8", "--batch", "1", "--new-tokens", "2")
    done = subprocess.run(
        [SQFT, "benchmark", ".", *options], cwd=dense, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_a_worker_ends_with_its_parent(dense, tmp_path):
    code = (
        "import os, sys, subprocess, time\n"
        "from sqft_export.machine.host import die_with_parent\n"
        "child = subprocess.Popen([sys.executable, '-c', "
        "f'from sqft_export.machine.host import die_with_parent; die_with_parent({os.getpid()}); "
        "import time; print(1, flush=True); time.sleep(60)'], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text():
            return
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError("the worker is still there")


@pytest.mark.parametrize("name", ["openvino", "onnx", "gguf"])
def test_inspect_reads_packed_folders(tiny_run, name):
    folder = tiny_run[f"export-{name}"].path
    dense, packed = inspect_folder(folder / "model"), inspect_folder(folder / "packed")
    assert packed["layers"] == dense["layers"] and packed["sealed"]


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "README.md"]
)
def test_a_changed_file_breaks_the_seal_by_name(dense, name):
    assert check_seal(dense, whole=True)
    with (dense / name).open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-2, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DamagedError, match=f"{name}: is not the file that was sealed"):
        check_seal(dense, whole=True)
    done = subprocess.run([SQFT, "verify", str(dense)], capture_output=True, text=True, check=False)
    assert done.returncode == 4 and name in done.stderr


def test_a_cut_weight_file_is_found_when_loaded(dense):
    with (dense / "model.onnx.data").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(DamagedError, match=r"model.onnx.data: is not the file that was sealed"):
        sqft_export.load_onnx(dense)


def test_what_was_added_or_taken_away_breaks_the_seal(dense):
    (dense / "more.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"was added after it was sealed: more.json"):
        check_seal(dense, whole=True)
    (dense / "more.json").unlink()
    (dense / "tokenizer.json").unlink()
    with pytest.raises(DamagedError, match=r"tokenizer.json: is missing"):
        check_seal(dense, whole=True)


def test_packed_weights_of_another_deployment_break_the_seal(dense, tmp_path):
    pack(dense, tmp_path / "packed")
    assert check_seal(tmp_path / "packed", whole=True)
    file = tmp_path / "packed" / "model.onnx.data.sqft"
    with PackedFile(file) as opened:
        content = opened.inflate()
    content[-1] ^= 1
    file.unlink()
    writer = Writer(file, entropy=False)
    writer.raw(0, content)
    writer.finish("model.onnx.data", len(content), "1" * 64)
    with pytest.raises(DamagedError, match=r"holds other weights than provenance.json lists"):
        check_seal(tmp_path / "packed", whole=False)


def test_provenance_says_where_a_deployment_is_from(tiny_run):
    folder = tiny_run["export-openvino"].path / "model"
    document = json.loads((folder / "provenance.json").read_text())
    facts = tiny_run["sparsify"].manifest["facts"]
    assert document["base"]["sha256"] == facts["reads"]["model"]
    assert document["base"]["model"] == "builtin:tiny"
    assert document["passes"]["sparsify"]["options"]["sparsify.sparsity"] == 0.5
    assert {"sparsify", "quantize", "adapt", "search", "merge"} <= document["passes"].keys()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: builtin:tiny\n") and "INT4, symmetric" in card
    assert document["base"]["sha256"] in card
