"""The loss of each pass on held-out data is measured, and a loss above a gate stops the run."""

import itertools
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from benchmark_rows import benchmark_results, benchmark_row

from conftest import ROOT, SMALL, SQFT, TINY, copy_run, small_recipe
from sqft_export.artifacts.store import Artifact, Store
from sqft_export.errors import DamagedError, GateError, UserError
from sqft_export.measure.quality import held_out_sample, quality_file, read_quality
from sqft_export.measure.results import BenchmarkRow
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.plan.checks import check_recipe
from sqft_export.run.gates import BASE, QualityGates
from sqft_export.run.pipeline import plan_passes, run_recipe

PASSES = ("sparsify", "quantize", "search", "merge")


def record_of(artifact: Artifact) -> dict:
    file = quality_file(artifact.path.parent, artifact.manifest["stage"], artifact.key)
    record = read_quality(file)
    assert record is not None
    return record.to_json()


def log_probabilities(folder: Path, sample) -> list[torch.Tensor]:
    """Return log-probabilities for every target token, item by item, in float64."""
    model, rows = load_model(Checkpoint(folder)), []
    for item in sample:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([item.ids])).logits[0].double()
        first = len(item.ids) - item.count
        rows += [logits[at - 1].log_softmax(0) for at in range(first, len(item.ids))]
    return rows


def test_every_pass_is_compared_with_the_one_before(tiny_run):
    records = {name: record_of(tiny_run[name]) for name in PASSES}
    assert [records[n]["before"] for n in PASSES] == [BASE, "sparsify", "quantize", "search"]
    for before, after in itertools.pairwise(PASSES):
        assert records[after]["perplexity_before"] == records[before]["perplexity"]
    assert records["sparsify"]["kl_nats"] > 0.01 and records["sparsify"]["items"] == 8
    assert records["merge"]["kl_nats"] == 0.0  # the merged model is the tuned one
    report = json.loads((tiny_run["report"].path / "report.json").read_text())
    assert {p["pass"]: p["quality"] for p in report["passes"] if p["quality"]} == records


def test_the_figures_are_those_of_the_whole_models(tiny_run):
    recipe, sample = small_recipe(), held_out_sample(small_recipe(), TINY)
    assert recipe.task.max_new_tokens and sum(item.count for item in sample) > 100
    dense = log_probabilities(TINY, sample)
    sparse = log_probabilities(tiny_run["sparsify"].path / "model", sample)
    targets = [token for item in sample for token in item.ids[-item.count :]]
    divergence = [float((p.exp() * (p - q)).sum()) for p, q in zip(dense, sparse, strict=True)]
    losses = [-float(row[token]) for row, token in zip(sparse, targets, strict=True)]
    found = record_of(tiny_run["sparsify"])
    assert found["kl_nats"] == pytest.approx(sum(divergence) / len(divergence), rel=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found["tokens"] == len(targets)


def test_a_pass_that_costs_more_than_the_gate_stops_the_run(tiny_run, tmp_path):
    root = copy_run(tiny_run, tmp_path)
    cost = record_of(tiny_run["sparsify"])["kl_nats"]
    with pytest.raises(GateError, match=r"sparsify: KL .* gates.kl allows .*sparsify.sparsity"):
        run_recipe(small_recipe(f"gates.kl={cost / 2}"), root)
    # Nothing is measured again for another gate, and no pass runs again for it.
    passed = run_recipe(small_recipe(f"gates.kl={2 * cost + 1}"), root, ("merge",))
    assert {n: a.key for n, a in passed.items()} == {n: tiny_run[n].key for n in passed}


def test_training_that_lowers_the_perplexity_passes_the_gate(tiny_run):
    search, gates = record_of(tiny_run["search"]), small_recipe("gates.kl=1e-9")
    assert search["kl_nats"] > 1e-9 and search["perplexity"] < search["perplexity_before"]
    judge = QualityGates(gates, TINY, Store(tiny_run["search"].path.parent))
    assert judge.check("search", tiny_run) == []
    with pytest.raises(GateError, match="quantize: KL divergence from sparsify"):
        judge.check("quantize", tiny_run)


def test_the_command_ends_with_code_6(tiny_run, tmp_path):
    root = copy_run(tiny_run, tmp_path)
    settings = (*SMALL, "gates.kl=1e-6", "--runs", str(tmp_path))
    root.rename(tmp_path / "tiny")
    done = subprocess.run(
        [SQFT, "run", "recipes/tiny.yaml", *settings], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 6, done.stderr
    assert "sparsify: KL divergence from the base model is" in done.stderr
    assert "Traceback" not in done.stderr


def benchmark_of(folder: Path, *rows: BenchmarkRow) -> Artifact:
    (folder / "results.json").write_text(json.dumps(benchmark_results(*rows).to_json()))
    return Artifact(folder, {"key": "0" * 64, "stage": "benchmark"})


@pytest.mark.parametrize("id", ["merged", "openvino", "gguf-packed"])
def test_accuracy_is_judged_at_the_benchmark(tmp_path, id):
    rows = [
        benchmark_row("dense", 0.80, p_same_as_first=1.0),
        benchmark_row("sparse", 0.10, p_same_as_first=0.0),
        benchmark_row(id, 0.73, p_same_as_first=0.001),
    ]
    name = rows[2].name
    made = {"benchmark": benchmark_of(tmp_path, *rows)}

    def check(*settings):
        return QualityGates(small_recipe(*settings), TINY, Store(tmp_path)).check("benchmark", made)

    with pytest.raises(GateError, match=rf"{name} answers 73.0 % right, 7.0 points .* allows 5"):
        check("gates.accuracy_drop=5")
    assert check("gates.accuracy_drop=8") == []
    assert "7.0 points below" in check()[0]
    rows[2] = rows[2].model_copy(
        update={"p_same_as_first": 0.4}
    )  # not significant with so few items
    made = {"benchmark": benchmark_of(tmp_path, *rows)}
    assert check() == []


@pytest.mark.parametrize("pipeline", ["sqft", "shears", "sparsepeft"])
def test_other_pipelines_merge_without_loss(random_llama, tmp_path, pipeline):
    method = "gptq" if pipeline == "sqft" else "none"
    recipe = small_recipe(
        f"adapt.pipeline={pipeline}",
        f"quantize.method={method}",
        "adapt.ranks=[8, 4]",
        "adapt.steps=4",
        "adapt.learning_rate=0.05",
        model_path=random_llama,
    )
    made = run_recipe(recipe, tmp_path, ("merge",))
    assert record_of(made["search"])["kl_nats"] > 1e-3  # tuning did something
    assert record_of(made["merge"])["kl_nats"] < 1e-6


def test_a_changed_record_is_named(tiny_run, tmp_path):
    root = copy_run(tiny_run, tmp_path)
    file = quality_file(root, "sparsify", tiny_run["sparsify"].key)
    file.write_text(file.read_text().replace('"kl_nats": 0', '"kl_nats": 1'))
    with pytest.raises(DamagedError, match=r"quality-sparsify-\w+.json: its seal is broken"):
        run_recipe(small_recipe(), root, ("sparsify",))


def test_another_test_set_is_measured_again(tiny_run, tmp_path):
    root = copy_run(tiny_run, tmp_path)
    items = (TINY / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(items[500:]))
    made = run_recipe(small_recipe(f"task.test={tmp_path}/test.jsonl"), root, ("sparsify",))
    assert made["sparsify"].key == tiny_run["sparsify"].key
    assert record_of(made["sparsify"])["kl_nats"] != record_of(tiny_run["sparsify"])["kl_nats"]


def test_gates_are_in_no_key_but_the_reports(tmp_path):
    plain, gated = (
        plan_passes(small_recipe(*gates), TINY, Store(tmp_path))
        for gates in ((), ("gates.kl=1", "gates.accuracy_drop=3"))
    )
    different = [a.name for a, b in zip(plain, gated, strict=True) if a.key != b.key]
    assert different == ["report"]


@pytest.mark.parametrize(
    "settings",
    [
        ("benchmark.baselines=[merged]",),
        ("benchmark.baselines=[dense]", "export.targets=[]"),
    ],
)
def test_a_gate_without_a_measurement_is_refused(settings):
    with pytest.raises(UserError, match=r"gates.accuracy_drop: found 2, but"):
        check_recipe(small_recipe("gates.accuracy_drop=2", *settings), TINY)
