"""Ids and loss masks of marked templates against TRL's SFTTrainer."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
from chat_cases import CONVERSATIONS, FIRST, SECOND, SYSTEM, as_blocks, encoder_of, tokenizer_with

from sqft_export.data.chat import Conversation
from sqft_export.data.chat_template import GENERATION_MARKER
from sqft_export.errors import UserError

# TRL is imported by the tests that compare: its import takes seconds in every worker.
[TRL] = find_spec("trl").submodule_search_locations
TEMPLATES = {
    file.stem: text
    for file in sorted((Path(TRL) / "chat_templates").glob("*.jinja"))
    if GENERATION_MARKER.search(text := file.read_text(encoding="utf-8"))
}
FAMILIES = ("cohere", "deepseek", "gemma", "glm4", "gptoss", "llama3", "phi3", "qwen3", "lfm2")
WITH_BLOCKS = {"idefics3_training", "llava_next_training", "smolvlm_training"}


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return LlamaForCausalLM(config)


def trained_by_trl(model, folder: Path, template: str, rows: list[dict]) -> list[tuple]:
    """Ids and mask of every row as SFTTrainer prepares them, untruncated and unpacked.

    The rows are streamed: in an Arrow table each message gets the fields of all, as nulls.
    """
    from trl import SFTConfig, SFTTrainer

    options = SFTConfig(
        output_dir=str(folder),
        assistant_only_loss=True,
        max_length=None,
        packing=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_steps=1,
    )
    trainer = SFTTrainer(
        model=model,
        args=options,
        train_dataset=datasets.IterableDataset.from_generator(lambda: iter(rows)),
        processing_class=tokenizer_with(template),
    )
    return [
        (row["input_ids"], [label != -100 for label in row["labels"]])
        for row in trainer.train_dataset
    ]


def conversations_for(name: str) -> list[Conversation]:
    plain = [one for key, one in CONVERSATIONS.items() if key != "tools"]
    if name in WITH_BLOCKS:
        return [replace(one, messages=as_blocks(one.messages)) for one in plain]
    return plain


def test_trl_ships_the_marked_templates_of_many_families():
    assert len(TEMPLATES) >= 34
    assert all(any(name.startswith(family) for name in TEMPLATES) for family in FAMILIES)


def cases(names: list[str]) -> list:
    """The first template of every family; the others are for `make test-slow`."""
    first = {next((n for n in names if n.startswith(family)), "") for family in FAMILIES}
    first |= WITH_BLOCKS
    return [n if n in first else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", cases(list(TEMPLATES)))
def test_ids_and_mask_equal_trl(name, model, tmp_path):
    encoder = encoder_of(TEMPLATES[name])
    ours = {}
    for conversation in conversations_for(name):
        try:
            encoded = encoder.encode(conversation)
        except UserError as error:
            assert "system" in str(error).lower(), error  # Gemma 1 and 2 refuse system messages
            continue
        ours[len(ours)] = (conversation, encoded)
    rows = [{"messages": conversation.messages} for conversation, _ in ours.values()]
    theirs = trained_by_trl(model, tmp_path, TEMPLATES[name], rows)
    assert len(ours) >= 2
    for (conversation, encoded), (ids, mask) in zip(ours.values(), theirs, strict=True):
        assert encoded.ids == ids, conversation
        assert encoded.loss == mask, conversation
        assert any(mask) and not all(mask)


# Renders calls but no tools, in TRL's words.
WITHOUT_TOOLS = {"deepseek_r1_distill_training"}
TOOL_TEMPLATES = [n for n, text in TEMPLATES.items() if "tool_calls" in text]
TOOL_TEMPLATES = [name for name in TOOL_TEMPLATES if name not in WITHOUT_TOOLS]


def test_every_template_with_tools_is_compared():
    from trl.chat_template_utils import supports_tool_calling

    found = [n for n, text in TEMPLATES.items() if supports_tool_calling(tokenizer_with(text))]
    assert found == TOOL_TEMPLATES and len(found) >= 18


@pytest.mark.parametrize("name", cases(TOOL_TEMPLATES))
def test_tool_calls_equal_trl(name, model, tmp_path):
    conversation = CONVERSATIONS["tools"]
    encoded = encoder_of(TEMPLATES[name]).encode(conversation)
    row = {"messages": conversation.messages, "tools": json.dumps(conversation.tools)}
    [(ids, mask)] = trained_by_trl(model, tmp_path, TEMPLATES[name], [row])
    assert (encoded.ids, encoded.loss) == (ids, mask)


def test_prompt_and_completion_equal_trl(model, tmp_path):
    """Only the completion is in the loss, though the prompt has an answer, too."""
    for name in ("qwen2_5_training", "llama3_training", "deepseekv3_training", "phi3_training"):
        given, answers = [SYSTEM, *FIRST, SECOND[0]], [SECOND[1]]
        encoded = encoder_of(TEMPLATES[name]).encode(
            Conversation([*given, *answers], prompt=len(given))
        )
        row = {"prompt": given, "completion": answers}
        [(ids, mask)] = trained_by_trl(model, tmp_path, TEMPLATES[name], [row])
        assert (encoded.ids, encoded.loss) == (ids, mask), name
        assert "Hello" not in encoder_of(TEMPLATES[name]).template.tokenizer.decode(
            [one for one, trained in zip(encoded.ids, encoded.loss, strict=True) if trained]
        )
