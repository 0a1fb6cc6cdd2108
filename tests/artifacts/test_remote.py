"""Runs in an object store: machines find each other's artifacts and never mix them."""

import concurrent.futures
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from object_store import BUCKET, s3_environment  # noqa: F401

from conftest import ROOT, SQFT
from sqft_export.artifacts import claims
from sqft_export.artifacts.claims import ClaimLostError
from sqft_export.artifacts.remote import Remote, runs_folder, url_of
from sqft_export.artifacts.store import MANIFEST, Store, key_of, open_store
from sqft_export.errors import DamagedError, HostError, UserError
from sqft_export.machine.host import installed

FACTS = {"stage": "prune", "version": 1, "options": {}, "reads": {}, "parents": {}}
KEY = key_of(FACTS)
NAME = f"prune-{KEY[:16]}"


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(claims, "EXPIRY_SECONDS", 1.0)
    monkeypatch.setattr(claims, "CLAIM_POLL_SECONDS", 0.02)


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request, tmp_path) -> str:
    """An empty folder of a recipe in an object store."""
    if request.param == "s3":
        request.getfixturevalue("s3_environment")
        return f"s3://{BUCKET}/{tmp_path.name}/tiny"
    return f"memory://{tmp_path.name}/tiny"


def write(store: Store, content: str, claim=None) -> Path:
    """Write the files of an artifact that is not sealed yet."""
    partial = store.open_partial("prune", KEY, False, claim)
    (partial / "model").mkdir()
    (partial / "model" / "weights").write_text(content)
    (partial / "log").write_text(f"log of {content}")
    return partial


def seal(store: Store, partial: Path, claim=None):
    return store.seal(partial, "prune", FACTS, {}, 1.0, claim)


def content(store: Store) -> list[str]:
    """The files of the artifact, as another machine reads them."""
    path = store.fetch(store.find("prune", KEY)).path
    return [(path / name).read_text() for name in ("model/weights", "log")]


def test_an_artifact_is_found_on_another_machine(tmp_path, url):
    made = seal(first := Store(tmp_path / "1", Remote(url)), write(Store(tmp_path / "1"), "one"))
    other = Store(tmp_path / "2", Remote(url))
    found = other.find("prune", KEY)
    assert found.manifest == made.manifest and not found.path.exists()
    assert content(other) == ["one", "log of one"]
    assert (found.path / MANIFEST).read_bytes() == (made.path / MANIFEST).read_bytes()
    assert {entry.name for entry in (tmp_path / "2").iterdir()} == {NAME}
    assert content(first) == ["one", "log of one"]


def test_half_an_upload_is_not_an_artifact(tmp_path, url, monkeypatch):
    """The network fails after the first file; another machine makes the artifact in full."""
    broken = Store(tmp_path / "1", Remote(url))
    upload, uploaded = broken.remote._fs.put_file, []

    def fail_later(*names, **options):
        if uploaded:
            raise OSError("connection reset")
        uploaded.append(names)
        upload(*names, **options)

    with monkeypatch.context() as patch, pytest.raises(HostError, match="connection reset"):
        patch.setattr(broken.remote._fs, "put_file", fail_later)
        seal(broken, write(broken, "broken"))
    assert len(uploaded) == 1
    other = Store(tmp_path / "2", Remote(url))
    assert other.find("prune", KEY) is None
    seal(other, write(other, "other"))
    assert content(Store(tmp_path / "3", Remote(url))) == ["other", "log of other"]
    # The first machine, which had sealed its own, uses the published one.
    assert content(broken) == ["other", "log of other"]


def test_an_interrupted_upload_is_finished_by_the_next_run(tmp_path, url):
    seal(Store(tmp_path / "1"), write(Store(tmp_path / "1"), "one"))  # offline
    assert content(Store(tmp_path / "1", Remote(url))) == ["one", "log of one"]
    assert content(Store(tmp_path / "2", Remote(url))) == ["one", "log of one"]


def test_the_second_of_two_equal_passes_is_not_published(tmp_path, url):
    """Both were made, as after a suspended machine: the first one is what all machines use."""
    stores = [Store(tmp_path / str(n), Remote(url)) for n in range(2)]
    partial = write(stores[1], "late")
    seal(stores[0], write(stores[0], "early"))
    with pytest.raises(ClaimLostError, match="another machine has published it"):
        seal(stores[1], partial)
    assert [content(store) for store in stores] == [["early", "log of early"]] * 2
    assert content(Store(tmp_path / "3", Remote(url))) == ["early", "log of early"]


def test_a_claim_expires_without_renewal(tmp_path, url, monkeypatch):
    """The owner stops renewing (a suspended machine); another one takes over and publishes."""
    waits: list[str] = []
    stores = [Store(tmp_path / str(n), Remote(url)) for n in range(2)]
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 1000)
    started = time.monotonic()
    with stores[0].claim("prune", KEY, waits.append) as first:
        partial = write(stores[0], "first", first)
        with stores[1].claim("prune", KEY, waits.append) as second:
            assert time.monotonic() - started > claims.EXPIRY_SECONDS
            with pytest.raises(ClaimLostError, match="another worker has taken over"):
                seal(stores[0], partial, first)
            seal(stores[1], write(stores[1], "second", second), second)
    assert len(waits) == 1 and f"process {os.getpid()} on " in waits[0]
    assert content(stores[0]) == content(stores[1]) == ["second", "log of second"]
    assert [name for name in stores[0].remote.names() if "claim" in name] == []


def test_a_renewed_claim_does_not_expire(tmp_path, url):
    stores = [Store(tmp_path / str(n), Remote(url)) for n in range(2)]

    def make(number: int) -> bool:
        with stores[number].claim("prune", KEY, lambda _owner: None) as claim:
            if claim is None:
                return False
            partial = write(stores[number], str(number), claim)
            time.sleep(2 * claims.EXPIRY_SECONDS)
            seal(stores[number], partial, claim)
            return True

    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = list(pool.map(make, range(2)))
    assert sorted(made) == [False, True]
    assert content(stores[0]) == content(stores[1]) == [str(n := made.index(True)), f"log of {n}"]


def test_a_store_without_put_if_absent_is_refused(tmp_path, monkeypatch):
    import fsspec

    system = fsspec.filesystem("memory")
    write_always = system.pipe_file
    monkeypatch.setattr(
        system, "pipe_file", lambda path, value, mode="overwrite": write_always(path, value)
    )
    with pytest.raises(UserError, match=r"replaces an object that must be absent"):
        Remote(f"memory://{tmp_path.name}/tiny")


def test_damaged_objects_are_named(tmp_path, url):
    made = seal(store := Store(tmp_path / "1", Remote(url)), write(Store(tmp_path / "1"), "one"))
    digest = made.manifest["files"]["model/weights"]
    store.remote.replace(f"blobs/{digest}", b"two")
    other = Store(tmp_path / "2", Remote(url))
    with pytest.raises(DamagedError, match=rf"weights is damaged.*{NAME}.json"):
        other.fetch(other.find("prune", KEY))
    assert not other.path_of("prune", KEY).exists()
    store.remote.delete(f"blobs/{digest}")
    with pytest.raises(DamagedError, match=f"model/weights: blobs/{digest} is missing"):
        other.fetch(other.find("prune", KEY))
    store.remote.replace(f"{NAME}.json", b"{}")
    with pytest.raises(DamagedError, match=rf"{NAME}.json is damaged"):
        other.find("prune", KEY)


def test_a_manifest_can_not_name_a_file_outside(tmp_path, url):
    remote = Remote(url)
    with pytest.raises(DamagedError, match=r"\.\./\.\./outside is outside of the artifact"):
        remote.download(NAME, {"../../outside": "0" * 64}, tmp_path / "1" / NAME, MANIFEST)
    assert list(tmp_path.rglob("outside")) == []


def test_the_first_choice_of_a_precision_counts(tmp_path, url):
    stores = [Store(tmp_path / str(n), Remote(url)) for n in range(2)]
    for store, precision in zip(stores, ("float32", "bfloat16"), strict=True):
        store.root.mkdir(parents=True)
        (store.root / "cpu-precision.json").write_text(json.dumps({"precision": precision}))
        (store.root / "hashes.json").write_text("{}")
    assert [store.share_records() for store in stores] == [False, True]
    third = Store(tmp_path / "3", Remote(url))
    for store in (*stores, third):
        assert "float32" in (store.root / "cpu-precision.json").read_text()
    assert not (third.root / "hashes.json").exists()


def test_a_url_has_a_local_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = runs_folder("memory://bucket/runs/")
    assert url_of(folder) == "memory://bucket/runs" and folder.is_relative_to(tmp_path)
    assert runs_folder("memory://bucket/runs") == folder != runs_folder("memory://bucket/other")
    assert open_store(folder / "tiny").remote.url == "memory://bucket/runs/tiny"
    assert runs_folder("runs") == Path("runs") and url_of(Path("runs")) is None
    # A folder that somebody else has made names no URL.
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "url").write_text("memory://bucket/runs")
    assert open_store(foreign / "tiny").remote is None


def test_a_url_of_another_store_is_refused(sqft_here):
    """Such as one whose file system queries first, and creates an object then."""
    done = sqft_here("run", "recipes/tiny.yaml", "--runs", "sftp://host/runs")
    assert done.returncode == 2
    assert "--runs: found sftp://host/runs; allowed are a folder, s3://" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(installed("s3fs"), reason="s3fs is installed")
def test_a_missing_package_is_named(sqft_here, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = sqft_here("run", "recipes/tiny.yaml", "--runs", "s3://bucket/runs")
    assert done.returncode == 2 and "pip install 'sqft-export[s3]'" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


QUICK = (
    *("adapt=none", "calibration.samples=4", "export.targets=[openvino]", "verify.prompts=2"),
    *("export.sparse_files=false", "export.sparse_execution=false", "benchmark.items=2"),
    *("benchmark.repeats=2", "benchmark.rounds=1", "benchmark.new_tokens=2"),
    "benchmark.baselines=[merged]",
)


@pytest.mark.slow
def test_shards_on_two_machines_run_each_pass_once(tmp_path, s3_environment):  # noqa: F811
    """Two cache folders stand for two machines; they share sparsify and compare at the end."""
    over = ("--over", "quantize.bits=4,8", "--runs", f"s3://{BUCKET}/{tmp_path.name}")
    shards = [
        subprocess.Popen(
            [SQFT, "sweep", "recipes/tiny.yaml", *QUICK, *over, "--shard", f"{number}/2"],
            cwd=ROOT,
            env={**os.environ, **s3_environment, "XDG_CACHE_HOME": str(tmp_path / str(number))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    outputs = [shard.communicate() for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0], outputs
    assert any("comparison: " in out for out, _ in outputs), outputs
    names = Remote(f"s3://{BUCKET}/{tmp_path.name}/tiny").names()
    assert sum(n.startswith("sparsify-") for n in names) == 1
    assert sum(n.startswith("quantize-") for n in names) == 2
    assert not [name for name in names if "claim" in name]
    made = [
        json.loads(file.read_text())["environment"]
        for file in tmp_path.glob("*/sqft_export/runs/*/tiny/sparsify-*/manifest.json")
    ]
    assert len(made) == 2 and made[0] == made[1]
