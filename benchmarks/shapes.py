"""Mistral-shaped checkpoints with random weights, for benchmarks that only need the size."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import copy_companions
from sqft_export.model.storage import quantization_config
from sqft_export.model.tensorfiles import TensorWriter
from sqft_export.numerics.affine import fit_grid, quantize
from sqft_export.numerics.codes import Grid, QuantizedWeight
from sqft_export.numerics.gptq_layout import to_gptq
from sqft_export.numerics.masks import drop_share

TINY = Path(__file__).parent.parent / "sqft_export" / "builtin" / "tiny"
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "heads": 32, "kv_heads": 8}
MIDDLE = {"hidden_size": 1024, "intermediate_size": 3584, "heads": 16, "kv_heads": 4}
SMALL = {"hidden_size": 256, "intermediate_size": 896, "heads": 8, "kv_heads": 2}


def vocabulary() -> int:
    """Size of the embedded model's vocabulary, whose tokenizer the checkpoints have."""
    return json.loads((TINY / "config.json").read_text())["vocab_size"]


def config_of(shape: dict[str, int], blocks: int, words: int) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": blocks,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "vocab_size": words,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }


def matrices(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The Linears of a block."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["heads"] * shape["kv_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _outer(hidden: int, words: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name in ("model.embed_tokens", "lm_head"):
        weight = torch.randn(words, hidden, generator=generator) * 0.02
        yield f"{name}.weight", weight.bfloat16()
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)


def write_checkpoint(
    folder: Path, shape: dict[str, int], blocks: int, words: int | None = None
) -> None:
    """A Mistral folder with random bfloat16 weights and the embedded model's tokenizer.

    :param words: size of the vocabulary; None for the tokenizer's own.
    """
    folder.mkdir(parents=True)
    for file in TINY.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    words, hidden = words or vocabulary(), shape["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config_of(shape, blocks, words)))
    generator = torch.Generator().manual_seed(0)
    with TensorWriter(folder, shard_bytes=2**28) as writer:
        for name, tensor in _outer(hidden, words, generator):
            writer.add(name, tensor)
        for block in range(blocks):
            for name, size in matrices(shape).items():
                weight = (torch.randn(size, generator=generator) * 0.02).bfloat16()
                writer.add(f"model.layers.{block}.{name}.weight", weight)
            for name in ("input_layernorm", "post_attention_layernorm"):
                ones = torch.ones(hidden, dtype=torch.bfloat16)
                writer.add(f"model.layers.{block}.{name}.weight", ones)


def pruned_grid(weight: Tensor, sparsity: float, bits: int, group_size: int | None):
    """Codes and grid of a matrix pruned by magnitude and rounded to nearest."""
    weight = weight.float()
    weight = weight * drop_share(weight.abs(), sparsity)
    grid = fit_grid(weight, bits, group_size or weight.shape[1], True)
    return quantize(weight, grid), grid


def rolled(codes: Tensor, grid: Grid, rows: int) -> tuple[Tensor, Grid]:
    """The same matrix with its rows moved on by so many."""
    scale, zero_point = (part.roll(rows, 0) for part in (grid.scale, grid.zero_point))
    return codes.roll(rows, 0), replace(grid, scale=scale, zero_point=zero_point)


def write_merged(
    source: Path,
    folder: Path,
    sparsity: float,
    bits: int,
    group_size: int | None,
    blocks: int | None = None,
) -> None:
    """What `merge` writes, of a checkpoint pruned by magnitude and rounded to nearest.

    :param blocks: repeat the blocks there are until there are so many, each copy with its rows in
        another order: what is equal, OpenVINO keeps once.
    """
    checkpoint = Checkpoint(source)
    copy_companions(source, folder)
    wanted = blocks or checkpoint.blocks
    grids: dict[str, Grid] = {}
    pruned: dict[str, tuple[Tensor, Grid]] = {}
    with TensorWriter(folder, shard_bytes=2**28) as writer:
        for name, tensor in checkpoint.tensors(checkpoint.outer_names()):
            writer.add(name, tensor)
        for block in range(wanted):
            original = block % checkpoint.blocks
            for name in checkpoint.block_names(original):
                copy = name.replace(f".layers.{original}.", f".layers.{block}.")
                linear = name.removesuffix(".weight")
                if linear not in checkpoint.linears:
                    writer.add(copy, checkpoint.tensor(name).clone())
                    continue
                if linear not in pruned:
                    weight = checkpoint.tensor(name)
                    pruned[linear] = pruned_grid(weight, sparsity, bits, group_size)
                codes, grid = rolled(*pruned[linear], block // checkpoint.blocks)
                grids[copy.removesuffix(".weight")] = grid
                for part, value in to_gptq(QuantizedWeight(codes, grid)).items():
                    writer.add(f"{copy.removesuffix('.weight')}.{part}", value)
    config = checkpoint.config | {
        "num_hidden_layers": wanted,
        "quantization_config": quantization_config(grids),
    }
    (folder / "config.json").write_text(json.dumps(config))
