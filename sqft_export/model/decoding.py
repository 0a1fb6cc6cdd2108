"""Run a random miniature of an unlisted model: is it a causal decoder with a key-value cache?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Return how a model differs from a causal decoder; None if it decodes correctly.

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
        with _record_linears(model) as unused:
            full = model(input_ids=ids, use_cache=False).logits
        if unused:
            return f"does not compute {unused[0]} for text alone ({len(unused)} such Linears)"
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


@contextmanager
def _record_linears(model: "PreTrainedModel") -> Iterator[list[str]]:
    """Yield a list of the model's Linears, from which each is removed once it computes."""
    from torch import nn

    unused = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = list(unused)

    def hook_of(name: str) -> Callable[..., None]:
        return lambda *_: names.remove(name) if name in names else None

    hooks = [m.register_forward_pre_hook(hook_of(name)) for name, m in unused.items()]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _differs(found: "Tensor", expected: "Tensor") -> bool:
    if found.shape != expected.shape:
        return True
    return bool((found - expected).abs().max() > _TOLERANCE * expected.std())
