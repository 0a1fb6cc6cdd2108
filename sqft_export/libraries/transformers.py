"""Private parts of transformers' models, and its import without scikit-learn."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DISTRIBUTION = "transformers"
PRIVATE = ("transformers:GraniteMoeHybridModel._update_mamba_mask",)


def import_without_sklearn() -> None:
    """Import transformers' generation without scikit-learn, which saves seconds.

    Only assisted generation uses it. This changes transformers for the whole process, so it is for
    our own worker processes.
    """
    if "sklearn" in sys.modules:
        return
    sys.modules["sklearn"] = None  # type: ignore[assignment]
    try:
        import transformers.generation.candidate_generator  # noqa: F401
    finally:
        del sys.modules["sklearn"]


def drop_recurrent_mask(model: "PreTrainedModel") -> None:
    """Make a hybrid without recurrent layers compute no mask for them.

    The mask depends on values of the attention mask, which a traced graph can't branch on, and
    on the state of a recurrent layer, which the cache of such a model lacks.
    """
    decoder = model.base_model
    if hasattr(decoder, "_update_mamba_mask"):
        decoder._update_mamba_mask = lambda attention_mask, past_key_values: None
