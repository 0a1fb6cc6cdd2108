"""Build models whose parameters take no memory, from transformers' configs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def empty_model(config: "PretrainedConfig", attention: str | None = None) -> "PreTrainedModel":
    """Build a float32 causal language model whose parameters take no memory; buffers are real.

    :param attention: name of the attention implementation; None for transformers' default.
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
