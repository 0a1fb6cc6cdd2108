"""The first line of a report, and which of several runs is worth it."""

import json

import pytest
from benchmark_rows import benchmark_row

from sqft_export.measure.results import BenchmarkRow
from sqft_export.report.verdict import choice, verdict


def row(id: str, accuracy: float, bytes_: float, tpot: float, **more) -> BenchmarkRow:
    interval = (accuracy - 0.07, accuracy + 0.07)
    sizes = {"file_bytes": int(bytes_), "peak_memory_bytes": int(10 * bytes_)}
    return benchmark_row(id, accuracy, tpot, interval=interval, **sizes, **more)


DENSE = row("dense", 0.515, 200e6, 40.0)
LORA = row("dense-lora", 0.645, 200e6, 40.0)
MADE = row("openvino", 0.52, 50e6, 10.0, p_same_as_lora=0.0004, p_same_as_first=0.9)
SLOWER = row("onnx", 0.53, 60e6, 12.0, p_same_as_lora=0.2, p_same_as_first=0.8)


def test_what_was_bought_and_what_it_cost():
    assert verdict([DENSE, LORA, MADE, SLOWER], "answered right") == (
        "OpenVINO, the best deployment: 100 tokens/s, 25 % of the dense base's bytes (50.0 of "
        "200.0 MB), 25 % of its peak memory. "
        "Accuracy: 52.0 % (45.0 to 59.0) answered right, 12.5 points below dense + LoRA's 64.5 %, "
        "significantly different (McNemar, p = 0.0004)."
    )


def test_a_model_that_was_not_trained_is_held_against_the_dense_base():
    said = verdict([DENSE, MADE], "answered right")
    assert "above dense base's 51.5 %, not significantly different (McNemar, p = 0.9)" in said


def test_plain_text_has_no_interval_and_no_test():
    untested = {"interval": None, "p_same_as_first": None}
    plain = [r.model_copy(update=untested) for r in (DENSE, MADE)]
    said = verdict(plain, "tokens predicted right")
    assert said.endswith("52.0 % tokens predicted right, 0.5 points above dense base's 51.5 %.")
    assert choice(plain) is None


@pytest.mark.parametrize("rows", [[DENSE], [MADE], [LORA, MADE]])
def test_without_a_deployment_or_a_dense_base_nothing_is_said(rows):
    assert verdict(rows, "answered right") is None


def test_what_is_worth_it_may_be_dense():
    """The smallest and the fastest of those as good as the best, whatever they are."""
    sparse = row("openvino", 0.40, 20e6, 5.0, name="sparsity 0.7: OpenVINO")
    dense = row("openvino", 0.58, 40e6, 11.0, name="bits 3: OpenVINO")
    best = row("openvino", 0.60, 50e6, 9.0, name="bits 4: OpenVINO")
    assert choice([sparse, dense, best]) == (
        "Most accurate: bits 4: OpenVINO, 60.0 %. Among the 2 whose 95 % interval reaches that, "
        "the smallest is bits 3: OpenVINO (58.0 %, 40.0 MB) and the fastest is bits 4: OpenVINO "
        "(60.0 %, 9.00 ms per token)"
    )


def test_the_report_begins_with_it(tiny_run):
    folder = tiny_run["report"].path
    document = json.loads((folder / "report.json").read_text())
    assert "significantly different" in document["verdict"]
    assert document["verdict"].startswith("Take ")
    assert (folder / "report.md").read_text().startswith(document["verdict"])
    page = (folder / "index.html").read_text()
    assert page.index("<strong>Take ") < page.index("Accuracy (")
    for found in document["rows"]:
        stored = 8 * found["file_bytes"] / found["bits_per_weight"]
        assert stored == pytest.approx(2_836_736, rel=0.01)  # weights of the embedded model
