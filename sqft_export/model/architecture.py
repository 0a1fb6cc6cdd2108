"""What transformers makes of a config, without weights: shapes, and the family of any model type.

Imports neither torch nor transformers until a model is asked for: configs are read on devices too.
"""

import functools
import json
import logging
from typing import Any

from sqft_export.errors import UserError, one_line
from sqft_export.model.families import FAMILIES, Family

logger = logging.getLogger(__name__)
# Fields of config.json that say how many experts a token may be sent to.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Sizes of a model, and what none goes beyond.
_LARGEST = {
    **dict.fromkeys(("hidden_size", "n_embd", "head_dim", "word_embed_proj_dim"), 2**17),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 2**19),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2**10),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 2**12),
    "vocab_size": 2**22,
    "max_position_embeddings": 2**24,
}
OTHER_SENSES = ("vision_config", "audio_config", "vision_tower")


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a Hugging Face ``config.json``; of one that is not listed, by its structure.

    :raises UserError: naming ``where``, if it has no blocks of Linears that could be compressed.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    return _unlisted(json.dumps(config, sort_keys=True, default=str), where)


@functools.cache
def _unlisted(config: str, where: str) -> Family:
    family = by_structure(json.loads(config), where)
    logger.warning(
        "%s: model_type %s is none of the tested ones (%s); taken by its structure: blocks %s, "
        "adapters on %s",
        where,
        family.model_types[0],
        ", ".join(sorted(FAMILIES)),
        family.blocks,
        ", ".join(family.targets),
    )
    return family


def shapes_of(config: dict[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Every weight of the model and its shape, from ``config.json`` alone; of two that are tied the
    embedding.

    :raises UserError: naming ``where`` and what transformers can't make a model of.
    """
    return dict(_shapes(json.dumps(config, sort_keys=True, default=str), where))


@functools.cache
def _shapes(config: str, where: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    model = _empty_of(json.loads(config), where)
    return tuple((name, tuple(weight.shape)) for name, weight in model.named_parameters())


def transformers_config(config: dict[str, Any], where: str) -> Any:
    """transformers' config of a ``config.json``, as if its weights were not quantized.

    :raises UserError: naming ``where`` and the field, if it can't be one.
    """
    from transformers import AutoConfig

    settings = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    try:
        return AutoConfig.for_model(config["model_type"], **settings)
    except Exception as error:  # whatever transformers and its validation raise
        raise UserError(f"{where}: transformers does not take it: {_short(error)}") from error


def _short(error: Exception) -> str:
    """What an error says, on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def empty_model(config: Any, attention: str | None = None) -> Any:
    """A float32 causal language model whose parameters take no memory; buffers are real.

    :param config: transformers'.
    :param attention: its implementation; None for transformers' choice.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=False,
        )
    return model.eval().requires_grad_(False)


def _empty_of(config: dict[str, Any], where: str) -> Any:
    """:raises UserError: if transformers has no causal language model for ``model_type``, or none
    that can be compressed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{where}: model_type: found {model_type!r}, which is no causal language model of this "
            f"transformers; tested are {', '.join(sorted(FAMILIES))}"
        )
    _check_sizes(config, where)
    made = transformers_config(config, where)
    _refuse_others(made, where)
    try:
        model = empty_model(made)
    except Exception as error:  # whatever a model class raises at sizes that don't fit each other
        raise UserError(f"{where}: no model can be made of it: {_short(error)}") from error
    model.tie_weights()
    return model


def _check_sizes(config: dict[str, Any], where: str) -> None:
    """Sizes that no model has would take hours and all memory before they fail."""
    for field, most in _LARGEST.items():
        found = config.get(field)
        if found is not None and (type(found) is not int or not 0 < found <= most):
            raise UserError(f"{where}: {field}: found {found!r}; allowed are 1 to {most}")


def _refuse_others(config: Any, where: str) -> None:
    for name in EXPERTS:
        if (getattr(config, name, None) or 0) > 1:
            raise UserError(
                f"{where}: model_type: {config.model_type} is a mixture of experts ({name}: "
                f"{getattr(config, name)}); their weights can't be pruned by every token's inputs"
            )
    for name in OTHER_SENSES:
        if getattr(config, name, None):
            raise UserError(
                f"{where}: model_type: {config.model_type} also sees or hears ({name}); only "
                "language models are compressed, such as its text model saved alone"
            )


def by_structure(config: dict[str, Any], where: str) -> Family:
    """The longest list of equal blocks with Linears in them, every one of which gets an adapter.

    :raises UserError: if there is none.
    """
    from torch import nn

    model = _empty_of(config, where)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(_linears(module[:1]))
    ]
    model_type = str(config["model_type"])
    if not lists:
        raise UserError(
            f"{where}: model_type: {model_type} has no list of blocks with Linears in them; tested "
            f"are {', '.join(sorted(FAMILIES))}"
        )
    blocks, module = max(lists, key=lambda found: len(found[1]))
    targets = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in _linears(module[0])))
    names = {id(part): name for name, part in model.named_modules()}
    return Family(
        model_types=(model_type,),
        blocks=blocks,
        embedding=names[id(model.get_input_embeddings())],
        head=names[id(model.get_output_embeddings())],
        targets=targets,
        groups=tuple((target,) for target in targets),
        tied=bool(model.config.tie_word_embeddings),
    )


def _linears(module: Any) -> list[str]:
    from torch import nn

    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
