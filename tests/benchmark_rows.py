"""Rows of a benchmark for tests, with plain values in all fields that a test does not set."""

from typing import Any

from sqft_export.machine.counters import machine_facts
from sqft_export.measure.results import (
    BenchmarkResults,
    BenchmarkRow,
    BenchmarkSettings,
    LatencySpread,
)

NAMES = {
    "dense": ("base", "dense base", "torch"),
    "dense-lora": ("baseline", "dense + LoRA", "torch"),
    "sparse": ("compressed", "sparse", "torch"),
    "sparse-quantized": ("compressed", "sparse + INT4", "torch"),
    "adapted": ("adapted", "tuned, unmerged", "torch"),
    "merged": ("merged", "merged", "torch"),
    "openvino": ("deployment", "OpenVINO", "openvino"),
    "onnx": ("deployment", "ONNX Runtime", "onnx"),
    "gguf": ("deployment", "llama.cpp", "gguf"),
    "gguf-packed": ("deployment", "llama.cpp, packed", "gguf"),
}


def benchmark_row(id: str, accuracy: float = 0.5, tpot: float = 5.0, **fields: Any) -> BenchmarkRow:
    """A row with an interval of 5 points around its accuracy, and latencies without spread."""
    kind, name, runtime = NAMES[id]
    spread = LatencySpread(median_ms=tpot, p10_ms=tpot, p90_ms=tpot)
    values = {
        "name": name,
        "device": "cpu",
        "interval": (max(0.0, accuracy - 0.05), min(1.0, accuracy + 0.05)),
        "p_same_as_first": None,
        "p_same_as_lora": None,
        "accuracy_by_set": {},
        "sparsity": 0.5,
        "file_bytes": 1_000_000,
        "bits_per_weight": 4.0,
        "ttft": spread,
        "tpot": spread,
        "load_seconds": 1.0,
        "perplexity": 3.0,
        "token_accuracy": 0.5,
        "score_seconds": 1.0,
        "steady_memory_bytes": 10**8,
        "peak_memory_bytes": 10**8,
    }
    values = {"id": id, "kind": kind, "runtime": runtime, "accuracy": accuracy} | values | fields
    return BenchmarkRow(**values)


def benchmark_results(*rows: BenchmarkRow) -> BenchmarkResults:
    """``results.json`` of a benchmark with these rows."""
    settings = BenchmarkSettings(
        items=8,
        items_sha256="0" * 64,
        threads=2,
        rounds=1,
        latency_prompt_tokens=32,
        latency_new_tokens=4,
        latency_repeats=2,
    )
    return BenchmarkResults(settings=settings, machine=machine_facts(), rows=list(rows), samples=[])
