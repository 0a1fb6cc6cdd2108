"""Build models whose parameters take no memory, from transformers' configs."""

from typing import TYPE_CHECKING

from sqft_export.model.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Subclasses of Linear with a forward of the same result, which exporters would trace otherwise.
_PLAIN_LINEARS = ("FalconLinear",)


def empty_model(config: "PretrainedConfig", attention: str | None = None) -> "PreTrainedModel":
    """Build a float32 causal language model whose parameters take no memory; buffers are real.

    :param attention: name of the attention implementation; None for transformers' default.
    """
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoModelForCausalLM

    from sqft_export.libraries.transformers import drop_recurrent_mask

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=False,
        )
    drop_recurrent_mask(model)
    family = FAMILIES.get(config.model_type)
    if family and family.experts:
        from sqft_export.model.experts import separate_experts

        separate_experts(model, family.experts)
    if family and family.recurrent:
        from sqft_export.model.recurrent import replace_recurrent

        replace_recurrent(model)
    for module in model.modules():
        if type(module).__name__ in _PLAIN_LINEARS:
            module.__class__ = nn.Linear
    return model.eval().requires_grad_(False)
