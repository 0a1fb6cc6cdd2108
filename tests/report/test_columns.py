"""Columns that compare every row of a run's table with the dense base."""

import json

import numpy as np
import pytest

from sqft_export.measure.agreement import COMPARED_TOKENS, agreement, sequences_of
from sqft_export.measure.likelihood import log_softmax
from sqft_export.measure.results import BenchmarkRow
from sqft_export.report.tables import cells

COLUMNS = ("recovery", "top-1 agreement", "KL nats/token")
TO_MERGED = "KL to merged nats/token"


def results(tiny_run) -> dict[str, dict]:
    rows = json.loads((tiny_run["benchmark"].path / "results.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


def test_the_dense_base_is_itself_and_what_is_merged_diverges_alike_everywhere(tiny_run):
    rows = results(tiny_run)
    dense = rows["dense base"]
    assert dense["recovery"] == 1.0
    assert (dense["beside_dense"]["agreement"], dense["beside_dense"]["kl_nats"]) == (1.0, 0.0)
    away = {name: row["beside_dense"]["kl_nats"] for name, row in rows.items()}
    assert away["sparse"] > 0.01 and away["merged"] > 0.01
    for name in ("OpenVINO", "OpenVINO, packed", "ONNX Runtime", "llama.cpp"):
        assert away[name] == pytest.approx(away["merged"], rel=0.1), name
        # The runtime's own rounding is small compared with the change by tuning.
        assert 0 <= rows[name]["beside_merged"]["kl_nats"] < 0.1 * away[name], name
        assert rows[name]["beside_merged"]["agreement"] > rows[name]["beside_dense"]["agreement"]
    assert rows["merged"]["beside_merged"]["kl_nats"] == 0
    assert "beside_merged" not in rows["tuned, unmerged"]
    for row in rows.values():
        assert row["recovery"] == pytest.approx(row["accuracy"] / dense["accuracy"])
        beside = row["beside_dense"]
        assert beside["tokens"] == dense["beside_dense"]["tokens"] <= COMPARED_TOKENS
        assert beside["low"] <= beside["agreement"] <= beside["high"]


def test_a_report_has_them_and_says_what_they_are(tiny_run):
    folder = tiny_run["report"].path
    header = (folder / "report.md").read_text().splitlines()[2]
    assert all(f"| {column} |" in header for column in (*COLUMNS, TO_MERGED))
    page = (folder / "index.html").read_text()
    assert "held-out tokens at which the argmax is that of the dense base" in page
    assert "mean KL divergence from the merged model in torch at" in page


def test_a_table_without_a_dense_base_has_no_such_columns(tiny_run):
    rows = list(results(tiny_run).values())[1:]
    bare = [{k: v for k, v in r.items() if k not in ("recovery", "beside_dense")} for r in rows]
    bare, rows = ([BenchmarkRow.parse(json.dumps(r), "row") for r in some] for some in (bare, rows))
    assert not set(cells(bare)[0]) & set(COLUMNS)
    assert TO_MERGED in cells(bare)[0]
    assert set(cells(rows)[0]) >= set(COLUMNS)
    mixed = cells([rows[0], bare[1]])  # of reports from before and after they were there
    place = mixed[0].index("KL nats/token")
    assert mixed[1][place] and not mixed[2][place]


def test_divergence_of_many_tokens_is_that_of_all_of_them():
    """It is summed in parts."""
    random = np.random.default_rng(0)
    first, found = (
        log_softmax(random.standard_normal((150, 40))).astype(np.float32) for _ in range(2)
    )
    told = agreement(first, found)
    expected = (np.exp(first) * (first - found)).sum(axis=1).mean()
    assert told.kl_nats == pytest.approx(expected, rel=1e-5)
    assert told.agreement == (first.argmax(1) == found.argmax(1)).mean()
    wider = np.concatenate([found, np.full((150, 3), -100, np.float32)], axis=1)
    assert agreement(first, wider) == told


def test_tokens_are_of_items_from_everywhere():
    class Numbered:
        def __init__(self, number: int):
            self.ids = [number] * 10

    sequences = sequences_of([Numbered(number) for number in range(1000)])
    assert sum(map(len, sequences)) == COMPARED_TOKENS
    numbers = [sequence[0] for sequence in sequences]
    assert min(np.diff(numbers)) > 10 and numbers[-1] > 900
    assert sequences_of([Numbered(7)]) == [[7] * 10]
