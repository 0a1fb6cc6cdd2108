"""How a model is asked, for its card: the exact prompt format, where answers end, an example."""

import json
from itertools import islice
from typing import Any

from sqft_export.data.datasets import TEMPLATES
from sqft_export.data.items import deployed_text, train_records
from sqft_export.data.stops import stop_texts
from sqft_export.recipe.schema import Problems, Recipe, Text

# Lines that answer one prompt, in the runtime's own text interface; greedy, as it was scored.
ASK = {
    "openvino": (
        "config = pipe.get_generation_config()",
        "config.max_new_tokens, config.do_sample = {new_tokens}, False",
        "config.stop_strings = {stop_set}",
        "print(pipe.generate(prompt, config))",
    ),
    "onnx": (
        "tokenizer = onnxruntime_genai.Tokenizer(model)",
        'tokenizer.update_options(add_special_tokens="true")  # the start token',
        "ids = tokenizer.encode(prompt)",
        "params = onnxruntime_genai.GeneratorParams(model)",
        "params.set_search_options(max_length=len(ids) + {new_tokens}, do_sample=False)",
        "generator = onnxruntime_genai.Generator(model, params)",
        "generator.append_tokens(ids)",
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)[len(ids):]))",
    ),
    "gguf": (
        "from cyllama.api import GenerationConfig",
        "config = GenerationConfig(temperature=0.0, max_tokens={new_tokens})",
        "config.stop_sequences = {stop_list}",
        "print(llm(prompt, config))",
    ),
    "torch": (
        "from transformers import AutoTokenizer",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'ids = tokenizer(prompt, return_tensors="pt").input_ids',
        "said = model.generate(ids, max_new_tokens={new_tokens}, do_sample=False)",
        "print(tokenizer.decode(said[0, ids.shape[1]:], skip_special_tokens=True))",
    ),
}


def prompt_section(recipe: Recipe, runtime: str, tokenizer: Any) -> str:
    """The part of a model card on prompts, in Markdown.

    :param tokenizer: of the base; a start token that it adds by itself is no part of a prompt.
    :param runtime: openvino, onnx, gguf, or torch for a Hugging Face folder.
    """
    task = recipe.task
    if isinstance(task, Text):
        return (
            "\nHow to ask it: give it text as it is; it was trained to continue plain text, with "
            "no template.\n"
        )
    example = next(islice(train_records(recipe), 1))
    template = task.prompt if isinstance(task, Problems) else TEMPLATES[task.template]
    prompt = deployed_text(tokenizer, example.prompt)
    if prompt != example.prompt:
        template = template.removeprefix(tokenizer.bos_token)
    stops = list(stop_texts(task))
    ask = "\n".join(ASK[runtime]).format(
        new_tokens=task.max_new_tokens,
        stop_set=f"{{{json.dumps(stops)[1:-1]}}}" if stops else "set()",
        stop_list=json.dumps(stops),
    )
    lines = [
        *("", "How to ask it: the prompt is plain text in exactly this format, without a chat"),
        *("template; the tokenizer adds a start token where it has one.", ""),
        *("| | |", "| --- | --- |"),
        f"| prompt | {_cell(template)} |",
        f"| an answer ends at | {', '.join(['the end token', *map(_cell, stops)])} |",
        f"| a prompt | {_cell(prompt)} |",
        f"| its answer | {_cell(example.answer)} |",
        *("", f"    prompt = {json.dumps(prompt)}"),
        *(f"    {line}" for line in ask.split("\n")),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text as a JSON string in a cell of a table: line ends and blanks can be seen."""
    return f"`{json.dumps(text, ensure_ascii=False)}`".replace("|", "\\|")
