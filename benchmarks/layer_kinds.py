"""Which Linears of a hybrid can be INT4: KL divergence if only one kind of Linear is rounded.

    python benchmarks/layer_kinds.py [--steps 600] [--families qwen3_5_text lfm2] [--seed 0]

Makes a model of two blocks, one recurrent and one with attention. It is measured with random
weights, and again after ``--steps`` steps of training on the embedded task. For every kind of
Linear, all matrices of this kind are rounded to INT4 (round to nearest, groups of 32), and all
other weights stay in floats. The table has the mean KL divergence from the float model, in nats per
token, on held-out problems; and the share of the decoder's weights that are of this kind.

Short convolutions are no Linears. They are rounded per channel, to see what that would cost.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator

import torch
from document import finish, table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sqft_export.builtin.tiny.pretrain import batches, texts
from sqft_export.builtin.tiny.pretrain import train as train_phase
from sqft_export.builtin.tiny.problems import problems
from sqft_export.model.families import FAMILIES, Family
from sqft_export.model.miniature import TOKENIZER
from sqft_export.model.recurrent import replace_recurrent
from sqft_export.numerics.affine import dequantize, fit_grid, quantize

GROUP_SIZE, BITS = 32, 4
BATCH, LEARNING_RATE = 32, 2e-3
TEST_TEXTS = 64
PROBLEMS = 20  # solved during training, to see its progress
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES: dict[str, dict] = {
    "qwen3_5_text": {
        **{"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256},
        **{"linear_num_key_heads": 4, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {
        **{"num_key_value_heads": 2, "intermediate_size": 384, "block_multiple_of": 32},
        "layer_types": ["conv", "full_attention"],
    },
}


def make_model(family: str, seed: int, vocabulary: int) -> nn.Module:
    """Return a random model of two blocks."""
    torch.manual_seed(seed)
    ids = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(family, **SIZES, **SHAPES[family], **ids)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    replace_recurrent(model)
    return model


def kinds_of(model: nn.Module, blocks: str) -> dict[str, list[nn.Module]]:
    """Return path in a block -> the Linears and convolutions there."""
    found = defaultdict(list)
    for name, module in model.named_modules():
        if name.startswith(f"{blocks}.") and isinstance(module, nn.Linear | nn.Conv1d):
            found[name.removeprefix(f"{blocks}.").partition(".")[2]].append(module)
    return found


def round_weight(weight: Tensor) -> Tensor:
    """Return a weight on its INT4 grid; filters of a convolution have a scale per channel."""
    matrix = weight.flatten(1)
    size = GROUP_SIZE if matrix.shape[1] % GROUP_SIZE == 0 else matrix.shape[1]
    grid = fit_grid(matrix, BITS, size, True)
    return dequantize(quantize(matrix, grid), grid).reshape(weight.shape)


@torch.no_grad()
def log_probabilities(model: nn.Module, held_out: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return the log-probabilities at every token that is no padding, ``[tokens, vocabulary]``."""
    model.eval()
    found = []
    for ids, labels in held_out:
        logits = model(input_ids=ids, use_cache=False).logits
        found.append(logits[labels != -100].double().log_softmax(dim=-1))
    return found


def measure(
    model: nn.Module, held_out: list[tuple[Tensor, Tensor]], blocks: str
) -> Iterator[tuple[str, float, float]]:
    """Yield kind, share of the weights in percent, and KL divergence in nats per token."""
    kinds = kinds_of(model, blocks)
    everything = sum(m.weight.numel() for modules in kinds.values() for m in modules)
    expected = log_probabilities(model, held_out)
    for kind, modules in kinds.items():
        kept = [module.weight.data for module in modules]
        for module in modules:
            module.weight.data = round_weight(module.weight.data)
        rounded = log_probabilities(model, held_out)
        for module, weight in zip(modules, kept, strict=True):
            module.weight.data = weight
        total = sum(
            float((p.exp() * (p - q)).sum()) for p, q in zip(expected, rounded, strict=True)
        )
        share = sum(weight.numel() for weight in kept) / everything
        yield kind, 100 * share, total / sum(map(len, expected))


def measure_family(name: str, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Return kind -> share of the weights, and KL divergence before and after training."""
    family, tokenizer = FAMILIES[name], AutoTokenizer.from_pretrained(TOKENIZER)
    stream = batches(tokenizer, texts(seed + 100, True), TEST_TEXTS)
    held_out = [next(stream)]
    model = make_model(name, seed, len(tokenizer))
    random = {kind: (share, kl) for kind, share, kl in measure(model, held_out, family.blocks)}
    model.train()
    items = list(itertools.islice(problems(seed + 1, held_out=True, easy=True), PROBLEMS))
    train_phase(model, tokenizer, seed, True, steps, LEARNING_RATE, items, BATCH)
    trained = {kind: kl for kind, _, kl in measure(model, held_out, family.blocks)}
    return {
        kind: {"percent": share, "random": kl, "trained": trained[kind]}
        for kind, (share, kl) in random.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = {}
    for name in arguments.families:
        found[name] = measure_family(name, arguments.steps, arguments.seed)
        print(f"{name}, {arguments.steps} steps of {BATCH} texts")
        header = ["kind", "% of weights", "KL random", "KL trained", "trained, per %", "stored as"]
        rows = [
            [
                *(kind, *values.values(), values["trained"] / values["percent"]),
                _place(FAMILIES[name], kind),
            ]
            for kind, values in found[name].items()
        ]
        table(header, rows)
    finish("layer_kinds", {}, found | {"steps": arguments.steps})


def _place(family: Family, kind: str) -> str:
    """Return how the family stores a kind of matrix."""
    is_filter = kind.endswith((".conv", ".conv1d"))
    return "floats" if kind in family.floats or is_filter else "INT4"


if __name__ == "__main__":
    main()
