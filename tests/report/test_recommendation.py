"""Which deployment a report recommends: ours, sparse or dense, or one quantized after LoRA."""

import pytest
from benchmark_rows import NAMES, benchmark_row

from sqft_export.measure.results import BenchmarkRow
from sqft_export.report.document import Report
from sqft_export.report.recommendation import recommend
from sqft_export.report.verdict import best_deployment, verdict

GRID, FILE = "lora-then-int4-gguf", "lora-then-q4_k_m"
NAMES |= {
    GRID: ("peer", "LoRA, then GPTQ, llama.cpp", "gguf"),
    FILE: ("peer", "LoRA, then Q4_K_M, llama.cpp", "gguf"),
    "lora-then-nncf": ("peer", "LoRA, then NNCF, OpenVINO", "openvino"),
}
DENSE = benchmark_row("dense", 0.02, 40.0, file_bytes=270_000_000, sparsity=0.0)


def peer(id: str, accuracy: float, megabytes: float, tpot: float = 5.0) -> BenchmarkRow:
    bytes_ = int(megabytes * 1e6)
    return benchmark_row(id, accuracy, tpot, file_bytes=bytes_, sparsity=0.0)


def ours(accuracy: float, megabytes: float, tpot: float = 5.0, p: float = 0.5, **more):
    fields = {"sparsity": 0.5, "file_bytes": int(megabytes * 1e6)} | more
    return benchmark_row("gguf", accuracy, tpot, p_same_as_peers={GRID: p, FILE: p}, **fields)


def found(*rows: BenchmarkRow):
    return recommend(rows, best_deployment(rows))


def test_sparsity_that_costs_accuracy_makes_the_dense_model_the_recommendation():
    rows = [DENSE, peer(GRID, 0.816, 92), ours(0.785, 75, p=0.001)]
    advice = found(*rows)
    assert (advice.id, advice.form) == (GRID, "dense")
    assert advice.text == (
        "Take LoRA, then GPTQ, llama.cpp (dense INT4): 81.6 % (76.6 to 86.6), 3.1 points above "
        "llama.cpp (sparse INT4) (significantly different, McNemar, p = 0.001); 92.0 MB, 123 % of "
        "its bytes; 200 tokens/s, 100 % of its speed; sparsity does not pay off here."
    )
    report = Report.model_construct(rows=rows)
    assert report.best.id == advice.id
    assert verdict(rows, "score of the answer") == advice.text
    assert "times" not in advice.text and "dense base" not in advice.text


@pytest.mark.parametrize(
    ("made", "taken"),
    [
        (ours(0.81, 75), "gguf"),  # fewer bytes at the same accuracy
        (ours(0.81, 92, tpot=4.0), "gguf"),  # faster
        (ours(0.81, 92), GRID),  # sparse, and nothing saved
        (ours(0.80, 75, tpot=4.0), GRID),  # more than a point lost, with too few items for a proof
        (ours(0.84, 92, p=0.01), "gguf"),  # more accurate
        (ours(0.82, 92, sparsity=0.0), "gguf"),  # dense, and as accurate
        (ours(0.80, 92, sparsity=0.0), GRID),
    ],
)
def test_without_a_significant_difference_the_saving_decides(made, taken):
    assert found(DENSE, peer(GRID, 0.816, 92), made).id == taken


def test_the_peer_is_the_most_accurate_at_equal_or_fewer_bytes():
    larger = peer(FILE, 0.83, 105)
    assert found(DENSE, peer(GRID, 0.81, 92.2), larger, ours(0.80, 92)).peer == GRID
    # Next to a packed file all peers are larger: the smallest counts.
    assert found(DENSE, peer(GRID, 0.81, 92), larger, ours(0.80, 75)).peer == GRID
    assert found(DENSE, peer(GRID, 0.81, 92), larger, ours(0.80, 110)).peer == FILE


def test_a_file_of_another_quantizer_is_recommended_by_name():
    advice = found(DENSE, peer(FILE, 0.85, 91), ours(0.80, 92, p=0.001))
    assert advice.form == "peer"
    assert advice.text.startswith("Take LoRA, then Q4_K_M, llama.cpp (another quantizer's file): ")


def test_only_peers_of_the_same_runtime_count_if_there_are_any():
    nncf = peer("lora-then-nncf", 0.9, 80)
    assert found(DENSE, nncf, peer(GRID, 0.81, 92), ours(0.80, 92)).peer == GRID
    advice = found(DENSE, nncf, ours(0.80, 92, tpot=1.0))
    assert advice.peer == "lora-then-nncf" and "of its speed" not in advice.text


def test_plain_text_is_compared_by_perplexity():
    made = ours(0.80, 75).model_copy(update={"p_same_as_peers": {}, "perplexity": 4.0})
    advice = found(DENSE, peer(GRID, 0.80, 92), made)
    assert advice.id == GRID and "no paired test for plain text" in advice.text


def test_without_peers_the_report_says_that_nothing_was_compared():
    advice = found(DENSE, ours(0.8, 92))
    assert advice.id == "gguf" and advice.peer is None
    assert "not known whether tuning through the grid pays off" in advice.text
    assert found(DENSE) is None
