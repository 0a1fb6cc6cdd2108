"""Whatever a model folder, a deployment or a command line holds: a result, or one message, soon."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import small_recipe
from sqft_export import cli
from sqft_export.errors import UserError
from sqft_export.packed.execution import specialize
from sqft_export.packed.folders import pack, unpack
from sqft_export.packed.loaders import load_gguf, load_onnx, load_openvino
from sqft_export.packed.seal import require_seal
from sqft_export.plan.checks import check_recipe
from sqft_export.report.runs import compare_runs
from sqft_export.targets.folder import runtime_of
from sqft_export.targets.inspect import inspect_folder

SCREEN = 6000  # characters
WRITING = ("pack", "specialize")
SECONDS = 10  # of what reads a model of a few megabytes, on a busy machine
VALUES: list = [None, True, -1, 0, 1, 2**40, 2**70, 1e30, float("nan"), "", "x", "../x", "\x00"]
VALUES += [[], {}, [1], ["x"], {"a": 1}, [[]], "9" * 400, "/dev/zero", 0.5, -0.0, "float16"]


def mutate_json(rng: random.Random, text: bytes) -> bytes:
    """One value of a document replaced, or a key left out."""
    document = json.loads(text)
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list) and len(places) < 400:
                walk(node[key])

    walk(document)
    node, key = rng.choice(places[:400])
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(document).encode()


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bits flipped, a part cut, doubled or filled, mostly near the start, where headers are."""
    if not content:
        return b"x"
    span = len(content) if rng.random() < 0.3 else min(len(content), 2000)
    at, length = rng.randrange(span), rng.choice([1, 1, 8, 100])
    kind = rng.randrange(5)
    if kind == 0:
        return content[:at]
    piece = content[at : at + length]
    if kind == 1:
        piece = bytes(b ^ (1 << rng.randrange(8)) for b in piece)
    elif kind == 2:
        piece = piece * 3
    elif kind == 3:
        piece = rng.choice([b"\xff", b"\x00", b"9", b"{", b'"']) * length
    else:
        piece = b""
    return content[:at] + piece + content[at + length :]


def mutate(rng: random.Random, folder: Path) -> str:
    """One file of a folder; returns what was done, to find it again."""
    file = rng.choice(sorted(f for f in folder.rglob("*") if f.is_file()))
    content = file.read_bytes()
    is_json = file.suffix == ".json" and len(content) < 10**5 and rng.random() < 0.7
    file.unlink()
    if rng.random() > 0.03:
        file.write_bytes((mutate_json if is_json else mutate_bytes)(rng, content))
    return file.name


def check(work: Callable[[], object], said: str) -> None:
    started = time.monotonic()
    try:
        work()
    except UserError as error:
        assert 0 < len(str(error)) < SCREEN, said
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
    assert time.monotonic() - started < SECONDS, said


def try_folder(source: Path, work: Callable[[Path], object], tmp_path: Path, seeds: range) -> None:
    for seed in seeds:
        folder = tmp_path / "mutated"
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        rng = random.Random(seed)
        if rng.random() < 0.5:  # an untrusted folder has no seal
            (folder / "provenance.json").unlink(missing_ok=True)
        name = mutate(rng, folder)
        check(lambda folder=folder: work(folder), f"seed {seed}, {name}")
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def plan(folder: Path) -> None:
    check_recipe(small_recipe("quantize.group_size=32", model_path=folder), folder)


def unpack_beside(folder: Path) -> None:
    unpack(folder, folder.parent / "plain")


def pack_beside(folder: Path) -> None:
    """What was packed can be unpacked."""
    pack(folder, folder.parent / "packed")
    unpack(folder.parent / "packed", folder.parent / "plain")


def specialize_beside(folder: Path) -> None:
    specialize(folder, folder.parent / "sparse")


LOADERS = {"openvino": load_openvino, "onnx": load_onnx, "gguf": load_gguf}
DEPLOYMENTS = {
    "inspect": ("model", inspect_folder),
    "inspect packed": ("packed", inspect_folder),
    "load": ("packed", lambda folder: LOADERS[runtime_of(folder)](folder)),
    "unpack": ("packed", unpack_beside),
    "pack": ("model", pack_beside),
    "specialize": ("model", specialize_beside),
    "verify": ("model", require_seal),
    "verify packed": ("packed", require_seal),
}


def deployments(tiny_run, tmp_path, how: str, runtime: str, seeds: range) -> None:
    name, work = DEPLOYMENTS[how]
    source = tiny_run[f"export-{runtime}"].path / name
    try_folder(source, work, tmp_path / "work", seeds)


def test_mutated_models_are_planned_or_refused(random_llama, tmp_path):
    try_folder(random_llama, plan, tmp_path / "work", range(50))


@pytest.mark.slow
def test_two_thousand_mutated_models_are_planned_or_refused(random_llama, tmp_path):
    try_folder(random_llama, plan, tmp_path / "work", range(1000, 3000))


@pytest.mark.parametrize("how", DEPLOYMENTS)
@pytest.mark.parametrize("runtime", ["openvino", "onnx", "gguf"])
def test_mutated_deployments_are_read_or_refused(tiny_run, tmp_path, how, runtime):
    deployments(tiny_run, tmp_path, how, runtime, range(6))


@pytest.mark.slow
@pytest.mark.parametrize("how", DEPLOYMENTS)
@pytest.mark.parametrize("runtime", ["openvino", "onnx", "gguf"])
def test_many_mutated_deployments_are_read_or_refused(tiny_run, tmp_path, how, runtime):
    deployments(tiny_run, tmp_path, how, runtime, range(1000, 1300))


def reports(tiny_run, tmp_path, seeds: range) -> None:
    text = (tiny_run["report"].path / "report.json").read_bytes()
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "report.json").write_bytes(text)
    for seed in seeds:
        rng = random.Random(seed)
        change = mutate_json if rng.random() < 0.8 else mutate_bytes
        (other / "report.json").write_bytes(change(rng, text))
        check(lambda: compare_runs([one, other], tmp_path / "page"), f"seed {seed}")


def test_mutated_reports_are_compared_or_refused(tiny_run, tmp_path):
    reports(tiny_run, tmp_path, range(10))


@pytest.mark.slow
def test_many_mutated_reports_are_compared_or_refused(tiny_run, tmp_path):
    reports(tiny_run, tmp_path, range(1000, 1400))


COMMANDS = ["plan", "inspect", "pack", "unpack", "compare", "verify", "export", "list", "sweep"]
WORDS = ["", "-", "--", "--json", "--out", "-1", "x=1", "=", "a.b=", "$HOME", "/dev/null"]
WORDS += ["nope", ".", "/", "recipes/tiny.yaml", "--runs", "--over", "--model-path", "targets"]
WORDS += ["\udcff", "x" * 5000, "--help", "sparsify.sparsity=2", "--only", "onnx", "0", "[", "{}"]


def command_lines(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        words = [rng.choice(COMMANDS), *rng.choices(WORDS, k=rng.randrange(4))]
        if words[0] in ("pack", "unpack", "verify", "plan") and ("/" in words or "." in words):
            continue  # a tree that is not ours
        started = time.monotonic()
        done = CliRunner().invoke(cli.app, words, standalone_mode=True)
        allowed = (UserError, SystemExit, OSError, ModuleNotFoundError)
        assert done.exception is None or isinstance(done.exception, allowed), (words, done)
        assert time.monotonic() - started < SECONDS, words


def test_command_lines_end_in_a_result_or_a_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command_lines(range(100))


@pytest.mark.slow
def test_two_thousand_command_lines_end_in_a_result_or_a_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command_lines(range(1000, 3000))


@pytest.mark.parametrize(
    ("runtime", "form"), [("openvino", "model"), ("onnx", "model"), ("gguf", "packed")]
)
def test_files_that_are_none_are_refused_in_bounded_memory_and_time(
    tiny_run, tmp_path, runtime, form
):
    """Pipes, devices, links in circles, folders and files of 48 GiB in place of each file."""
    source = tiny_run[f"export-{runtime}"].path / form
    script = Path(__file__).parent / "hostile_commands.py"
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) > 40, (lines[-1:], done.stderr[-2000:])
    for case, found in zip(lines[::2], lines[1::2], strict=True):
        assert found["code"] in (2, 4) or case["case"][1] == "folder", (case, found)
        assert found["code"] in (0, 2, 3, 4) and found["seconds"] < SECONDS, (case, found)
        assert found["left"] == (found["code"] == 0 and case["case"][3] in WRITING), (case, found)
        assert found["said"].count("\n") <= 1 and len(found["said"]) < SCREEN, (case, found)
