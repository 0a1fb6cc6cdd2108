"""Kept weights trained to give the dense blocks' output: nearer to it, and no zero lost; the same
through a grid."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import TINY, random_model, small_recipe
from sqft_export.artifacts.store import Artifact
from sqft_export.data.calibration import calibration_tensors
from sqft_export.data.items import load_tokenizer
from sqft_export.errors import UserError
from sqft_export.measure.likelihood import likelihood
from sqft_export.model import reconstruction
from sqft_export.model.block_state import STATES
from sqft_export.model.blocks import walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.model.storage import load_grids, load_mask
from sqft_export.numerics.affine import fake_quantize
from sqft_export.run.pipeline import run_recipe
from sqft_export.stages import quantize as quantize_stage
from sqft_export.stages import reconstruct as reconstruct_stage
from sqft_export.targets.torch import TorchSession

SETTINGS = (
    "adapt=none",
    "calibration.samples=16",
    "sparsify.reconstruct={steps: 20, batch: 4}",
)


def run_to(last: str, root: Path, *settings: str, model: Path | None = None) -> dict[str, Artifact]:
    return run_recipe(small_recipe(*SETTINGS, *settings, model_path=model), root, (last,))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Artifact]:
    return run_to("reconstruct", tmp_path_factory.mktemp("runs"))


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder / "model")
    return dict(checkpoint.tensors(checkpoint.headers))


def test_kept_weights_move_and_nothing_else(made):
    before, after = weights(made["sparsify"].path), weights(made["reconstruct"].path)
    linears = Checkpoint(TINY).linears
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        linear = name.removesuffix(".weight")
        assert tensor.dtype == before[name].dtype
        if linear not in linears:
            assert torch.equal(tensor, before[name])
            continue
        dropped = ~load_mask(made["sparsify"].path, linear, tensor.shape)
        assert dropped.any() and not tensor[dropped].any()
        moved = (tensor != before[name])[~dropped].float().mean()
        assert moved > 0.5, linear


def test_the_model_is_nearer_to_the_dense_one(made):
    for block in made["reconstruct"].metrics["block_errors"]:
        before, after = block
        assert after < 0.7 * before
    recipe = small_recipe(*SETTINGS, "seed=7")
    ids = [sample.tolist() for sample in calibration_tensors(recipe, TINY)]

    def perplexity(folder: Path) -> float:
        session = TorchSession(load_model(Checkpoint(folder), torch.float32))
        return likelihood(session, [one[:1] for one in ids], [one[1:] for one in ids]).perplexity

    dense, sparse, again = (
        perplexity(folder)
        for folder in (TINY, *(made[n].path / "model" for n in ("sparsify", "reconstruct")))
    )
    assert again - dense < 0.6 * (sparse - dense)


@pytest.mark.parametrize(
    ("stage", "setting"),
    [(reconstruct_stage, "sparsify.reconstruct"), (quantize_stage, "quantize.reconstruct")],
    ids=["reconstruct", "quantize"],
)
def test_an_interrupted_pass_goes_on_to_the_same_bytes(tmp_path, monkeypatch, stage, setting):
    name, trained, really = stage.__name__.rpartition(".")[2], [], stage.reconstruct
    recipe = small_recipe("adapt=none", "calibration.samples=8", f"{setting}={{steps: 2}}")
    whole = run_recipe(recipe, tmp_path / "whole", (name,))
    copied = whole["sparsify"].path
    shutil.copytree(copied, tmp_path / "runs" / copied.name)

    def until_the_third(theirs, *rest):
        trained.append(theirs.index)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return really(theirs, *rest)

    monkeypatch.setattr(stage, "reconstruct", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "runs", (name,))
    again = run_recipe(recipe, tmp_path / "runs", (name,))[name]
    assert trained == [0, 1, 2, 2, 3]
    theirs, ours = weights(whole[name].path), weights(again.path)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert again.metrics == whole[name].metrics
    assert not (again.path / STATES).exists()


@pytest.mark.parametrize("kind", ["llama", "bloom", "gemma3_text", "opt"])
def test_samples_go_through_a_block_together_as_alone(tmp_path, kind):
    """Blocks differ in their arguments; samples of different lengths share a call."""
    model = random_model(tmp_path / "model", model_type=kind)
    ids = load_tokenizer(model)("Question: how many pens are in four boxes?" * 4)["input_ids"]
    samples = [torch.tensor(ids[at : at + 12 - at]) for at in range(6)]
    for block in walk(Checkpoint(model), samples, None):
        alone = list(reconstruction.outputs_of(block))
        groups = reconstruction.group_batchable(block, list(range(6)))
        assert sorted(i for group in groups for i in group) == list(range(6))
        for group in groups:
            joined = reconstruction.run_batched(block, group)
            for index, ours in zip(group, joined, strict=True):
                assert torch.allclose(ours, alone[index][0], atol=1e-5)
        assert len(groups) == (6 if kind == "bloom" else 1)  # whose alibi has a row a head


def test_training_starts_from_it_and_the_certificate_covers_it(tmp_path):
    model = random_model(tmp_path / "model")
    export = ("export={targets: [onnx]}", "verify.prompts=2", "verify.new_tokens=4")
    little = ("calibration.samples=4", "sparsify.reconstruct={steps: 2}")
    run = run_to("verify", tmp_path / "runs", *little, *export, model=model)
    checks = {check["name"]: check for check in run["verify"].metrics["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert "pruned positions zero in reconstruct" in checks
    parents = run["quantize"].manifest["facts"]["parents"]
    assert parents.keys() == {"sparsify", "reconstruct"}


def test_it_needs_a_dense_model_to_come_back_to():
    with pytest.raises(UserError, match="reconstruct: method existing prunes nothing, so"):
        small_recipe(*SETTINGS, "sparsify={method: existing, reconstruct: {}}")


ROUNDED = (
    "adapt=none",
    "calibration.samples=16",
    "quantize.reconstruct={steps: 20, batch: 4}",
)
LITTLE = (
    "calibration.samples=4",
    "quantize.reconstruct={steps: 2}",
)  # how good: not asked


def rounded(root: Path, *settings: str, model: Path | None = None, last: str = "quantize"):
    return run_recipe(small_recipe(*ROUNDED, *settings, model_path=model), root, (last,))


@pytest.fixture(scope="module")
def on_grid(tmp_path_factory) -> dict[str, Artifact]:
    return rounded(tmp_path_factory.mktemp("rounded"))


def values(run: dict[str, Artifact]) -> dict[str, Tensor]:
    """What every Linear is in the deployment."""
    checkpoint = Checkpoint(run["quantize"].path / "model")
    return {
        name: fake_quantize(checkpoint.tensor(f"{name}.weight").float(), grid)
        for name, grid in load_grids(run["quantize"].path).items()
        if name in checkpoint.linears
    }


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> dict[str, Artifact]:
    return rounded(tmp_path_factory.mktemp("untrained"), "quantize.reconstruct=null")


def test_through_the_grid_codes_and_scales_move_and_zeros_stay(on_grid, untrained):
    grids, moved = load_grids(untrained["quantize"].path), load_grids(on_grid["quantize"].path)
    for name, value in values(on_grid).items():
        dropped = ~load_mask(on_grid["sparsify"].path, name, value.shape)
        assert dropped.any() and not value[dropped].any()
        assert torch.equal(moved[name].zero_point, grids[name].zero_point)
        assert (moved[name].scale != grids[name].scale).float().mean() > 0.5
    for before, after in on_grid["quantize"].metrics["block_errors"]:
        assert after < 0.7 * before


def test_through_the_grid_the_model_is_nearer_to_the_dense_one(on_grid, untrained):
    ids = [sample.tolist() for sample in calibration_tensors(small_recipe("seed=7"), TINY)]

    def perplexity(run: dict[str, Artifact] | None) -> float:
        model = load_model(Checkpoint(TINY), torch.float32)
        weights = {f"{name}.weight": value for name, value in values(run).items()} if run else {}
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
        session = TorchSession(model)
        return likelihood(session, [one[:1] for one in ids], [one[1:] for one in ids]).perplexity

    dense = perplexity(None)
    assert perplexity(on_grid) - dense < 0.6 * (perplexity(untrained) - dense)


@pytest.mark.parametrize(
    "settings",
    [
        ("sparsify={method: none}", "quantize.bits=3", "quantize.method=rtn"),
        ("quantize.symmetric=false", "export.targets=[gguf]", "quantize.group_size=32"),
        ("adapt={steps: 2, ranks: [8, 4]}", "sparsify.pattern='2:4'", "sparsify.sparsity=null"),
        ("quantize.method=nncf", "quantize.group_size=16"),
    ],
    ids=["dense-int3", "asymmetric-gguf", "tuned", "nncf"],
)
def test_what_was_trained_through_the_grid_passes_every_check(tmp_path, settings):
    model = random_model(tmp_path / "model", hidden_size=128, intermediate_size=192)
    small = ("export={targets: [onnx]}", "verify.prompts=2", "verify.new_tokens=4")
    run = rounded(tmp_path / "runs", *LITTLE, *small, *settings, model=model, last="verify")
    assert all(check["passed"] for check in run["verify"].metrics["checks"])
    assert run["quantize"].metrics["block_errors"]


def test_codes_that_are_given_are_not_trained():
    with pytest.raises(UserError, match="reconstruct: method existing rounds nothing"):
        small_recipe("quantize={method: existing, reconstruct: {}}", "sparsify={method: none}")
