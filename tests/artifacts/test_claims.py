"""Several workers in one folder: one makes an artifact, the others wait or take over."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from sqft_export.artifacts import claims
from sqft_export.artifacts.claims import ClaimLostError, claim_artifact, claimed_folder
from sqft_export.artifacts.store import MANIFEST, Store, key_of
from sqft_export.errors import HostError

FACTS = {"stage": "prune", "version": 1, "options": {}, "reads": {}, "parents": {}}
KEY = key_of(FACTS)
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(claims, "EXPIRY_SECONDS", 0.5)
    monkeypatch.setattr(claims, "CLAIM_POLL_SECONDS", 0.02)


def claim_of(store: Store, waits: list[str] | None = None):
    path = store.path_of("prune", KEY)
    report = waits.append if waits is not None else lambda _owner: None
    return claim_artifact(path, (path / MANIFEST).exists, report)


def make(store: Store, content: str, seconds: float = 0.0) -> bool:
    """Make the artifact; returns whether this worker has sealed it."""
    with claim_of(store) as claim:
        if claim is None:
            return False
        partial = store.open_partial("prune", KEY, True, claim)
        (partial / "weights").write_text(content)
        time.sleep(seconds)
        store.seal(partial, "prune", FACTS, {}, 1.0, claim)
        return True


def make_in_process(root: Path, name: str, results) -> None:
    results.put((name, make(Store(root), name, 0.3)))


def test_one_of_four_workers_makes_the_artifact(tmp_path):
    results = fork.Queue()
    workers = [
        fork.Process(target=make_in_process, args=(tmp_path, str(number), results))
        for number in range(4)
    ]
    for worker in workers:
        worker.start()
    made = dict(results.get(timeout=30) for _ in workers)
    for worker in workers:
        worker.join()
    (winner,) = [name for name, sealed in made.items() if sealed]
    found = Store(tmp_path).find("prune", KEY)
    assert (found.path / "weights").read_text() == winner
    assert {entry.name for entry in tmp_path.iterdir()} == {found.path.name, "hashes.json"}


def hold_for_ever(root: Path, holds) -> None:
    store = Store(root)
    with claim_of(store) as claim:
        (store.open_partial("prune", KEY, True, claim) / "block-0").write_text("finished")
        holds.set()
        time.sleep(60)


def test_a_killed_worker_is_replaced_at_once_and_its_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "EXPIRY_SECONDS", 60)
    holds = fork.Event()
    worker = fork.Process(target=hold_for_ever, args=(tmp_path, holds))
    worker.start()
    assert holds.wait(30)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    waits: list[str] = []
    with claim_of(Store(tmp_path), waits) as claim:
        assert (claim.partial / "block-0").read_text() == "finished"
        assert len(claims.partial_folders(claim.path)) == 1
    assert not waits


def test_a_suspended_worker_loses_its_claim_and_publishes_nothing(tmp_path, monkeypatch):
    """The first worker stops renewing (a suspended machine); the second takes over and seals."""
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 1000)
    store, other = Store(tmp_path), Store(tmp_path)
    path, waits = store.path_of("prune", KEY), list[str]()
    with claim_of(store) as first:
        partial = store.open_partial("prune", KEY, True, first)
        (partial / "weights").write_text("first")
        with claim_of(other, waits) as second:
            assert second.number == 2 and second.partial != first.partial
            assert claimed_folder(path) == second.partial
            assert (second.partial / "weights").read_text() == "first"
            (partial / "weights").write_text("late")  # the first one wakes up
            with pytest.raises(ClaimLostError, match="another worker has taken over"):
                store.seal(partial, "prune", FACTS, {}, 1.0, first)
            other.seal(second.partial, "prune", FACTS, {}, 1.0, second)
    assert (path / "weights").read_text() == "first"
    assert len(waits) == 1 and f"process {os.getpid()} on " in waits[0]
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "hashes.json"}


def test_a_sealed_artifact_is_not_replaced(tmp_path):
    store = Store(tmp_path)
    with claim_of(store) as claim:
        late = store.open_partial("prune", KEY, False, claim)
        (late / "weights").write_text("late")
        early = tmp_path / "early"
        early.mkdir()
        (early / "weights").write_text("early")
        store.seal(early, "prune", FACTS, {}, 1.0)
        late.mkdir(exist_ok=True)
        with pytest.raises(ClaimLostError, match="another worker has sealed it"):
            store.seal(late, "prune", FACTS, {}, 1.0, claim)
    assert (store.path_of("prune", KEY) / "weights").read_text() == "early"


def test_a_folder_that_allows_no_claim_is_named(tmp_path, monkeypatch):
    def refuse(*_args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(claims.os, "open", refuse)
    with pytest.raises(HostError, match=r"can't claim a pass here: Read-only file system"):
        make(Store(tmp_path), "text")


def test_claims_need_no_file_locks(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert make(Store(tmp_path), "text")
