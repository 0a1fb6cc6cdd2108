"""Small random multimodal models, stored as their published checkpoints are."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from conftest import TINY
from sqft_export.model.tensorfiles import TensorFiles, TensorWriter

_TEXT = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}
# Wrapper -> text config, vision config, other fields of its config.
WRAPPERS: dict[str, tuple[dict, dict, dict]] = {
    "gemma3": (
        _TEXT
        | {
            "num_hidden_layers": 6,  # llama.cpp has full attention in every sixth layer
            "sliding_window": 16,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "query_pre_attn_scalar": 16,
        },
        _VISION,
        {"mm_tokens_per_image": 4},
    ),
    "gemma4": (
        _TEXT
        | {
            **{"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 416},
            **{"global_head_dim": 32, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
            **{"num_hidden_layers": 4, "sliding_window": 16, "final_logit_softcapping": 30.0},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {},
        {"vision_config": None, "audio_config": None},
    ),
    "mistral3": (_TEXT | {"model_type": "mistral"}, _VISION | {"head_dim": 16}, {}),
    "mistral3-ministral3": (
        _TEXT | {"model_type": "ministral3"},
        _VISION | {"head_dim": 16},
        {"tie_word_embeddings": False},
    ),
    "llava": (_TEXT | {"model_type": "llama"}, _VISION | {"model_type": "clip_vision_model"}, {}),
    "qwen2_5_vl": (
        _TEXT
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            }
        },
        {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
        {},
    ),
    "qwen3_vl": (
        _TEXT
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            }
        },
        _QWEN_VISION,
        {"tie_word_embeddings": True},
    ),
    "qwen3_5": (
        _TEXT
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
        {k: v for k, v in _QWEN_VISION.items() if k != "deepstack_visual_indexes"},
        {},
    ),
}


def write_wrapper(folder: Path, name: str, prefix: str | None = None) -> PreTrainedModel:
    """Write a random multimodal model with the embedded tokenizer, and return it.

    :param name: entry of ``WRAPPERS``.
    :param prefix: prefix of the text model's stored names in place of ``model.language_model.``;
        older checkpoints have ``language_model.model.``, and other parts without ``model.``.
    """
    text, vision, others = WRAPPERS[name]
    config = AutoConfig.for_model(
        name.partition("-")[0], **{"text_config": text, "vision_config": vision} | others
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in key:
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
    for key, value in model.state_dict().items():
        if key.endswith("layer_scalar"):
            value.normal_(1, 0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    if prefix:
        _rename(folder, prefix)
    return model


def _rename(folder: Path, prefix: str) -> None:
    """Store the tensors under older names."""
    files = TensorFiles(folder)
    tensors = dict(files.tensors(files.headers))
    with TensorWriter(folder) as writer:
        for name, tensor in tensors.items():
            if name.startswith("lm_head."):
                writer.add(f"language_model.{name}", tensor)
            elif "language_model." in name:
                writer.add(
                    prefix + name.partition("language_model.")[2].removeprefix("model."), tensor
                )
            else:
                writer.add(name.removeprefix("model."), tensor)
