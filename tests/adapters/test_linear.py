import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from sqft_export.adapters.elastic import compressed_layers, elastic_layers, set_ranks
from sqft_export.adapters.files import Base, write_sub_adapter
from sqft_export.adapters.linear import CompressedLinear, _Adapted
from sqft_export.adapters.loading import add_adapters, load_compressed, peft_config
from sqft_export.errors import UserError
from sqft_export.model.families import rank_groups
from sqft_export.numerics.affine import Grid, dequantize, fit_grid
from sqft_export.numerics.masks import mask_to_bits

TARGETS = ("q_proj", "v_proj", "down_proj")


def compressed(masked: bool, quantized: bool, dtype=torch.float32):
    """A layer, its mask, an input and an update, seeded."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 24, bias=False)
    mask = torch.rand(24, 64, generator=generator) < 0.5
    weight = torch.randn(24, 64, generator=generator) * 0.1 * mask
    linear.weight.data = weight.to(dtype)
    grid = fit_grid(weight, 4, 32, True) if quantized else None
    layer = CompressedLinear.from_linear(linear, mask_to_bits(mask) if masked else None, grid)
    x = torch.randn(3, 5, 64, generator=generator)
    lora_a = torch.randn(8, 64, generator=generator) * 0.1
    lora_b = torch.randn(24, 8, generator=generator) * 0.1
    return layer, mask if masked else torch.ones_like(mask), x, lora_a, lora_b


def literal_forward(layer: CompressedLinear, mask, x, lora_a, lora_b, scaling: float):
    """W_eff by plain autograd; the straight-through estimator by detach, zero where clamped."""
    weight = layer.weight.float() + mask * (lora_b @ lora_a) * scaling
    if layer.grid:
        scale = layer.grid.scale.float().repeat_interleave(32, dim=1)
        clamped = (weight / scale).clamp(-8.49999, 7.49999) * scale
        rounded = (weight / scale).round().clamp(-8, 7) * scale
        weight = clamped + (rounded - clamped).detach()
    return x @ weight.T


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_forward_and_gradients_are_those_of_the_formula(masked, quantized):
    layer, mask, x, lora_a, lora_b = compressed(masked, quantized)
    ours = [t.clone().requires_grad_() for t in (x, lora_a, lora_b)]
    twin = [t.clone().requires_grad_() for t in (x, lora_a, lora_b)]
    y = _Adapted.apply(*ours, None, layer, 2.0)
    expected = literal_forward(layer, mask, *twin, 2.0)
    torch.testing.assert_close(y, expected)
    (y.sin()).sum().backward()
    (expected.sin()).sum().backward()
    for one, other in zip(ours, twin, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pruned_weights_are_zero_in_the_forward_whatever_the_update(dtype):
    layer, mask, _, lora_a, lora_b = compressed(True, True, dtype)
    update = (lora_a * 50, lora_b, 2.0)
    assert layer.weight.dtype == dtype
    assert (layer.effective_weight(update)[~mask] == 0).all()
    assert torch.equal(layer.effective_weight(update), dequantize(layer.codes(update), layer.grid))


def adapted(folder, dropout=0.0):
    torch.manual_seed(0)
    model = add_adapters(load_compressed(Base(folder), torch.float32), TARGETS, 8, 16, dropout)
    for layer in elastic_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return model


def test_unknown_target_is_named_with_what_there_is(random_llama):
    model = load_compressed(Base(random_llama), torch.float32)
    with pytest.raises(UserError, match=r"q_prj.*allowed are down_proj, gate_proj"):
        add_adapters(model, ("q_prj",), 8, 16, 0.0)


def test_a_sub_adapter_loads_in_stock_peft_and_gives_the_same_logits(random_llama, tmp_path):
    model = adapted(random_llama).eval()
    layers = elastic_layers(model)
    groups = rank_groups(layers, "model.layers", (("q_proj", "v_proj"),))
    assert list(groups) == ["0.q_proj,v_proj", "1.q_proj,v_proj"]
    set_ranks(layers, groups, {"0.q_proj,v_proj": 2, "1.q_proj,v_proj": 5})
    assert {layer.active_rank for layer in layers.values()} == {2, 5, 8}
    updates = {name: layer.update() for name, layer in layers.items()}
    write_sub_adapter(peft_config(model), updates, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(random_llama), tmp_path / "adapter"
    ).eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_same_with_gradient_checkpointing(random_llama):
    ids = torch.arange(20).reshape(2, 10)

    def gradients(checkpointing: bool):
        model = adapted(random_llama).train()
        layers = elastic_layers(model)
        groups = rank_groups(layers, "model.layers", (("q_proj", "v_proj"),))
        set_ranks(layers, groups, dict.fromkeys(groups, 3))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, checkpointed)


def test_dropout_leaves_the_base_alone_and_evaluation_too(random_llama):
    model = adapted(random_llama, dropout=0.5)
    for layer in elastic_layers(model).values():
        nn.init.zeros_(layer.lora_B["default"].weight)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        # With B zero the adapter adds nothing, so dropout must change nothing.
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_scales_learn_by_the_derivative_of_the_formula():
    """Against autograd on ``s (clamp(w / s) rounded by detach)``, the zero point not in the way."""
    layer, mask, x, lora_a, lora_b = compressed(True, True)
    shift = torch.full(layer.scale.shape, 0.05, requires_grad=True)
    y = _Adapted.apply(x, lora_a, lora_b, shift, layer, 2.0)
    y.sin().sum().backward()
    twin = torch.full(layer.scale.shape, 0.05, requires_grad=True)
    stored = (layer.scale.float() * twin.exp()).half().float()
    # Straight through the rounding of the scale as well.
    scale = layer.scale.float() * twin.exp()
    scale = (scale + (stored - scale).detach()).repeat_interleave(32, dim=1)
    weight = layer.weight.float() + mask * (lora_b @ lora_a) * 2.0
    steps = (weight / scale).clamp(-8.49999, 7.49999)
    effective = scale * (steps + (steps.round() - steps).detach())
    (x @ effective.T).sin().sum().backward()
    torch.testing.assert_close(shift.grad, twin.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_inside_the_range_it_is_what_nncf_trains():
    """NNCF's FQ_LORA: the same grid points, the same gradients of adapter and scale."""
    quantize_functions = pytest.importorskip("nncf.torch.quantization.quantize_functions")
    layer, _, x, lora_a, lora_b = compressed(False, True)
    lora_a, lora_b = lora_a * 0.01, lora_b * 0.01  # no weight is clamped
    layer.scale *= 1.2
    ours = [t.clone().requires_grad_() for t in (lora_a, lora_b, torch.zeros(layer.scale.shape))]
    y = _Adapted.apply(x, *ours, layer, 1.0)
    y.sin().sum().backward()
    theirs = [t.clone().requires_grad_() for t in (lora_a, lora_b)]
    # NNCF's scale is the negative end of the range, -8 steps.
    ends = (8 * layer.scale.float()).unsqueeze(2).requires_grad_()
    shape = (24, 2, 32)
    weight = quantize_functions.symmetric_quantize_lora(
        layer.weight, shape, *theirs, ends, -8, 7, 16, 1e-16
    )
    (x @ weight.T).sin().sum().backward()
    torch.testing.assert_close(layer.effective_weight((lora_a, lora_b, 1.0)), weight.detach())
    for one, other in zip(ours[:2], theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    relative = (ends.grad * ends.detach()).squeeze(2)  # per relative step, as ours is
    cosine = torch.nn.functional.cosine_similarity(ours[2].grad, relative, dim=0)
    assert (cosine > 0.99).all()


def test_extracted_copies_give_the_codes_of_the_slices():
    layer, _, _, lora_a, lora_b = compressed(True, True)
    sliced = (lora_a[:5], lora_b[:, :5], 2.0)
    copied = (lora_a[:5].clone(), lora_b[:, :5].clone().contiguous(), 2.0)
    assert torch.equal(layer.codes(sliced), layer.codes(copied))


def test_linears_keep_the_dtype_of_the_checkpoint(tmp_path, random_llama):
    AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float16).save_pretrained(
        tmp_path
    )
    model = load_compressed(Base(tmp_path), torch.float32)
    assert {layer.weight.dtype for layer, _ in compressed_layers(model).values()} == {torch.float16}
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_a_grid_without_mask_trains_every_weight():
    grid = Grid(torch.ones(2, 1).half(), torch.full((2, 1), 8, dtype=torch.uint8), 4, 4)
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data.zero_()
    layer = CompressedLinear.from_linear(linear, None, grid)
    update = (torch.ones(1, 4), torch.full((2, 1), 3.0), 1.0)
    assert torch.equal(layer.effective_weight(update), torch.full((2, 4), 3.0))
