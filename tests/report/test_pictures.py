"""What a reader sees in a picture."""

import re

import pytest
from benchmark_rows import benchmark_row

from sqft_export.measure.results import BenchmarkRow
from sqft_export.report.pictures import accuracy_scatter, format_ranges


def row(name: str, accuracy: float, bytes_: float) -> BenchmarkRow:
    return benchmark_row("openvino", accuracy, name=name, file_bytes=int(bytes_))


def test_rows_whose_points_lie_together_are_all_named():
    rows = [row("far", 0.9, 9e6), row("one", 0.5, 1e6), row("same", 0.5, 1e6), row("low", 0.1, 1e6)]
    picture = accuracy_scatter(rows, "exact match", "file_bytes")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    named = [f"{number}  {r.name}" for number, r in enumerate(rows, 1)]
    assert [text for text in texts if text in named] == named
    assert {"1", "2-3", "4"} <= set(texts)


@pytest.mark.parametrize(
    ("numbers", "said"), [([3], "3"), ([5, 4, 2], "2, 4-5"), ([3, 1, 2, 7], "1-3, 7")]
)
def test_numbers_are_written_as_ranges(numbers, said):
    assert format_ranges(numbers) == said
