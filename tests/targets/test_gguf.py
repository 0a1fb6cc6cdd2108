"""GGUF: every family in the real llama.cpp, bit for bit and by its logits."""

import pytest

from conftest import random_model, small_recipe
from sqft_export.model.families import FAMILIES
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets.gguf.architectures import ARCHITECTURES

# In whole blocks of 32; gemma's constants as llama.cpp has them.
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
MODELS = {
    "llama": {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True},
    "mistral": {"head_dim": 32, "dtype": "bfloat16", "sliding_window": None},
    "phi3": {"original_max_position_embeddings": 256},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"num_hidden_layers": 6},
    "bloom": {},
    "gpt_neox": {"rotary_pct": 0.25},
}
GGUF = (
    "adapt=none",
    "sparsify.method=magnitude",
    "quantize={method: rtn, bits: 4, group_size: 32}",
    "export={targets: [gguf]}",
    "benchmark.baselines=[]",
    "verify.prompts=4",
)


@pytest.fixture(scope="module", params=MODELS)
def family_run(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = random_model(
        root / "model", model_type=request.param, intermediate_size=192, **MODELS[request.param]
    )
    return run_recipe(small_recipe(*GGUF, model_path=model), root / "runs", ("verify",))


def test_every_architecture_has_its_case():
    assert set(MODELS) == set(ARCHITECTURES) == set(FAMILIES) - {"opt"}


def test_a_family_is_the_same_in_llama_cpp(family_run):
    checks = {check["name"]: check for check in family_run["verify"].metrics["checks"]}
    assert all(check["passed"] for check in checks.values())
    for name in (
        "codes, scales, zero points: merged and gguf",
        "pruned positions zero in gguf",
        "float weights: merged and gguf",
        "token ids: base and llama.cpp",
        "logits: merged in torch and gguf",
        "greedy tokens: merged in torch and gguf",
        "divergence of gguf in its default mode",
    ):
        assert checks[name]["compared"]
