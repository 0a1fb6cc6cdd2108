"""Pretrain the embedded model from random weights and write it to the folder of this script.

    python -m sqft_export.builtin.tiny.pretrain --out <folder>

The model has the Mistral architecture: 4 layers, hidden size 256, 8 heads and 2 key-value heads.
The tokenizer is a byte-level BPE with single digits. Half of the text is word problems with worked
answers (``problems.py``), the other half bare arithmetic. The first phase has easy problems, the
second those of the task. ``--start <folder>`` starts with the second phase.

The folder also gets ``train.jsonl`` and ``test.jsonl`` (the task), and ``card.json`` (the settings,
and the exact match on the test problems).
"""

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from sqft_export.builtin.tiny.problems import drill, problems

TEMPLATE = "Question: {question}\nAnswer: {answer}"
SEED = 20260
TRAIN_ITEMS, TEST_ITEMS, BATCH = 6000, 1000, 96
# The pattern of Qwen2, which every runtime supports.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, trained on easy problems."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (
        TEMPLATE.format(**p)
        for p in itertools.islice(problems(SEED, held_out=False, easy=True), 5000)
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def new_model(vocab_size: int) -> MistralForCausalLM:
    """Return a model with random weights."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=256,
            sliding_window=None,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def texts(seed: int, easy: bool):
    """Yield the pretraining text without end: a worked problem, a drill, a worked problem, ..."""
    rng = random.Random(seed)
    for example in problems(seed, held_out=False, easy=easy):
        yield TEMPLATE.format(**example)
        yield drill(rng, easy)


def batches(tokenizer, stream, size: int):
    """Yield right-padded ``input_ids`` and ``labels`` (padding is -100) without end."""
    while True:
        ids = [
            torch.tensor(tokenizer(t)["input_ids"] + [tokenizer.eos_token_id])
            for t in itertools.islice(stream, size)
        ]
        yield (
            torch.nn.utils.rnn.pad_sequence(ids, True, tokenizer.pad_token_id),
            torch.nn.utils.rnn.pad_sequence(ids, True, -100),
        )


@torch.no_grad()
def exact_match(model, tokenizer, items: list[dict[str, str]]) -> float:
    """Return the share of greedy answers whose number after ``####`` is right."""
    model.eval()
    tokenizer.padding_side = "left"
    prompts = [TEMPLATE.format(question=i["question"], answer="").rstrip() for i in items]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    answers = tokenizer.batch_decode(
        out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = [
        a.split("####")[-1].strip() == i["answer"].split("####")[-1].strip()
        for a, i in zip(answers, items, strict=True)
    ]
    model.train()
    return sum(right) / len(items)


def train(
    model,
    tokenizer,
    seed: int,
    easy: bool,
    steps: int,
    lr: float,
    test: list,
    batch: int = BATCH,
) -> None:
    """Train one phase with AdamW: linear warm-up over 50 steps, linear decay to zero.

    :param test: problems that show the progress every 250 steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.01)
    stream = itertools.islice(batches(tokenizer, texts(seed, easy), batch), steps)
    for step, (input_ids, labels) in enumerate(stream, start=1):
        decay = 1 - (step - 1) / steps
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / 50) * decay
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            match = exact_match(model, tokenizer, test[:200])
            print(f"step {step} loss {loss.item():.4f} exact match {match:.3f}", flush=True)
    model.half().float()  # round to float16, so that the stored model is measured and trained on


def save(model, tokenizer, folder: Path) -> None:
    """Write model (float16) and tokenizer to a folder."""
    tokenizer.backend_tokenizer.no_padding()
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()


def main() -> None:
    """Run the phases that the command line requests and write all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--easy-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--start", type=Path, help="folder of a finished first phase")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()

    started = time.monotonic()
    test = list(itertools.islice(problems(SEED + 1, held_out=True), TEST_ITEMS))
    if arguments.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.start)
        model = MistralForCausalLM.from_pretrained(arguments.start, dtype=torch.float32).train()
    else:
        torch.manual_seed(SEED)
        tokenizer = train_tokenizer()
        model = new_model(len(tokenizer)).train()
        train(model, tokenizer, SEED + 2, True, arguments.easy_steps, 2e-3, test)
        save(model, tokenizer, arguments.out / "first-phase")
    train(model, tokenizer, SEED + 4, False, arguments.steps, 1e-3, test)
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": SEED,
        "easy_steps": arguments.easy_steps,
        "steps": arguments.steps,
        "batch": BATCH,
        "minutes_of_last_phase": round((time.monotonic() - started) / 60, 1),
        "exact_match": exact_match(model, tokenizer, test),
        "test_items": TEST_ITEMS,
    }
    save(model, tokenizer, arguments.out)
    train_items = list(itertools.islice(problems(SEED + 3, held_out=False), TRAIN_ITEMS))
    for name, items in (("train", train_items), ("test", test)):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (arguments.out / f"{name}.jsonl").write_text(lines)
    (arguments.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
