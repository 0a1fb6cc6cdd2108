"""What transformers makes of a config, without weights: shapes, and the family of any model type.

Imports neither torch nor transformers until a model is asked for: configs are read on devices too.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.model.families import FAMILIES, Family

logger = logging.getLogger(__name__)
# Fields of config.json that say how many experts a token may be sent to.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
OTHER_SENSES = ("vision_config", "audio_config", "vision_tower")


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a Hugging Face ``config.json``; of one that is not listed, by its structure.

    :raises UserError: naming ``where``, if it has no blocks of Linears that could be compressed.
    """
    model_type = config.get("model_type")
    if model_type in FAMILIES:
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
    """Every weight of the model and its shape, from ``config.json`` alone.

    :raises UserError: naming ``where`` and what transformers can't make a model of.
    """
    model = _empty_of(config, where)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def read_config(folder: Path) -> Any:
    """transformers' config of a model folder, as if its weights were not quantized."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


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
            config, dtype=torch.float32, attn_implementation=attention
        )
    return model.eval().requires_grad_(False)


def _empty_of(config: dict[str, Any], where: str) -> Any:
    """:raises UserError: if transformers has no causal language model for ``model_type``, or none
    that can be compressed."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{where}: model_type: found {model_type!r}, which is no causal language model of this "
            f"transformers; tested are {', '.join(sorted(FAMILIES))}"
        )
    settings = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    made = AutoConfig.for_model(model_type, **settings)
    _refuse_others(made, where)
    model = empty_model(made)
    model.tie_weights()
    return model


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
