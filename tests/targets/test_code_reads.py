"""How often the codes of a merged model are read on their way into deployments."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import random_model, small_recipe
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import model_facts, read_grid, read_quantized
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.run.gates import QualityGates
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import target

# By merge for the facts in every deployment, for the self-test, by every export, and twice to
# measure what a rounded head costs in llama.cpp.
MOST = 7


@pytest.fixture
def reads(monkeypatch) -> Counter[tuple[Path, str]]:
    """Folder and name of every tensor that is read from now on -> how often."""
    found: Counter[tuple[Path, str]] = Counter()
    tensors = TensorFiles.tensors

    def counting(self, names):
        for name, tensor in tensors(self, names):
            found[self.folder, name] += 1
            yield name, tensor

    monkeypatch.setattr(TensorFiles, "tensors", counting)
    # The quality sample after each pass runs the model once more; here the passes are counted.
    monkeypatch.setattr(QualityGates, "check", lambda *_: [])
    return found


def compiled(root: Path, *settings: str, targets: tuple[str, ...], model: Path | None = None):
    """Merge and exports of a recipe without training."""
    asked = f"export.targets=[{', '.join(targets)}]"
    recipe = small_recipe(
        "adapt=none", "sparsify.method=magnitude", "quantize.method=rtn", asked, *settings,
        model_path=model,
    )  # fmt: skip
    return run_recipe(recipe, root, tuple(f"export-{name}" for name in targets))


def counts_of(reads: Counter, folder: Path, end: str) -> dict[str, int]:
    return {name: n for (where, name), n in reads.items() if where == folder and name.endswith(end)}


def test_codes_are_read_seven_times_at_most_before_verify(tmp_path, reads):
    run = compiled(tmp_path, targets=("openvino", "onnx", "gguf"))
    merged = run["merge"].path / "model"
    # The merged model lay in the partial folder while merge itself read it.
    for (folder, name), count in list(reads.items()):
        if folder.parent.suffix == ".partial":
            reads[merged, name] += count
    codes = counts_of(reads, merged, ".qweight")
    assert len(codes) == len(Checkpoint(merged).quantized_linears)
    assert set(codes.values()) == {MOST}
    embedding = counts_of(reads, merged, "embed_tokens.weight")
    assert embedding and max(embedding.values()) <= MOST
    facts = run["merge"].metrics["facts"]
    assert facts == model_facts(Checkpoint(merged))
    for name in ("openvino", "onnx", "gguf"):
        assert target(name).metadata(run[f"export-{name}"].path / "model") == facts


def test_a_linear_that_feeds_several_products_is_read_once_for_them(tmp_path, reads):
    """phi3 stores q, k and v in one matrix, and gate and up in another."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = random_model(tmp_path / "model", model_type="phi3", **sizes)
    run = compiled(
        tmp_path / "runs", "quantize.group_size=32", targets=("onnx",), model=model
    )  # fmt: skip
    merged = run["merge"].path / "model"
    assert set(counts_of(reads, merged, ".qweight").values()) == {1}


def test_a_grid_without_its_codes_is_that_of_the_codes(tmp_path, reads):
    run = compiled(tmp_path, "quantize.symmetric=false", targets=("openvino",))
    checkpoint = Checkpoint(run["merge"].path / "model")
    for name in checkpoint.quantized_linears:
        reads.clear()
        grid = read_grid(checkpoint, name)
        assert not counts_of(reads, checkpoint.folder, ".qweight")
        expected = read_quantized(checkpoint, name)[1]
        assert torch.equal(grid.scale, expected.scale)
        assert torch.equal(grid.zero_point, expected.zero_point)
        assert (grid.bits, grid.group_size) == (expected.bits, expected.group_size)
        assert grid.symmetric == expected.symmetric
