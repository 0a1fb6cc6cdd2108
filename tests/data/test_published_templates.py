"""Chat templates that llama.cpp's source package ships as models publish them, and their spans."""

import pytest
from llama_builds import source
from test_turns import HERMES_CALL, SUNNY, both, check_masks

pytestmark = pytest.mark.slow

SPANS = {
    "HuggingFaceTB-SmolLM3-3B": both("<|im_end|>"),
    "ibm-granite-granite-3.3-2B-Instruct": both("<|end_of_text|>"),
    "ibm-granite-granite-4.0": both("<|end_of_text|>")
    | {"tools": [f"{HERMES_CALL}<|end_of_text|>", f"{SUNNY}<|end_of_text|>"]},
    "Qwen-Qwen2.5-7B-Instruct": both("<|im_end|>")
    | {"tools": [f"{HERMES_CALL}<|im_end|>", f"{SUNNY}<|im_end|>"]},
    "google-gemma-2-2b-it": {
        name: spans for name, spans in both("<end_of_turn>").items() if name != "system"
    },
}


@pytest.mark.parametrize("name", SPANS)
def test_mask_covers_the_answers_of_a_published_template(name):
    file = source() / "vendor" / "llama.cpp" / "models" / "templates" / f"{name}.jinja"
    check_masks(file.read_text(encoding="utf-8"), SPANS[name])
