"""Conversations and a tokenizer for the tests of chat data."""

import re
from functools import cache
from pathlib import Path

import sqft_export.builtin
from sqft_export.data.chat import ChatEncoder, Conversation, EncodedChat
from sqft_export.data.chat_template import ChatTemplate

TINY = Path(sqft_export.builtin.__file__).parent / "tiny"
# Special tokens of the templates, in addition to bos and eos.
CONTROL = re.compile(
    r"<\|[^<>|\s'\"]+\|>|<\uff5c[^<>\s]+\uff5c>|<\|?(?:turn|channel|tool_call|tool_response)\|?>"
    r"|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn|end_of_utterance)>"
    r"|\[/?[A-Z_]+\]|\[\|[a-z]+\|\]"
)
SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello you"}
SECOND = {"role": "user", "content": "Bye now"}, {"role": "assistant", "content": "So long"}
CALL = {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}
TOOL_TURNS = [
    {"role": "user", "content": "Weather in Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}],
    },
    {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of some days.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where"},
                    "days": {"type": "integer", "description": "How many"},
                },
                "required": ["city"],
            },
        },
    }
]
CONVERSATIONS = {
    "single": Conversation([*FIRST]),
    "turns": Conversation([*FIRST, *SECOND]),
    "system": Conversation([SYSTEM, *FIRST, *SECOND]),
    "tools": Conversation(TOOL_TURNS, TOOLS),
}


@cache
def _vocabulary(template: str) -> tuple[str, ...]:
    return tuple(sorted({*CONTROL.findall(template), "<think>", "</think>"}))


def tokenizer_with(template: str):
    """The embedded tokenizer with a template, and the template's control tokens as tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY, model_max_length=100_000)
    tokenizer.add_tokens(list(_vocabulary(template)), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def encoder_of(template: str, **options) -> ChatEncoder:
    return ChatEncoder(ChatTemplate(tokenizer_with(template), **options))


def loss_spans(encoded: EncodedChat) -> list[str]:
    """The texts of consecutive tokens in the loss."""
    spans: list[list[int]] = []
    previous = False
    for (start, end), trained in zip(encoded.offsets, encoded.loss, strict=True):
        if trained and previous:
            spans[-1][1] = end
        elif trained:
            spans.append([start, end])
        previous = trained
    return [encoded.text[start:end] for start, end in spans]


def as_blocks(messages: list[dict]) -> list[dict]:
    """Messages with lists of text blocks, as templates of vision models take them."""
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
