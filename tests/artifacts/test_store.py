import json

import pytest

from sqft_export.artifacts.store import MANIFEST, Store, key_of
from sqft_export.errors import UserError

FACTS = {"stage": "prune", "version": 1, "options": {"sparsity": 0.5}}


def sealed(store: Store):
    partial = store.open_partial("prune", key_of(FACTS), resumes=False)
    (partial / "deep").mkdir()
    (partial / "deep" / "weights").write_bytes(b"12345")
    return store.seal(partial, "prune", FACTS, {"zeros": 3}, 1.5)


def test_a_sealed_artifact_is_found_by_its_facts_alone(tmp_path):
    store = Store(tmp_path)
    artifact = sealed(store)
    found = store.find("prune", key_of(FACTS))
    assert found is not None
    assert found.metrics == {"zeros": 3}
    assert found.path == artifact.path == tmp_path / f"prune-{key_of(FACTS)[:16]}"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"options": {"sparsity": 0.6}}, {"stage": "other"}]
)
def test_other_facts_are_another_artifact(tmp_path, change):
    store = Store(tmp_path)
    sealed(store)
    assert store.find("prune", key_of(FACTS | change)) is None


def test_what_is_not_sealed_is_not_found(tmp_path):
    store = Store(tmp_path)
    partial = store.open_partial("prune", key_of(FACTS), resumes=False)
    (partial / "weights").write_bytes(b"half")
    assert store.find("prune", key_of(FACTS)) is None
    assert not any((store.open_partial("prune", key_of(FACTS), resumes=False)).iterdir())


def test_a_stage_that_resumes_finds_its_files_again(tmp_path):
    store = Store(tmp_path)
    partial = store.open_partial("prune", key_of(FACTS), resumes=True)
    (partial / "step").write_text("7")
    (partial / MANIFEST).write_text("{}")
    again = store.open_partial("prune", key_of(FACTS), resumes=True)
    assert [p.name for p in again.iterdir()] == ["step"]


def test_damage_is_found_and_named(tmp_path):
    store = Store(tmp_path)
    weights = sealed(store).path / "deep" / "weights"
    weights.write_bytes(b"12346")
    with pytest.raises(UserError, match=r"weights is damaged.*delete .* and run again"):
        store.find("prune", key_of(FACTS))
    weights.unlink()
    with pytest.raises(UserError, match="missing or added files: deep/weights"):
        store.find("prune", key_of(FACTS))


def test_a_broken_or_foreign_manifest_is_named(tmp_path):
    store = Store(tmp_path)
    manifest = sealed(store).path / MANIFEST
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(document | {"key": "0" * 64}))
    with pytest.raises(UserError, match="its seal is broken"):
        store.find("prune", key_of(FACTS))
    del document["seal"]
    document["key"] = "0" * 64
    manifest.write_text(json.dumps(document | {"seal": key_of(document)}))
    with pytest.raises(UserError, match="belongs to another key"):
        store.find("prune", key_of(FACTS))
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        store.find("prune", key_of(FACTS))
