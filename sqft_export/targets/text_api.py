"""Runtimes as users ask them: a text or messages go in, and a text comes out, by their defaults.

The lines are those of the model card (``report/prompts.py``): the runtime's own tokenizer, its own
implementation of the chat template if it finds one, and greedy decoding.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.machine.host import installed
from sqft_export.packed.loaders import dense_gguf
from sqft_export.targets.devices import llama_cpp_here
from sqft_export.targets.genai_config import check_genai_config

if TYPE_CHECKING:
    import cyllama.api
    import openvino_genai


@dataclass(frozen=True)
class ChatPrompt:
    """Messages to answer.

    messages: each with ``role`` and ``content``.
    tools: JSON schemas of functions.
    arguments: variables of the chat template.
    ids: token ids by transformers, with the generation prompt.
    """

    messages: list[dict[str, object]]
    tools: list[dict[str, object]] | None
    arguments: dict[str, object]
    ids: list[int]


@dataclass(frozen=True)
class TextApi:
    """A runtime's interface for texts and messages.

    name: name of the runtime.
    answer: text and number of new tokens -> the answer as text.
    answer_ids: the answer to a prompt's ids; None if the interface takes texts only.
    text_of: ids of an answer -> its text, by the runtime's tokenizer.
    chat_ids: messages -> their token ids in the runtime; None if the runtime does not return them.
    chat: messages and number of new tokens -> the answer as text.
    """

    name: str
    answer: Callable[[str, int], str]
    answer_ids: Callable[[list[int], int], str] | None
    text_of: Callable[[list[int]], str]
    chat_ids: Callable[[ChatPrompt], list[int]] | None
    chat: Callable[[ChatPrompt, int], str]


def missing_for_chat(runtime: str, chat: ChatPrompt) -> str | None:
    """Return the part of a prompt that a runtime's chat interface cannot take; None if it can."""
    if chat.arguments and runtime != "openvino":
        return "template arguments"
    return "tools" if chat.tools and runtime == "gguf" else None


@contextmanager
def text_api(runtime: str, folder: Path) -> Iterator[TextApi | None]:
    """Yield the text interface of a deployment; None if its runtime is not installed."""
    if runtime == "openvino" and installed("openvino_genai"):
        yield _openvino_api(folder)
    elif runtime == "onnx" and installed("onnxruntime_genai"):
        yield _onnx_api(folder)
    elif runtime == "gguf" and llama_cpp_here():
        with dense_gguf(folder) as file:
            yield _cyllama_api(file) if installed("cyllama") else _llama_cpp_api(file)
    else:
        yield None


def openvino_chat_ids(tokenizer: "openvino_genai.Tokenizer", chat: ChatPrompt) -> list[int]:
    """Return the token ids of messages, rendered by OpenVINO GenAI's own template engine."""
    text = tokenizer.apply_chat_template(_history_of(chat), add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()


def _history_of(chat: ChatPrompt) -> "openvino_genai.ChatHistory":
    import openvino_genai

    history = openvino_genai.ChatHistory(chat.messages)
    history.set_tools(chat.tools or [])
    history.set_extra_context(chat.arguments)
    return history


def _openvino_api(folder: Path) -> TextApi:
    import numpy as np
    import openvino as ov
    import openvino_genai

    pipe = openvino_genai.LLMPipeline(str(folder), "CPU")
    tokenizer = pipe.get_tokenizer()

    def greedy(new_tokens: int) -> "openvino_genai.GenerationConfig":
        config = pipe.get_generation_config()
        config.max_new_tokens, config.do_sample, config.repetition_penalty = new_tokens, False, 1.0
        return config

    def answer_ids(ids: list[int], new_tokens: int) -> str:
        found = pipe.generate(ov.Tensor(np.array([ids], np.int64)), greedy(new_tokens))
        return tokenizer.decode(found.tokens[0])

    return TextApi(
        "OpenVINO GenAI",
        lambda text, new_tokens: str(pipe.generate(text, greedy(new_tokens))),
        answer_ids,
        lambda ids: tokenizer.decode(ids) if ids else "",
        lambda chat: openvino_chat_ids(tokenizer, chat),
        lambda chat, new_tokens: str(pipe.generate(_history_of(chat), greedy(new_tokens))),
    )


def _onnx_api(folder: Path) -> TextApi:
    import onnxruntime_genai

    check_genai_config(folder)
    model = onnxruntime_genai.Model(str(folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")

    def answer_ids(ids: list[int], new_tokens: int) -> str:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(
            max_length=len(ids) + new_tokens, do_sample=False, repetition_penalty=1.0
        )
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return tokenizer.decode(generator.get_sequence(0)[len(ids) :])

    def chat_ids(chat: ChatPrompt) -> list[int]:
        options = {"tools": json.dumps(chat.tools)} if chat.tools else {}
        text = tokenizer.apply_chat_template(
            json.dumps(chat.messages), add_generation_prompt=True, **options
        )
        tokenizer.update_options(add_special_tokens="false")
        ids = [int(i) for i in tokenizer.encode(text)]
        tokenizer.update_options(add_special_tokens="true")
        return ids

    return TextApi(
        "ONNX Runtime GenAI",
        lambda text, new_tokens: answer_ids([int(i) for i in tokenizer.encode(text)], new_tokens),
        answer_ids,
        lambda ids: tokenizer.decode(ids) if ids else "",
        chat_ids,
        lambda chat, new_tokens: answer_ids(chat_ids(chat), new_tokens),
    )


def _cyllama_api(file: Path) -> TextApi:
    import cyllama
    from cyllama.api import GenerationConfig, apply_chat_template

    def greedy(new_tokens: int, add_bos: bool = True) -> "cyllama.api.GenerationConfig":
        return GenerationConfig(
            temperature=0.0, max_tokens=new_tokens, n_gpu_layers=0, add_bos=add_bos
        )

    llm = cyllama.LLM(str(file), config=greedy(1))

    def chat_ids(chat: ChatPrompt) -> list[int]:
        text = apply_chat_template(chat.messages, str(file), verbose=False)
        return list(llm.vocab.tokenize(text, add_special=False, parse_special=True))

    return TextApi(
        "llama.cpp",
        lambda text, new_tokens: str(llm(text, greedy(new_tokens))),
        None,
        lambda ids: "".join(llm.vocab.token_to_piece(token, 0, True) for token in ids),
        chat_ids,
        lambda chat, new_tokens: str(llm.chat(chat.messages, greedy(new_tokens, False))),
    )


def _llama_cpp_api(file: Path) -> TextApi:
    import llama_cpp

    llm = llama_cpp.Llama(str(file), n_gpu_layers=0, verbose=False)

    def answer(text: str, new_tokens: int) -> str:
        return llm(text, max_tokens=new_tokens, temperature=0.0)["choices"][0]["text"]

    def chat(chat: ChatPrompt, new_tokens: int) -> str:
        found = llm.create_chat_completion(chat.messages, max_tokens=new_tokens, temperature=0.0)
        return found["choices"][0]["message"]["content"]

    return TextApi("llama.cpp", answer, None, lambda ids: llm.detokenize(ids).decode(), None, chat)
