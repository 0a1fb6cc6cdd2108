"""Texts and titles in the pictures of a report."""

import itertools
import re
from xml.etree import ElementTree

import pytest
from benchmark_rows import benchmark_row

from sqft_export.measure.results import BenchmarkRow
from sqft_export.report.pictures import LABEL_STEP, accuracy_scatter, add_titles, spread_labels


def row(name: str, accuracy: float, bytes_: float) -> BenchmarkRow:
    return benchmark_row("openvino", accuracy, name=name, file_bytes=int(bytes_))


def test_every_point_has_its_name_next_to_it_and_no_legend_of_numbers():
    rows = [row("far", 0.9, 9e6), row("one", 0.5, 1e6), row("same", 0.5, 1e6), row("low", 0.1, 1e6)]
    picture = accuracy_scatter(rows, "exact match", "file_bytes")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    assert sorted(text for text in texts if text in {r.name for r in rows}) == [
        *("far", "low", "one", "same")
    ]


@pytest.mark.parametrize(
    "heights", [[0.5], [0.5] * 5, [0.0] * 20, [1.0] * 20, [0.9, 0.1, 0.12, 0.88, 0.5]]
)
def test_labels_keep_their_distance_and_order_and_stay_inside(heights):
    found = spread_labels(heights)
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in found)
    ordered = sorted(found)
    step = min(LABEL_STEP, 1 / max(1, len(heights) - 1))
    assert all(high - low >= step - 1e-9 for low, high in itertools.pairwise(ordered))
    by_label = sorted(range(len(heights)), key=lambda i: found[i])
    assert [heights[i] for i in by_label] == sorted(heights)


def test_an_svg_has_its_title():
    picture = accuracy_scatter([row("far", 0.9, 9e6)], "exact match", "file_bytes")
    ((title, titled),) = add_titles([("Accuracy against file size", picture)])
    root = ElementTree.fromstring(titled)
    assert root[0].tag.endswith("title") and root[0].text == title
    assert root.get("role") == "img"
