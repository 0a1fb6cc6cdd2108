"""A recipe without training deploys the output of the sparsifier and the quantizer."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import random_model, small_recipe
from sqft_export.artifacts.store import Artifact
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import load_grids, load_mask, read_quantized
from sqft_export.numerics.affine import dequantize, quantize
from sqft_export.run.pipeline import run_recipe
from sqft_export.verify.certify import certify, certify_again
from sqft_export.verify.subject import Asked, Subject

LAYER = "model.layers.1.mlp.up_proj"
UNPRUNED = "sparsify={method: none}"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return random_model(tmp_path_factory.mktemp("base"), attention_bias=True, intermediate_size=192)


def compressed(base: Path, runs: Path, *settings: str, last: str = "verify") -> dict[str, Artifact]:
    untrained = ("adapt=none", "verify.prompts=2", "verify.new_tokens=4")
    return run_recipe(small_recipe(*untrained, *settings, model_path=base), runs, (last,))


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> dict[str, Artifact]:
    settings = (
        "quantize.group_size=32",
        "benchmark.items=2",
        "benchmark.baselines=[dense, sparse-quantized, merged]",
    )
    runs = tmp_path_factory.mktemp("untrained")
    export = "export={targets: [onnx]}"
    return compressed(base, runs, export, *settings, last="report")


def all_passed(run: dict[str, Artifact]) -> bool:
    return all(check["passed"] for check in run["verify"].metrics["checks"])


def check_codes(run: dict[str, Artifact]) -> None:
    """Merged codes are those on the quantizer's grids, and stand for the same weights."""
    made = Checkpoint(run["quantize"].path / "model")
    merged, grids = Checkpoint(run["merge"].path / "model"), load_grids(run["quantize"].path)
    assert set(merged.linears) <= grids.keys()
    for name in merged.linears:
        ours = quantize(made.tensor(f"{name}.weight").float(), grids[name])
        codes, grid = read_quantized(merged, name)
        assert torch.equal(grid.scale, grids[name].scale)
        assert torch.equal(dequantize(codes, grid), dequantize(ours, grids[name]))
        if grids[name].bits == grid.bits:
            assert torch.equal(codes, ours)


@pytest.mark.parametrize(
    "settings",
    [
        ("sparsify={method: sparsegpt, pattern: '2:4'}", "quantize.symmetric=false"),
        (UNPRUNED, "quantize.bits=3"),
        ("quantize.method=rtn", "quantize.embedding_bits=8", "quantize.group_size=32"),
        (UNPRUNED, "quantize={method: nncf, bits: 4, group_size: 64}"),
        ("sparsify={method: magnitude, sparsity: 0.6}", "quantize.bits=8"),
    ],
)
def test_codes_are_the_quantizers_own(base, tmp_path, settings):
    run = compressed(base, tmp_path, "export.targets=[onnx]", *settings)
    assert not {"adapt", "search", "teacher", "baselines"} & run.keys()
    assert all_passed(run)
    check_codes(run)


def test_a_group_that_is_pruned_whole_has_a_scale_in_nncf_too(base, tmp_path):
    """Its scale is zero there; 0 / 0 was what every block after it saw."""
    odd = shutil.copytree(base, tmp_path / "odd")
    tensors = load_file(odd / "model.safetensors")
    tensors[f"{LAYER}.weight"][3, 32:64] *= 1e-6
    save_file(tensors, odd / "model.safetensors", {"format": "pt"})
    nncf = "quantize={method: nncf, bits: 4, group_size: 32}"
    run = compressed(odd, tmp_path / "runs", "export.targets=[onnx]", nncf)
    assert all_passed(run)
    check_codes(run)
    grids = load_grids(run["quantize"].path)
    assert all(grid.scale.isfinite().all() and grid.scale.all() for grid in grids.values())


@pytest.mark.parametrize("sparsify", [UNPRUNED, "sparsify={method: wanda, sparsity: 0.5}"])
def test_floats_are_the_sparsifiers_own(base, tmp_path, sparsify):
    run = compressed(base, tmp_path, sparsify, "quantize.method=none")
    assert all_passed(run)
    before = Checkpoint(run["sparsify"].path / "model" if "sparsify" in run else base)
    merged = Checkpoint(run["merge"].path / "model")
    for name, tensor in before.tensors(before.headers):
        assert torch.equal(merged.tensor(name), tensor)


def test_a_compressed_model_as_it_is_keeps_codes_and_zeros(finished, tmp_path):
    given = (
        "sparsify={method: existing}",
        "quantize={method: existing, group_size: 32}",
        "export.targets=[openvino]",
    )
    merged = finished["merge"].path / "model"
    again = compressed(merged, tmp_path, *given)
    assert all_passed(again)
    one, other = Checkpoint(merged), Checkpoint(again["merge"].path / "model")
    for name in one.quantized_linears:
        codes, grid = read_quantized(one, name)
        assert torch.equal(codes, read_quantized(other, name)[0])
        dropped = ~load_mask(again["sparsify"].path, name, codes.shape)
        assert dropped.sum() > 0.4 * dropped.numel()
        assert not dequantize(codes, grid)[dropped].any()


def test_the_report_has_no_row_of_a_training(finished):
    page = (finished["report"].path / "index.html").read_text()
    assert "Nothing was trained" in page
    table = (finished["report"].path / "report.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines()[4:]]
    assert names == ["dense base", "merged", "ONNX Runtime"]
    assert "| adapter | none |" in (finished["merge"].path / "model" / "README.md").read_text()


def test_the_certificate_can_be_derived_again(finished, tmp_path):
    _, certificate = certify_again(finished["verify"].path.parent, tmp_path)
    results = [result.to_json() for result in certificate.results()]
    assert results == finished["verify"].metrics["checks"]


@pytest.mark.parametrize("broken", ["merge", "quantize"])
def test_another_code_than_the_quantizers_is_named(finished, tmp_path, broken):
    root = Path(shutil.copytree(finished["merge"].path.parent, tmp_path / "runs"))
    of = {name: root / artifact.path.name for name, artifact in finished.items()}
    file = of[broken] / "model" / "model.safetensors"
    tensors = load_file(file)
    key = f"{LAYER}.{'qweight' if broken == 'merge' else 'weight'}"
    tensors[key].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    passes = {name: of[name] / "model" for name in ("sparsify", "quantize")}
    exports = {"onnx": of["export-onnx"]}
    asked = Asked.read(of["verify"])
    subject = Subject(
        asked, passes, of["sparsify"], of["verify"], of["merge"], exports, scratch=tmp_path
    )
    failed = {c.name for c in certify(subject, lambda: None).checks if not c.passed}
    assert "codes, scales, zero points: quantize and merged" in failed
    assert ("weights of the compressed forward, merged" in failed) == (broken == "merge")
