"""A small chat model, a chat recipe and conversations, for tests of several packages."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from conftest import random_model

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = """
name: chats
model: {path: model}
task: {kind: chat, train: chats.jsonl, max_new_tokens: 4, sequence_length: 128}
calibration: {samples: 4, sequence_length: 64}
sparsify: {method: wanda, sparsity: 0.5}
quantize: {method: gptq, bits: 4, group_size: 32}
adapt:
  pipeline: qa-sparsepeft
  target_modules: [q_proj, v_proj]
  elastic_groups: [[q_proj, v_proj]]
  ranks: [8, 4]
  alpha: 8
  dropout: 0.0
  warmup_steps: 0
  steps: 2
  batch: 2
export: {targets: [openvino, onnx, gguf]}
verify: {prompts: 2, new_tokens: 4}
benchmark: {items: 2, repeats: 2, rounds: 1, prompt_tokens: 8, new_tokens: 4, baselines: [dense]}
"""


def chat(number: int) -> dict:
    return {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": f"How many apples are {number} apples?"},
            {"role": "assistant", "content": f"It is {number}."},
            {"role": "user", "content": "Again, please."},
            {"role": "assistant", "content": f"Again {number}."},
        ]
    }


def write_chats(file: Path, chats: list[dict]) -> None:
    file.write_text("".join(json.dumps(one) + "\n" for one in chats))


def write_chat_model(model: Path, scratch: Path, **config) -> Path:
    """Write a random model with a ChatML template; its configs name only another end token.

    scratch: folder for files that are not needed later.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 192} | config
    random_model(model, **(sizes | {"vocab_size": 520}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    random_model(scratch, **(sizes | {"vocab_size": len(tokenizer)}))
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (scratch / name).replace(model / name)
    return model


def write_chat_folder(folder: Path) -> Path:
    """Write a recipe, its model, and 30 conversations: 27 to train on, and 3 to test with.

    The last one, a test conversation, is the first training conversation again.
    """
    write_chat_model(folder / "model", folder / "sized")
    write_chats(folder / "chats.jsonl", [chat(n % 29) for n in range(30)])
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder
