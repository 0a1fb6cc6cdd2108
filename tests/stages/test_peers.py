"""Models that are quantized after LoRA: made from one training, on the recipe's grid, measured."""

import json

import numpy as np

from sqft_export.inference.locate import deployments_of_run, find_deployment
from sqft_export.packed.seal import check_seal
from sqft_export.report.document import read_report
from sqft_export.targets import target

GRID_ROWS = ["lora-then-int4-gguf", "lora-then-int4-openvino"]


def test_peers_are_rows_in_their_own_runtimes_with_paired_tests(tiny_run):
    rows = {row.id: row for row in read_report(tiny_run["report"].path / "report.json").rows}
    peers = {id: row for id, row in rows.items() if row.kind == "peer"}
    assert sorted(peers) == [*GRID_ROWS, "lora-then-q4_k_m"]
    assert [peers[id].runtime for id in sorted(peers)] == ["gguf", "openvino", "gguf"]
    assert all(row.sparsity == 0 and row.tokens_per_second > 0 for row in peers.values())
    assert set(rows["openvino"].p_same_as_peers) == set(peers)
    # Equal bytes: the same grid and the same exporter.
    for runtime in ("openvino", "gguf"):
        ours, theirs = rows[runtime], rows[f"lora-then-int4-{runtime}"]
        assert abs(ours.file_bytes - theirs.file_bytes) < 0.01 * ours.file_bytes


def test_the_peers_grid_is_that_of_the_recipe_and_dense(tiny_run):
    folder = tiny_run["peers-grid"].path / GRID_ROWS[1]
    ours = dict(target("openvino").read_back(tiny_run["export-openvino"].path / "model"))
    theirs = dict(target("openvino").read_back(folder))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert weight.scale.shape == ours[name].scale.shape
        middle = 2 ** (weight.bits - 1)
        assert np.mean(weight.codes == middle) < 0.3 < np.mean(ours[name].codes == middle)


def test_fallbacks_are_listed_under_the_tables(tiny_run):
    folder = tiny_run["report"].path
    note = "LoRA, then Q4_K_M, llama.cpp: 4 of 28 matrices are not K-quants"
    assert note in (folder / "report.md").read_text()
    assert note in (folder / "index.html").read_text()


def test_a_recommended_peer_is_found_and_sealed(tiny_run):
    run = tiny_run["report"].path.parent
    report = read_report(tiny_run["report"].path / "report.json")
    found = {one.path.name: one for one in deployments_of_run(run)}
    assert {*GRID_ROWS, "lora-then-q4_k_m"} <= set(found)
    for name in (*GRID_ROWS, "lora-then-q4_k_m"):
        assert check_seal(found[name].path, whole=True)
        assert "quantized afterwards" in (found[name].path / "README.md").read_text()
    assert find_deployment(run).row.id == report.best.id == report.recommendation.id


def test_the_verdict_compares_with_a_peer_and_not_with_torch(tiny_run):
    document = json.loads((tiny_run["report"].path / "report.json").read_text())
    assert document["verdict"].startswith("Take ")
    assert document["recommendation"]["peer"].startswith("lora-then-")
    assert "torch" not in document["verdict"]
