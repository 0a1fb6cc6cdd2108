"""What transformers makes of a config, without its weights: shapes, and unlisted model types."""

from typing import Any

from torch import nn

from sqft_export import families
from sqft_export.errors import UserError

# Fields of config.json that say how many experts a token may be sent to.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
OTHER_SENSES = ("vision_config", "audio_config", "vision_tower")


def empty_model(config: dict[str, Any], where: str) -> Any:
    """A causal language model whose parameters take no memory.

    :raises UserError: if ``model_type`` is none that transformers has a causal model for.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{where}: model_type: found {model_type!r}, which is no causal language model of this "
            f"transformers; tested are {', '.join(sorted(families.FAMILIES))}"
        )
    settings = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    made = AutoConfig.for_model(model_type, **settings)
    _refuse_others(made, where)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(made)
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


def by_structure(config: dict[str, Any], where: str) -> families.Family:
    """The longest list of equal blocks with Linears in them, every one of which gets an adapter.

    :raises UserError: if there is none.
    """
    model = empty_model(config, where)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(_linears(module[:1]))
    ]
    model_type = str(config["model_type"])
    if not lists:
        raise UserError(
            f"{where}: model_type: {model_type} has no list of blocks with Linears in them; tested "
            f"are {', '.join(sorted(families.FAMILIES))}"
        )
    blocks, module = max(lists, key=lambda found: len(found[1]))
    targets = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in _linears(module[0])))
    names = {id(part): name for name, part in model.named_modules()}
    return families.Family(
        model_types=(model_type,),
        blocks=blocks,
        embedding=names[id(model.get_input_embeddings())],
        head=names[id(model.get_output_embeddings())],
        targets=targets,
        groups=tuple((target,) for target in targets),
        tied=bool(model.config.tie_word_embeddings),
    )


def _linears(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
