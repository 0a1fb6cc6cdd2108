"""Gemma models whose settings llama.cpp's graphs do not have."""

import pytest
from transformers import Gemma2Config

from sqft_export.targets.gguf.architectures import architecture_lacks

NUMBERS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def test_gemma_2_as_released_is_written():
    assert architecture_lacks(Gemma2Config(query_pre_attn_scalar=256).to_dict()) is None


@pytest.mark.parametrize("field", NUMBERS)
def test_gemma_2_without_a_number_that_llama_cpp_always_uses_is_refused(field):
    config = Gemma2Config(query_pre_attn_scalar=256).to_dict() | {field: None}
    assert architecture_lacks(config) == f"llama.cpp requires {field} for gemma2"
