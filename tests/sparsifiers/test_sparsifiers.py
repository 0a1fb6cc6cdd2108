import pytest
import torch

from conftest import random_model, small_recipe
from sqft_export.errors import UserError
from sqft_export.machine.progress import silent
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import load_mask
from sqft_export.numerics.hessian import inverse_factor
from sqft_export.plan.checks import check_recipe
from sqft_export.sparsifiers import Pruning, magnitude, sparsegpt, wanda
from sqft_export.stages import Context
from sqft_export.stages.sparsify import run


def layer(outputs=24, inputs=192, seed=0):
    """A weight and strongly correlated inputs, their norms and their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    scales = torch.rand(inputs, generator=generator) * 3
    samples = torch.randn(512, inputs, generator=generator) @ mixing * scales
    return weight, samples, samples.norm(dim=0), samples.T @ samples


def literal_sparsegpt(weight, hessian, sparsity, block):
    """Column by column in float64, after arXiv 2301.00774 with rows as comparison groups."""
    hessian = hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    work, mask = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        scores = (work[:, start:stop] / factor.diagonal()[start:stop]) ** 2
        count = int(stop * sparsity + 1e-6) - int(start * sparsity + 1e-6)
        for row in range(weight.shape[0]):
            mask[row, start + scores[row].argsort()[:count]] = False
        for column in range(start, stop):
            error = (work[:, column] * ~mask[:, column]) / factor[column, column]
            for later in range(column, weight.shape[1]):
                work[:, later] -= error * factor[column, later]
    return work * mask, mask


@pytest.mark.parametrize("inputs", [96, 192])
def test_sparsegpt_follows_the_literal_twin(inputs):
    weight, _, _, hessian = layer(outputs=6, inputs=inputs)
    result, mask = sparsegpt.compress(
        weight, Pruning(0.5, None), inverse_factor(hessian.clone(), 0.01)
    )
    twin, twin_mask = literal_sparsegpt(weight, hessian, 0.5, 128)
    assert (mask == twin_mask).float().mean() > 0.995
    same = (mask == twin_mask).all(dim=1)
    torch.testing.assert_close(result[same].double(), twin[same], rtol=1e-3, atol=1e-5)


def test_output_error_falls_from_magnitude_to_wanda_to_sparsegpt():
    weight, samples, norms, hessian = layer()
    rule = Pruning(0.5, None)

    def error(result):
        return float(((result - weight) @ samples.T).square().sum())

    by_magnitude = error(magnitude.compress(weight, rule, None)[0])
    by_wanda = error(wanda.compress(weight, rule, norms)[0])
    by_sparsegpt = error(sparsegpt.compress(weight, rule, inverse_factor(hessian, 0.01))[0])
    assert by_sparsegpt < by_wanda < by_magnitude


@pytest.mark.parametrize(
    "rule",
    [
        *(Pruning(0.5, None), Pruning(0.3, None), Pruning(None, (2, 4)), Pruning(None, (4, 8))),
        *(Pruning(0.5, None, (32, 64)), Pruning(0.6, None, (32, 64))),
    ],
)
@pytest.mark.parametrize("method", [magnitude, wanda, sparsegpt])
def test_zeros_are_where_the_mask_says_and_as_many_as_asked(method, rule):
    weight, _, norms, hessian = layer(inputs=320)
    inputs = {"nothing": None, "norms": norms, "factor": inverse_factor(hessian, 0.01)}
    inputs = inputs[method.NEEDS]
    result, mask = method.compress(weight, rule, inputs)
    assert torch.equal(result == 0, ~mask)
    if rule.n_of_m:
        n, m = rule.n_of_m
        assert (mask.reshape(-1, m).sum(dim=1) == n).all()
    else:
        assert ((~mask).sum(dim=1) == int(320 * rule.sparsity)).all()
    if rule.at_most:
        most, of = rule.at_most
        assert mask.reshape(-1, of).sum(dim=1).max() <= most


def run_sparsify(tmp_path, *overrides, model=None):
    model = model or random_model(tmp_path / "model")
    recipe = small_recipe(*overrides, model_path=model)
    check_recipe(recipe, model)
    folder = tmp_path / "out"
    folder.mkdir()
    context = Context("sparsify", recipe, model, {}, folder, silent)
    return folder, run(context).sparsity


def stored(folder):
    """Weights and masks of every decoder Linear, as written."""
    checkpoint = Checkpoint(folder / "model")
    for key, weight in checkpoint.tensors(f"{name}.weight" for name in checkpoint.linears):
        yield key, weight, load_mask(folder, key.removesuffix(".weight"), weight.shape)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_whole_model_gets_its_zeros(tmp_path, method):
    folder, sparsity = run_sparsify(tmp_path, f"sparsify={{method: {method}, sparsity: 0.5}}")
    assert sparsity["all"] == pytest.approx(0.5, abs=1e-6)
    for _, weight, mask in stored(folder):
        assert torch.equal(weight == 0, ~mask)


def test_overrides_change_or_spare_the_linears_they_name(tmp_path):
    folder, sparsity = run_sparsify(
        tmp_path,
        "sparsify.overrides=[{modules: [model.layers.0.*], skip: true},"
        " {modules: [o_proj], pattern: '2:4'}, {modules: [down_proj], sparsity: 0.25}]",
    )
    assert sparsity["model.layers.0.mlp.up_proj"] == 0
    assert sparsity["model.layers.1.mlp.up_proj"] == 0.5
    assert sparsity["model.layers.1.mlp.down_proj"] == 0.25
    mask = {name: mask for name, _, mask in stored(folder)}[
        "model.layers.1.self_attn.o_proj.weight"
    ]
    assert (mask.reshape(-1, 4).sum(dim=1) == 2).all()


def test_an_override_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"overrides.0.modules: found oproj, which matches no dec"):
        run_sparsify(tmp_path, "sparsify.overrides=[{modules: [oproj], skip: true}]")


def test_a_sparse_checkpoint_is_taken_as_it_is(tmp_path):
    first, made = run_sparsify(tmp_path)
    (tmp_path / "second").mkdir()
    second, found = run_sparsify(
        tmp_path / "second", "sparsify={method: existing}", model=first / "model"
    )
    assert found == made
    for (_, weight, mask), (_, again, found_mask) in zip(
        stored(first), stored(second), strict=True
    ):
        assert torch.equal(weight, again) and torch.equal(mask, found_mask)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = random_model(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight: has NaN"):
        run_sparsify(tmp_path, model=model)


def test_a_weight_that_is_not_stored_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_model(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight is not stored"):
        run_sparsify(tmp_path, model=model)


def test_allocation_keeps_the_overall_sparsity(tmp_path):
    folder, sparsity = run_sparsify(tmp_path, "sparsify.allocation=output-error")
    assert sparsity["all"] == pytest.approx(0.5, abs=1e-3)
    assert max(sparsity.values()) > 0.52 and min(sparsity.values()) < 0.48
    for _, weight, mask in stored(folder):
        assert torch.equal(weight == 0, ~mask)
