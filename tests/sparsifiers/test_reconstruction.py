"""Kept weights trained to give the dense blocks' output: nearer to it, and no zero lost."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import TINY, random_model, small_recipe
from sqft_export.data.calibration import calibration_tensors
from sqft_export.data.items import load_tokenizer
from sqft_export.errors import UserError
from sqft_export.measure.likelihood import likelihood
from sqft_export.model.blocks import walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.model.storage import load_mask
from sqft_export.run.artifact import Artifact
from sqft_export.run.pipeline import run_recipe
from sqft_export.sparsifiers import reconstruction
from sqft_export.stages import reconstruct as stage
from sqft_export.targets.torch import TorchSession

SETTINGS = (
    "adapt=none",
    "calibration.samples=32",
    "sparsify.reconstruct={steps: 30, batch: 4, learning_rate: 1e-3}",
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
    for block in made["reconstruct"].metrics["blocks"]:
        assert block["error_after"] < 0.7 * block["error_before"]
    recipe = small_recipe(*SETTINGS, "seed=7")
    ids = [sample.tolist() for sample in calibration_tensors(recipe, TINY)]

    def perplexity(folder: Path) -> float:
        session = TorchSession(load_model(Checkpoint(folder), torch.float32))
        return likelihood(session, [one[:1] for one in ids], [one[1:] for one in ids])["perplexity"]

    dense, sparse, again = (
        perplexity(folder)
        for folder in (TINY, *(made[n].path / "model" for n in ("sparsify", "reconstruct")))
    )
    assert again - dense < 0.6 * (sparse - dense)


def test_an_interrupted_pass_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    shutil.copytree(made["sparsify"].path, tmp_path / made["sparsify"].path.name)
    trained = []
    really = stage.reconstruct

    def until_the_third(block, *rest):
        trained.append(block.index)
        if len(trained) == 3:
            raise KeyboardInterrupt
        really(block, *rest)

    monkeypatch.setattr(stage, "reconstruct", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_to("reconstruct", tmp_path)
    again = run_to("reconstruct", tmp_path)["reconstruct"]
    assert trained == [0, 1, 2, 2, 3]
    theirs, ours = weights(made["reconstruct"].path), weights(again.path)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert again.metrics == made["reconstruct"].metrics
    assert not (again.path / stage.BLOCKS).exists()


@pytest.mark.parametrize("kind", ["llama", "bloom", "gemma3_text", "opt"])
def test_samples_go_through_a_block_together_as_alone(tmp_path, kind):
    """Blocks differ in what they are called with; samples of other lengths share a call."""
    model = random_model(tmp_path / "model", model_type=kind)
    ids = load_tokenizer(model)("Question: how many pens are in four boxes?" * 4)["input_ids"]
    samples = [torch.tensor(ids[at : at + 12 - at]) for at in range(6)]
    for block in walk(Checkpoint(model), samples, None):
        alone = list(reconstruction.outputs_of(block))
        groups = reconstruction.together(block, list(range(6)))
        assert sorted(i for group in groups for i in group) == list(range(6))
        for group in groups:
            joined = reconstruction.joined_outputs(block, group)
            for index, ours in zip(group, joined, strict=True):
                assert torch.allclose(ours, alone[index][0], atol=1e-5)
        assert len(groups) == (6 if kind == "bloom" else 1)  # whose alibi has a row a head


def test_training_starts_from_it_and_the_certificate_covers_it(tmp_path):
    model = random_model(tmp_path / "model")
    export = ("export={targets: [onnx]}", "verify.prompts=2", "verify.new_tokens=4")
    run = run_to("verify", tmp_path / "runs", *export, model=model)
    checks = {check["name"]: check for check in run["verify"].metrics["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert "pruned positions zero in reconstruct" in checks
    parents = run["quantize"].manifest["facts"]["parents"]
    assert parents.keys() == {"sparsify", "reconstruct"}


def test_it_needs_a_dense_model_to_come_back_to():
    with pytest.raises(UserError, match="reconstruct: method given prunes nothing that a dense"):
        small_recipe(*SETTINGS, "sparsify={method: given, reconstruct: {}}")
