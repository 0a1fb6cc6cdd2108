"""One family of each group, trained for a minute: compression costs accuracy, tuning recovers it.

Random weights show that runtimes agree. They do not show that a family's list of Linears, its
adapters or its calibration are right.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from conftest import TINY, small_recipe
from sqft_export.builtin.tiny.pretrain import train
from sqft_export.builtin.tiny.problems import problems
from sqft_export.run.pipeline import run_recipe

SEED = 7
TRAINING_STEPS, BATCH, LEARNING_RATE = 400, 48, 2e-3
TRAIN_ITEMS, TEST_ITEMS = 600, 100
SHOWN_PROBLEMS = 8  # solved during training, to see its progress
# Share of answer tokens that are the argmax: the tuned INT4 model at 50 % sparsity may lose this
# much against the float model, and gains at least this much over the untuned one.
MAX_LOSS, MIN_GAIN = 0.02, 0.02
SIZES = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}
# Group -> model type, settings, targets.
GROUPS: dict[str, tuple[str, dict]] = {
    "dense": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 4}),
    "wrapper": (
        "gemma3_text",
        {
            **{"num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32},
            "sliding_window": 32,
        },
    ),
    "hybrid": (
        "lfm2",
        {
            **{"num_hidden_layers": 3, "intermediate_size": 384, "block_multiple_of": 32},
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "experts": (
        "qwen3_moe",
        {
            **{"num_hidden_layers": 2, "head_dim": 32, "num_experts": 4, "norm_topk_prob": True},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 128},
        },
    ),
}


def write_wrapper(text: nn.Module, folder: Path) -> None:
    """Store a trained text model in a multimodal model with a random vision tower."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    sections = {"text_config": text.config.to_dict(), "vision_config": vision}
    config = AutoConfig.for_model("gemma3", **sections, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.half().save_pretrained(folder)


def write_text(text: nn.Module, folder: Path) -> None:
    """Store a trained model."""
    text.half().save_pretrained(folder)


def write_problems(folder: Path) -> tuple[str, str]:
    """Write easy problems, and return the settings with their files."""
    for split, held_out, count in (("train", False, TRAIN_ITEMS), ("test", True, TEST_ITEMS)):
        found = itertools.islice(problems(SEED + held_out, held_out, easy=True), count)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in found))
    return f"task.train={folder / 'train.jsonl'}", f"task.test={folder / 'test.jsonl'}"


def trained_model(group: str, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """Return a model that was trained on easy problems for about a minute."""
    model_type, settings = GROUPS[group]
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **SIZES | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    shown = list(itertools.islice(problems(SEED, held_out=True, easy=True), SHOWN_PROBLEMS))
    train(model, tokenizer, SEED, True, TRAINING_STEPS, LEARNING_RATE, shown, BATCH)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_tuning_recovers_what_compression_costs(group, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    write: Callable[[nn.Module, Path], None] = write_wrapper if group == "wrapper" else write_text
    write(trained_model(group, tokenizer), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = small_recipe(
        *write_problems(tmp_path),
        *("adapt.target_modules=null", "adapt.elastic_groups=null", "adapt.batch=32"),
        *("adapt.steps=150", "calibration.samples=64", "quantize.group_size=32"),
        *("benchmark.baselines=[dense, sparse-quantized, merged]", "benchmark.items=32"),
        *("export.sparse_files=false", "export.sparse_execution=false"),
        "export.targets=[openvino, onnx, gguf]",
        model_path=tmp_path / "model",
    )
    run = run_recipe(recipe, tmp_path / "runs", ("verify", "benchmark"))
    assert all(check["passed"] for check in run["verify"].metrics["checks"])
    results = json.loads((run["benchmark"].path / "results.json").read_text())
    found = {row["id"]: row["token_accuracy"] for row in results["rows"]}
    print(group, {row["id"]: (row["token_accuracy"], row["accuracy"]) for row in results["rows"]})
    assert found["merged"] >= found["dense"] - MAX_LOSS, found
    assert found["merged"] >= found["sparse-quantized"] + MIN_GAIN, found
    for runtime in ("openvino", "onnx", "gguf"):
        assert abs(found[runtime] - found["merged"]) < MAX_LOSS, found
