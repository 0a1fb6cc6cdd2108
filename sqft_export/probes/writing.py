"""Make the probe of a merged model with the reference: torch in float32 on the stored codes.

Six short prompts are prompts of the test split. Long ones pass the lengths at which the model
changes, or are close to 4,000 tokens.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sqft_export.data.items import Data, Item, deployed_text, encode, sample_texts
from sqft_export.measure.batches import pad_sequences
from sqft_export.measure.likelihood import log_softmax
from sqft_export.model.architecture import transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import MAX_CACHED_BYTES, Reference
from sqft_export.probes.document import (
    LONG_CACHE_BYTES,
    LONG_TOKENS,
    MAX_PROBE_TOKENS,
    STORED_TOKENS,
    Probe,
    ProbeChat,
    ProbePosition,
    ProbePrompt,
    ProbeText,
    read_probe,
)
from sqft_export.probes.running import LAST_COLUMNS
from sqft_export.probes.texts import equal_engines, read_file_ids
from sqft_export.recipe.schema import Verify
from sqft_export.recipe.sections import TaskSections
from sqft_export.targets import Session
from sqft_export.targets.folder import context_of
from sqft_export.targets.text_api import ChatPrompt
from sqft_export.targets.tokenizers import tokenize_as_deployed
from sqft_export.targets.torch import TorchSession
from sqft_export.verify.lengths import LONGEST_VERIFIED, named_lengths
from sqft_export.verify.text_answers import first_chat

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SHORT_PROMPTS = 6
SHORT_TOKENS = 128  # a longer prompt is cut to its first tokens
SHORT_NEW_TOKENS = 8
LONG_NEW_TOKENS = 4
LARGEST_LONG_SCORES = 2**28  # heads * tokens squared
MAX_CHARACTERS = 4096  # of a stored text; a longer one is left out
DIGITS = 6  # of a stored log-probability


def make_probe(
    recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase", folder: Path, reference: Reference
) -> Probe:
    """Compute the probe of a merged model.

    :param folder: the merged model.
    """
    items = Data(recipe, tokenizer).test
    prompts = list(itertools.islice(_distinct_prompts(items), SHORT_PROMPTS))
    session = TorchSession(reference.model, reference.device.type)
    long = _long_prompts(Checkpoint(folder), folder, prompts, session)
    made = answer_prompts(session, prompts, SHORT_NEW_TOKENS)
    for beyond, ids in long:
        [one] = answer_prompts(session, [ids], LONG_NEW_TOKENS)
        made.append(one.model_copy(update={"beyond": beyond}))
    samples = [text for text in sample_texts(recipe, SHORT_PROMPTS) if len(text) <= MAX_CHARACTERS]
    texts = [deployed_text(tokenizer, text) for text in samples]
    pairs = zip(texts, encode(tokenizer, texts), strict=True)
    found: dict[str, object] = {
        "version": 1,
        "vocabulary": session.vocabulary,
        "divergence": Verify().divergence,
        "prompts": made,
        "texts": [ProbeText(text=text, ids=ids) for text, ids in pairs if ids],
    }
    chat = first_chat(recipe, tokenizer)
    if chat and len(chat.ids) <= MAX_CHARACTERS:
        found["chat"] = _stored_chat(chat)
    return Probe.model_validate(found)


def _stored_chat(chat: ChatPrompt) -> ProbeChat:
    tools = {"tools": chat.tools} if chat.tools else {}
    content = {"messages": chat.messages, "arguments": chat.arguments, "ids": chat.ids}
    return ProbeChat.model_validate(content | tools | {"readers": []})


def _distinct_prompts(items: "list[Item]") -> Iterator[list[int]]:
    """Yield different prompts, cut to ``SHORT_TOKENS``; a quarter of a text window is a prompt."""
    seen = set[tuple[int, ...]]()
    for item in items:
        ids = item.prompt
        if item.text is None:
            ids = ids + item.target[: max(2, len(item.target) // 4)]
        ids = ids[:SHORT_TOKENS]
        if ids and tuple(ids) not in seen:
            seen.add(tuple(ids))
            yield ids


def _long_prompts(
    merged: Checkpoint, folder: Path, prompts: list[list[int]], session: Session
) -> list[tuple[str, list[int]]]:
    """Return the name of the passed length, and the ids, of every long prompt."""
    config = transformers_config(merged.config, merged.where)
    context = context_of(folder) or LONG_TOKENS
    longest = _longest_affordable(context, config, session)
    wanted: dict[int, str] = {}
    for length in named_lengths(config.to_dict()):
        first = length.text_tokens - LONG_NEW_TOKENS if length.last else length.text_tokens
        second = first if length.last else length.tokens * 5 // 4
        for tokens in (first, max(first + 1, second)):
            if tokens <= longest:
                wanted.setdefault(tokens, f"{length.what} {length.tokens}")
    near = min(LONG_TOKENS, longest)
    for tokens in (near, near // 2) if not wanted else (near,):
        if tokens > max(map(len, prompts)):
            wanted.setdefault(tokens, f"{tokens} tokens")
    stream = list(itertools.chain.from_iterable(prompts))
    return [
        (name, _repeat(stream, tokens, number))
        for number, (tokens, name) in enumerate(sorted(wanted.items()))
    ]


def _longest_affordable(context: int, config: "PretrainedConfig", session: Session) -> int:
    """Return the largest number of prompt tokens by context, and by memory of scores and cache."""
    heads = getattr(config, "num_attention_heads", 1)
    width = 2 * 4 * getattr(config, "hidden_size", 1) * getattr(config, "num_hidden_layers", 1)
    share = (getattr(config, "num_key_value_heads", None) or heads) / heads
    cache = int(LONG_CACHE_BYTES / (width * share))
    limits = [
        cache,
        context - LONG_NEW_TOKENS,
        LONGEST_VERIFIED,
        int((LARGEST_LONG_SCORES / heads) ** 0.5),
    ]
    if session.all_logits:
        limits.append(MAX_CACHED_BYTES // (4 * session.vocabulary))
    return min(limits)


def _repeat(stream: list[int], tokens: int, start: int) -> list[int]:
    """Return ``tokens`` ids of a repeated stream, after its first id, from another start."""
    cycle = itertools.cycle(stream[1:] or stream)
    return [stream[0], *itertools.islice(cycle, 7 * start, 7 * start + tokens - 1)]


def answer_prompts(
    session: Session, prompts: list[list[int]], new_tokens: int
) -> list[ProbePrompt]:
    """Return prompts with greedy continuations and stored distributions, computed in one batch."""
    session.reset()
    starts = session.forward(np.array([ids[:1] for ids in prompts], np.int64))[:, -1]
    session.reset()
    batch = pad_sequences(prompts, session.padding)
    columns = min(LAST_COLUMNS, *map(len, prompts))
    logits, mask = session.forward(batch.ids, batch.mask, columns), batch.mask
    positions = [
        [_stored(0, start)] * (len(ids) > columns)
        for ids, start in zip(prompts, starts, strict=True)
    ]
    for ids, stored, rows in zip(prompts, positions, logits, strict=True):
        places = range(len(ids) - columns, len(ids))
        stored += [_stored(place, one) for place, one in zip(places, rows, strict=True)]
    for step in range(1, new_tokens):
        chosen = np.array([[stored[-1].ids[0]] for stored in positions], np.int64)
        mask = np.concatenate([mask, np.ones_like(chosen)], axis=1)
        for ids, stored, [row] in zip(
            prompts, positions, session.forward(chosen, mask, 1), strict=True
        ):
            stored.append(_stored(len(ids) - 1 + step, row))
    return [
        ProbePrompt(
            ids=ids, continuation=[p.ids[0] for p in stored[-new_tokens:]], positions=stored
        )
        for ids, stored in zip(prompts, positions, strict=True)
    ]


def _stored(position: int, logits: np.ndarray) -> ProbePosition:
    """Return the most likely tokens of a position; equal ones by their id."""
    found = log_softmax(logits)
    ids = np.argsort(-found, kind="stable")[:STORED_TOKENS]
    values = [float(f"{min(0.0, value):.{DIGITS}g}") for value in found[ids]]
    return ProbePosition(position=position, ids=ids.tolist(), log_probabilities=values)


def copy_probe(merged: Path, folder: Path, runtime: str, verify: Verify) -> None:
    """Copy the probe of a merged model to a deployment.

    Long prompts that do not fit its context are left out, such as those past the window in a GGUF
    file. Texts that a deployed tokenizer gives other ids are left out: ``plan`` and the certificate
    report these, and the recipe allows them.

    :param merged: artifact of merge.
    """
    model = merged / "model"
    probe = read_probe(merged) or read_probe(model)
    assert probe is not None
    context = context_of(folder) or MAX_PROBE_TOKENS
    changed: dict[str, object] = {
        "divergence": verify.divergence,
        "prompts": [p for p in probe.prompts if len(p.ids) + len(p.continuation) <= context],
        "texts": _same_texts(probe, model, folder, runtime, verify.tokenizers == "required"),
    }
    if probe.chat:
        readers = {"readers": equal_engines(probe.chat, runtime, folder)}
        changed["chat"] = probe.chat.model_copy(update=readers)
    probe.model_copy(update=changed).write(folder)


def _same_texts(
    probe: Probe, model: Path, folder: Path, runtime: str, required: bool
) -> list[ProbeText]:
    """Return the texts that every deployed tokenizer gives the ids of training.

    :param required: the runtimes' own tokenizers must give these ids; do not look.
    """
    texts = [one.text for one in probe.texts]
    found = list(_ids_of_file(folder, texts))
    if texts and not required:
        found += tokenize_as_deployed(runtime, model, texts, probe.vocabulary).values()
    return [
        one
        for number, one in enumerate(probe.texts)
        if all(ids[number] == one.ids for ids in found)
    ]


def _ids_of_file(folder: Path, texts: Sequence[str]) -> Iterator[list[list[int] | None]]:
    """Yield the ids of texts by the deployment's ``tokenizer.json``, if it has one."""
    for _, ids_of in read_file_ids(folder):
        yield [ids_of(text) for text in texts]
