"""Build a small random model with a config's structure, to export and run it in seconds.

Settings that change the graph are kept: model type, kinds of layers, windows, rope scaling, head
size, biases, norms. Widths, vocabulary and the number of layers are reduced.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.model.companions import COMPANIONS
from sqft_export.model.empty import empty_model
from sqft_export.model.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "decoder_attention_heads")
_WIDTHS = ("hidden_size", "n_embd", "word_embed_proj_dim", "d_model")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_INNER = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "block_ff_dim",
    "decoder_ffn_dim",
)
_WEIGHT_STD = 0.2  # large enough that a wrong graph gives different logits
TOKENIZER = Path(__file__).parent.parent / "builtin" / "tiny"  # folder of the embedded model
_VOCABULARY = 416  # tokens of the embedded tokenizer
_VOCABULARIES = {"vocab_size", "vocab_size_per_layer_input"}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def shrink_config(config: Mapping[str, object]) -> dict[str, object]:
    """Return a config with the same structure and small widths.

    One layer of every kind is kept, and at least two layers.

    :param config: dict of transformers' config class.
    """
    small = dict(config)
    sizes = {name: value for name, value in config.items() if isinstance(value, int)}
    layers = next(sizes[name] for name in _LAYERS if name in sizes)
    lists = {k: v for k, v in config.items() if "layer" in k and isinstance(v, list)}
    lists = {name: values for name, values in lists.items() if len(values) == layers}
    shared = sizes.get("num_kv_shared_layers", 0)
    reads_another = [index >= layers - shared for index in range(layers)]
    kept = _one_of_every_kind(list(zip(reads_another, *lists.values(), strict=True)))
    small |= {name: [values[i] for i in kept] for name, values in lists.items()}
    small |= {name: len(kept) for name in _LAYERS if name in config}
    small |= {"num_kv_shared_layers": sum(reads_another[i] for i in kept)} if shared else {}
    heads = next(sizes[name] for name in _HEADS if name in sizes)
    groups = {key: sizes[key] for key in _GROUPS if sizes.get(key)}
    few = 4  # a class may need a multiple of four (CodeGen)
    widths = {key: sizes[key] // heads * few for key in _WIDTHS if sizes.get(key)}
    small |= widths | {key: few for key in _HEADS if key in config}
    small |= {key: few if n == heads else min(2, n) for key, n in groups.items()}
    small |= {key: 2 * max(widths.values()) for key in _INNER if config.get(key)}
    small |= {key: value for key, value in _TOKENS.items() if key in config}
    small |= dict.fromkeys(_VOCABULARIES & config.keys(), _VOCABULARY)
    return small | {"dtype": "float32"}


def _one_of_every_kind(kinds: list[tuple[object, ...]]) -> list[int]:
    """Return the indices of the first layer of every kind, in order; at least two if possible."""
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    found = sorted(first.values())
    return found if len(found) > 1 or len(kinds) == 1 else [0, 1]


def make_miniature(config: "PretrainedConfig", attention: str | None = None) -> "PreTrainedModel":
    """Return a random model of a shrunk config.

    :param config: transformers' config of the full model.
    :param attention: name of the attention implementation; None for transformers' default.
    :raises Exception: any error of transformers, if the small sizes do not fit each other.
    """
    import torch
    from torch import nn

    made = type(config).from_dict(shrink_config(config.to_dict()))
    made.architectures = config.architectures
    model = empty_model(made, attention)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        parent, _, child = name.rpartition(".")
        value = _WEIGHT_STD * torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 and child != "bias":
            value = 1 + value / 2
        weight = nn.Parameter(value, requires_grad=False)
        model.get_submodule(parent).register_parameter(child, weight)
    model.tie_weights()
    return model


def write_miniature(config: "PretrainedConfig", folder: Path) -> None:
    """Write a miniature as a Hugging Face folder, with the tokenizer of the embedded model.

    :param config: transformers' config of the full model.
    :raises Exception: any error of transformers, if the small sizes do not fit each other.
    """
    model = make_miniature(config)
    family = FAMILIES.get(config.model_type)
    stored = {
        name: tensor.T.contiguous() if family and family.is_transposed(name) else tensor
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=stored)
    for pattern in COMPANIONS:
        for file in TOKENIZER.glob(pattern):
            if file.name.startswith(("tokenizer", "special_tokens")):
                shutil.copyfile(file, folder / file.name)
