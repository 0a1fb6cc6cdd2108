"""A file is hashed once while it stands as it was; verify hashes always."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from conftest import TINY, copy_run, small_recipe
from sqft_export.artifacts.hashes import HASHES_FILE, FileHashes
from sqft_export.artifacts.store import Store, check_artifact, key_of, sha256_of
from sqft_export.errors import DamagedError
from sqft_export.run.pipeline import plan_passes, run_recipe

FACTS = {"stage": "prune"}


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are read whole from here on."""
    names: list[str] = []
    plain = hashlib.file_digest

    def counted(stream, algorithm):
        names.append(Path(f"/proc/self/fd/{stream.fileno()}").readlink().name)
        return plain(stream, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def sealed(root, content=b"12345"):
    store = Store(root)
    partial = store.open_partial("prune", key_of(FACTS), resumes=False)
    (partial / "weights").write_bytes(content)
    return store.seal(partial, "prune", FACTS, {}, 1.0)


def find(root):
    return Store(root).find("prune", key_of(FACTS))


def test_a_sealed_file_is_not_hashed_again(tmp_path, hashed):
    sealed(tmp_path)
    assert hashed == ["weights"]
    assert find(tmp_path) is not None
    assert hashed == ["weights"]


@pytest.mark.parametrize("content", [b"12346", b"123456"])
def test_a_file_that_was_written_again_is(tmp_path, hashed, content):
    """In the same place and at once, of the same size."""
    (sealed(tmp_path).path / "weights").write_bytes(content)
    with pytest.raises(DamagedError, match="weights is damaged"):
        find(tmp_path)


def test_a_file_in_place_of_another_is(tmp_path, hashed):
    """The same size and time, but another inode."""
    weights = sealed(tmp_path).path / "weights"
    stat = weights.stat()
    (tmp_path / "other").write_bytes(b"12346")
    os.utime(tmp_path / "other", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "other").replace(weights)
    with pytest.raises(DamagedError, match="weights is damaged"):
        find(tmp_path)


def test_verify_trusts_nothing_that_is_remembered(tmp_path):
    """A flip that puts the time back is found by hashing alone."""
    weights = sealed(tmp_path).path / "weights"
    stat = weights.stat()
    weights.write_bytes(b"12346")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert find(tmp_path) is not None
    with pytest.raises(DamagedError, match="weights is damaged"):
        check_artifact(weights.parent)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"1-2": 3}', "\ud800", "[" * 100_000, "entry"],
    ids=["empty", "cut", "list", "no-entry", "no-text", "nested", "wrong-digest"],
)
def test_a_damaged_memory_is_ignored(tmp_path, hashed, text):
    artifact = sealed(tmp_path)
    file = tmp_path / HASHES_FILE
    if text == "entry":
        entries = json.loads(file.read_text())
        text = json.dumps({inode: [*e[:2], "0" * 63 + "x"] for inode, e in entries.items()})
    file.write_bytes(text.encode(errors="surrogatepass"))
    assert find(tmp_path).manifest == artifact.manifest
    assert hashed == ["weights", "weights"]


def test_a_memory_that_can_not_be_written_costs_time_alone(tmp_path):
    (tmp_path / HASHES_FILE).mkdir()
    hashes = FileHashes(tmp_path, sha256_of)
    (tmp_path / "file").write_bytes(b"1")
    assert hashes.sha256_of(tmp_path / "file") == hashlib.sha256(b"1").hexdigest()
    hashes.save()
    assert (tmp_path / HASHES_FILE).is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {HASHES_FILE, "file"}


def test_a_link_in_place_of_the_memory_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    root = tmp_path / "run"
    root.mkdir()
    (root / HASHES_FILE).symlink_to(victim)
    sealed(root)
    assert victim.read_text() == "precious"


def test_a_sweep_hashes_the_base_once(tmp_path, hashed):
    """Every combination is planned in a separate store, as ``sweep`` does it."""
    base = shutil.copytree(TINY, tmp_path / "base")
    root = tmp_path / "run"
    root.mkdir()
    for number, sparsity in enumerate((0.3, 0.5, 0.7)):
        plan_passes(small_recipe(f"sparsify.sparsity={sparsity}"), base, Store(root))
        if not number:
            assert hashed.count("model.safetensors") == 1
            hashed.clear()
    assert not hashed


def test_a_cached_run_reads_no_file_whole(tiny_run, hashed):
    root = tiny_run["merge"].path.parent
    run_recipe(small_recipe(), root)  # the fixture's files may have been younger than a clock tick
    hashed.clear()
    again = run_recipe(small_recipe(), root)
    assert again.keys() == tiny_run.keys()
    assert not hashed


def test_a_copied_run_is_hashed(tiny_run, tmp_path, hashed):
    root = copy_run(tiny_run, tmp_path)
    run_recipe(small_recipe(), root)
    assert "model.safetensors" in hashed
