"""Build models whose parameters take no memory, from transformers' configs."""

from typing import TYPE_CHECKING

from sqft_export.model.families import FAMILIES, Family

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
    if family and family.transposed:
        _replace_transposed(model, family)
    if family and family.buffers:
        _replace_buffers(model, family)
    if family and family.recurrent:
        from sqft_export.model.recurrent import replace_recurrent

        replace_recurrent(model)
    for module in model.modules():
        if type(module).__name__ in _PLAIN_LINEARS:
            module.__class__ = nn.Linear
    return model.eval().requires_grad_(False)


def _replace_transposed(model: "PreTrainedModel", family: Family) -> None:
    """Replace modules with a matrix ``[in, out]`` by empty Linears, whose matrix is ``[out, in]``.

    :param family: names the modules.
    """
    from torch import nn

    for name, module in list(model.named_modules()):
        if family.is_transposed(f"{name}.weight"):
            inputs, outputs = module.weight.shape
            model.set_submodule(name, nn.Linear(inputs, outputs, device="meta"))


def _replace_buffers(model: "PreTrainedModel", family: Family) -> None:
    """Replace stored buffers of the blocks by empty parameters, which are read as weights are.

    :param family: names the buffers.
    """
    from torch import nn

    for block in model.get_submodule(family.blocks).children():
        for path in family.buffers:
            module, _, name = path.rpartition(".")
            owner = block.get_submodule(module)
            empty = getattr(owner, name).to("meta")
            delattr(owner, name)
            owner.register_parameter(name, nn.Parameter(empty))
