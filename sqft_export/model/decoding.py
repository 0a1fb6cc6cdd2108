"""Run a random miniature of an unlisted model: is it a causal decoder with a key-value cache?"""

from typing import TYPE_CHECKING

from sqft_export.errors import one_line
from sqft_export.model.miniature import make_miniature

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

_TOKENS = 12
_PROMPT_TOKENS = 8
_TOLERANCE = 1e-3  # standard deviations of logits; rounding is far below


def find_decoder_fault(config: "PretrainedConfig") -> str | None:
    """Return what a model does that no causal decoder does; None if it decodes as it should.

    None also if the config can't be shrunk, since nothing is known then.

    :param config: transformers' config of the full model.
    """
    import torch

    try:
        model = make_miniature(config)
    except Exception:  # its small sizes do not fit each other
        return None
    ids = torch.randint(5, 400, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        return _fault_of(model, ids)
    except Exception as error:  # model classes raise anything for inputs that they lack
        return f"fails on token ids alone: {type(error).__name__}: {one_line(error, 160)}"


def _fault_of(model: "PreTrainedModel", ids: "Tensor") -> str | None:
    import torch

    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        prompt = model(input_ids=ids[:, :_PROMPT_TOKENS], use_cache=True)
        if _differs(prompt.logits, full[:, :_PROMPT_TOKENS]):
            return "lets tokens see later ones: it is not a causal language model"
        cache = getattr(prompt, "past_key_values", None)
        if not hasattr(cache, "get_seq_length"):
            return "keeps no key-value cache"
        rest = model(input_ids=ids[:, _PROMPT_TOKENS:], past_key_values=cache, use_cache=True)
    if _differs(rest.logits, full[:, _PROMPT_TOKENS:]):
        return "computes other logits with its key-value cache than without it"
    return None


def _differs(found: "Tensor", expected: "Tensor") -> bool:
    if found.shape != expected.shape:
        return True
    return bool((found - expected).abs().max() > _TOLERANCE * expected.std())
