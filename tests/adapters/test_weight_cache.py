"""The effective weight is cached until its operands change; training never uses the cache."""

import numpy as np
import pytest
import torch
from torch import nn

from sqft_export.adapters.elastic import (
    cache_effective_weights,
    drop_effective_weights,
    elastic_layers,
    set_ranks,
    train_scales,
)
from sqft_export.adapters.files import Base
from sqft_export.adapters.linear import CompressedLinear
from sqft_export.adapters.loading import add_adapters, load_compressed
from sqft_export.model.families import rank_groups
from sqft_export.model.storage import GRIDS, GridWriter
from sqft_export.numerics import fused
from sqft_export.numerics.affine import fit_grid
from sqft_export.targets.torch import TorchSession

ADAPTED = ("q_proj", "v_proj", "down_proj")
IDS = np.arange(12).reshape(2, 6)


@pytest.fixture
def quantized_base(random_llama, tmp_path):
    """Every Linear has a grid, so that all of them compute a weight."""
    model = load_compressed(Base(random_llama), torch.float32)
    with GridWriter(tmp_path) as writer:
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear):
                size = 4 if module.in_features % 32 else 32
                writer.add(name, fit_grid(module.weight, 4, size, True))
    assert list(tmp_path.glob(f"{GRIDS}*"))
    return Base(random_llama, None, tmp_path)


def tuned(base: Base, dtype: torch.dtype = torch.float32, scales: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = add_adapters(load_compressed(base, dtype), ADAPTED, 8, 16, 0.1)
    for layer in elastic_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    if scales:
        train_scales(model)
    return model.eval()


def ranks(model: nn.Module, rank: int) -> None:
    layers = elastic_layers(model)
    groups = rank_groups(layers, "model.layers", (("q_proj", "v_proj"), ("down_proj",)))
    set_ranks(layers, groups, dict.fromkeys(groups, rank))


@pytest.fixture
def computed(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of every effective weight that is computed from now on."""
    shapes: list[tuple[int, ...]] = []
    compute = fused.effective_weight

    def counting(base, *rest):
        shapes.append(tuple(base.weight.shape))
        return compute(base, *rest)

    monkeypatch.setattr(fused, "effective_weight", counting)
    return shapes


def generate(model: nn.Module, tokens: int = 4) -> np.ndarray:
    """Logits of a prompt and of tokens after it, one pass each."""
    session = TorchSession(model)
    found = [session.forward(IDS)]
    for _ in range(tokens):
        found.append(session.forward(found[-1][:, -1:].argmax(axis=-1)))
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [False, True])
def test_an_evaluation_computes_every_weight_once_and_gives_the_same_bits(
    quantized_base, computed, dtype, scales
):
    model = tuned(quantized_base, dtype, scales)
    ranks(model, 4)
    computed.clear()
    expected = generate(model)
    layers = len(elastic_layers(model))
    assert len(computed) == 5 * layers  # a prompt and four tokens
    assert cache_effective_weights(model)
    computed.clear()
    assert np.array_equal(generate(model), expected)
    assert np.array_equal(generate(model), expected)
    assert len(computed) == layers


def test_an_unmerged_adapter_reads_the_base_once_too(random_llama, quantized_base, computed):
    """A base in 16 bits under activations in 32 is rounded to its grid once, not per token."""
    half = load_compressed(quantized_base, torch.float32)
    for module in half.modules():
        if isinstance(module, CompressedLinear):
            module.weight.data, module.unmerged = module.weight.data.half(), True
    model = add_adapters(half, ADAPTED, 8, 16, 0.0).eval()
    computed.clear()
    expected = generate(model)
    linears = sum(isinstance(m, CompressedLinear) for m in model.modules())
    assert len(computed) == 5 * linears
    cache_effective_weights(model)
    computed.clear()
    assert np.array_equal(generate(model), expected)
    assert len(computed) == linears


def change_rank(model):
    ranks(model, 2)


def change_adapter(model):
    with torch.no_grad():
        next(iter(elastic_layers(model).values())).lora_A["default"].weight.mul_(2)


def replace_adapter(model):
    layer = next(iter(elastic_layers(model).values()))
    layer.lora_B["default"].weight = nn.Parameter(layer.lora_B["default"].weight.detach() * 2)


def load_adapter(model):
    state = {n: t * 1.5 for n, t in model.state_dict().items() if ".lora_B." in n}
    model.load_state_dict(state, strict=False)


def step_optimizer(model):
    weights = [p for n, p in model.named_parameters() if ".lora_" in n]
    model(input_ids=torch.from_numpy(IDS)).logits.square().mean().backward()
    torch.optim.AdamW(weights, lr=0.05).step()


def move_scales(model):
    for layer in elastic_layers(model).values():
        with torch.no_grad():
            layer.lora_shift["default"].fill_(0.3)


def apply_trained_scales(model):
    move_scales(model)
    for layer in elastic_layers(model).values():
        layer.apply_trained_scales()


def change_scaling(model):
    for layer in elastic_layers(model).values():
        layer.scaling["default"] *= 2


def change_base(model):
    for layer in elastic_layers(model).values():
        base = layer.get_base_layer()
        base.weight.data = base.weight.data * 2


CHANGES = (
    *(change_rank, change_adapter, replace_adapter, load_adapter, step_optimizer),
    *(move_scales, apply_trained_scales, change_scaling, change_base),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_what_the_weight_is_made_from_is_seen(quantized_base, change):
    scales = change in (move_scales, apply_trained_scales)
    model, plain = (tuned(quantized_base, scales=scales) for _ in range(2))
    cache_effective_weights(model)
    before = generate(model)
    for one in (model, plain):
        change(one)
    found = generate(model)
    assert np.array_equal(found, generate(plain))
    assert not np.array_equal(found, before)


def test_training_never_takes_a_cached_weight(quantized_base, computed):
    model = tuned(quantized_base)
    cache_effective_weights(model)
    generate(model)
    for training, gradient in ((True, True), (True, False), (False, True)):
        computed.clear()
        model.train(training)
        with torch.set_grad_enabled(gradient):
            logits = model(input_ids=torch.from_numpy(IDS)).logits
        assert len(computed) == len(elastic_layers(model))
        assert logits.requires_grad == gradient


def test_the_cache_holds_one_weight_a_layer_and_is_freed(quantized_base):
    model = tuned(quantized_base)
    cache_effective_weights(model)
    for rank in (8, 4, 2):
        ranks(model, rank)
        generate(model)
    caches = [m.cache for m in model.modules() if isinstance(m, CompressedLinear)]
    kept = [cache.weight for cache in caches if cache and cache.weight is not None]
    sizes = [layer.get_base_layer().weight.nbytes for layer in elastic_layers(model).values()]
    assert sum(weight.nbytes for weight in kept) == sum(sizes)
    model.double()  # a move of the model frees the weights of the old place
    assert all(m.cache.weight is None for m in model.modules() if getattr(m, "cache", None))
    drop_effective_weights(model)
    assert all(m.cache is None for m in model.modules() if isinstance(m, CompressedLinear))


def test_where_memory_does_not_hold_the_weights_none_are_kept(quantized_base, monkeypatch):
    model = tuned(quantized_base)
    monkeypatch.setattr("sqft_export.adapters.elastic.float32_fits", lambda weights: False)
    assert not cache_effective_weights(model)
    assert all(m.cache is None for m in model.modules() if isinstance(m, CompressedLinear))
