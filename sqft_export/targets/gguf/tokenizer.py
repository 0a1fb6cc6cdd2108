"""A tokenizer of transformers as llama.cpp has them: two kinds of byte pairs.

    gpt2    of bytes: merges in order, and the name of how a text is cut before
    llama   SentencePiece's: a score for every token, the highest is merged first

llama.cpp has its ways of cutting a text as code, each by a name; which one a tokenizer's
expression is stands in ``CUTS``. Merges of SentencePiece's kind are in order of their scores, so a
score is the place of a token's first merge. Anything else is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from sqft_export.data.chat import ChatEncoder
from sqft_export.data.chat_template import ChatTemplate
from sqft_export.errors import UserError, one_line
from sqft_export.model.chat import BASE_TEMPLATE_FILE, PLAIN_TEMPLATE, has_template
from sqft_export.model.tokenizer_json import TokenizerFile, TokenizerStep
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
SPACE = "\u2581"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# An expression that texts are cut by -> llama.cpp's name of it.
CUTS = {
    _SHORT + _WORDS + _REST: "qwen2",
    _SHORT + _WORDS + "{1,3}" + _REST: "llama-bpe",
    " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+": "bloom",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
NEVER = -1e6  # score of what no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """kind: gpt2 or llama. cut: how a text is cut, of gpt2. merges or scores: by kind."""

    kind: str
    cut: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_before: bool


class NotExpressible(Exception):
    """A part of a tokenizer that GGUF cannot express."""


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read a tokenizer in llama.cpp's form, without tokens that have no row in the embedding.

    :param rows: number of rows of the embedding; rows without a token are marked as unused.
    :raises NotExpressible: naming the part that llama.cpp does not support.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise NotExpressible("it has no tokenizer.json")
    found = read_json(file, MAX_JSON_BYTES)
    if fault := _fault_of_document(found):
        raise UserError(f"{file}: {fault}")
    document = cast(TokenizerFile, found)
    model = document["model"]
    if model["type"] != "BPE":
        raise NotExpressible(f"its model is {model['type']}; only BPE is supported")
    tokens = {**model["vocab"], **{t["content"]: t["id"] for t in document["added_tokens"]}}
    by_id = {number: token for token, number in tokens.items() if number < rows}
    document["added_tokens"] = [t for t in document["added_tokens"] if t["id"] < rows]
    pieces = bool(model.get("byte_fallback"))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    beyond = {token for token, number in tokens.items() if number >= rows}
    merges = [m for m in merges if not beyond or m.replace(" ", "") not in beyond]
    types = _types(document, by_id, rows, pieces)
    names = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    if pieces:
        _check_pieces(document)
        scores = _scores(merges)
        by_row = [scores.get(name, NEVER) if kind == _NORMAL else 0.0
                  for name, kind in zip(names, types, strict=True)]  # fmt: skip
        return Vocabulary("llama", "default", names, types, [], by_row, _prepends(document))
    return Vocabulary("gpt2", _cut(document), names, types, merges, [], False)


def _fault_of_document(document: Mapping[str, object]) -> str | None:
    """Return the first part of ``tokenizer.json`` that has a wrong type or value, or None."""
    model, added = document.get("model"), document.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(model.get("type"), str):
        return "model: expected its type and vocabulary"
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return "added_tokens: expected a list of objects"
    if model["type"] != "BPE":
        return None
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        return "model: expected vocab, an object, and merges, a list"
    tokens = [("model.vocab", name, number) for name, number in vocabulary.items()]
    tokens += [("added_tokens", token.get("content"), token.get("id")) for token in added]
    for where, name, number in tokens:
        if not isinstance(name, str) or type(number) is not int or not 0 <= number < 2**31:
            found = one_line(f"{name!r}: {number!r}", 80)
            return f"{where}: found {found}; a token and its id are expected"
    for number, merge in enumerate(merges):
        if not _is_merge(merge):
            found = one_line(repr(merge), 80)
            return f"model.merges: {number}: found {found}; two tokens are expected"
    if not tokens:
        return "model.vocab: has no tokens"
    return _fault_of_steps(document)


def _is_merge(merge: object) -> bool:
    pair = isinstance(merge, list) and len(merge) == 2 and all(isinstance(m, str) for m in merge)
    return isinstance(merge, str) or pair


def _has_type(step: object) -> bool:
    return isinstance(step, dict) and isinstance(step.get("type"), str)


def _fault_of_steps(document: Mapping[str, object]) -> str | None:
    """Return the fault of a normalizer or pre-tokenizer, or None; each step needs a type."""
    for section, name in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        found = document.get(section)
        steps: object = [] if found is None else [found]
        if isinstance(found, dict) and found.get("type") == "Sequence":
            steps = found.get(name)
        if not isinstance(steps, list) or not all(map(_has_type, steps)):
            return f"{section}: expected steps, each with a type"
        if any(not isinstance(step.get("pattern", {}), dict) for step in steps):
            return f"{section}: pattern: expected an object"
    return None


def _types(document: TokenizerFile, by_id: dict[int, str], rows: int, pieces: bool) -> list[int]:
    types = [_NORMAL if number in by_id else _UNUSED for number in range(rows)]
    for token in document["added_tokens"]:
        types[token["id"]] = _CONTROL if token.get("special") else _USER_DEFINED
    if pieces:
        for number, name in by_id.items():
            if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
                types[number] = _BYTE
        unknown = document["model"].get("unk_token")
        for number, name in by_id.items():
            if name == unknown:
                types[number] = _UNKNOWN
    return types


def _parts(
    section: TokenizerStep | None, name: Literal["normalizers", "pretokenizers"]
) -> list[TokenizerStep]:
    """Return the steps of a normalizer or pre-tokenizer, in order."""
    if section is None:
        return []
    return section[name] if section["type"] == "Sequence" else [section]


def _cut(document: TokenizerFile) -> str:
    if normalizer := _parts(document.get("normalizer"), "normalizers"):
        others = [n["type"] for n in normalizer if n["type"] != "NFC"]
        if others:
            raise NotExpressible(f"its normalizer is {', '.join(others)}")
    steps = _parts(document.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise NotExpressible("its pre_tokenizer puts a space before a text (add_prefix_space)")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        expression = str(steps[0].get("pattern", {}).get("Regex", ""))
        if expression in CUTS and steps[0].get("behavior") in ("Isolated", "Removed"):
            return CUTS[expression]
        shown = one_line(repr(expression))
        raise NotExpressible(f"texts are cut by {shown}, which llama.cpp has no name for")
    raise NotExpressible(f"its pre_tokenizer is {', '.join(kinds) or 'none'}")


def _check_pieces(document: TokenizerFile) -> None:
    """Check that the tokenizer changes texts as SentencePiece does: it only replaces spaces.

    :raises NotExpressible: naming a step that does more.
    """
    steps = _parts(document.get("normalizer"), "normalizers")
    for step in steps:
        blank = step["type"] == "Replace" and step.get("content") == SPACE
        if not blank and not (step["type"] == "Prepend" and step.get("prepend") == SPACE):
            raise NotExpressible(f"its normalizer is {step['type']}")
    for step in _parts(document.get("pre_tokenizer"), "pretokenizers"):
        blanks = step["type"] == "Split" and step.get("pattern") == {"String": " "}
        if step["type"] != "Metaspace" and not blanks:
            raise NotExpressible(f"its pre_tokenizer is {step['type']}")


def _prepends(document: TokenizerFile) -> bool:
    """Return whether the tokenizer puts a space before every text."""
    steps = _parts(document.get("normalizer"), "normalizers")
    if any(step["type"] == "Prepend" for step in steps):
        return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _parts(document.get("pre_tokenizer"), "pretokenizers")
    )


def _scores(merges: list[str]) -> dict[str, float]:
    """Return token -> minus the rank of the first merge that produces it."""
    found: dict[str, float] = {}
    for place, merge in enumerate(merges):
        found.setdefault(merge.replace(" ", ""), -float(place))
    return found


def write_tokenizer(writer: "GGUFWriter", folder: Path, rows: int) -> None:
    """Write the tokenizer of a Hugging Face folder.

    :raises NotExpressible: naming the part that llama.cpp does not support.
    """
    from transformers import AutoTokenizer

    found = read_vocabulary(folder, rows)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    writer.add_tokenizer_model(found.kind)
    writer.add_tokenizer_pre(found.cut)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.kind == "gpt2":
        writer.add_token_merges(found.merges)
    else:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_before)
    _write_special_tokens(writer, tokenizer, rows)
    _write_template(writer, folder, tokenizer, rows)


def _write_special_tokens(
    writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", rows: int
) -> None:
    """Write special ids, and whether the tokenizer adds a start or an end token to a text."""
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for name, number in special.items():
        if number is not None and number < rows:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == special["bos"])
    writer.add_add_eos_token(bool(ids) and ids[-1] == special["eos"])


def _write_template(
    writer: "GGUFWriter", folder: Path, tokenizer: "PreTrainedTokenizerBase", rows: int
) -> None:
    """Write the chat templates and their end-of-turn token.

    If the model keeps the base's template in another file, the plain template is written.
    """
    if has_template(folder):
        end = ChatEncoder(ChatTemplate(tokenizer)).end_token()
        if end is not None and end != tokenizer.eos_token_id and end < rows:
            writer.add_eot_token_id(end)
    if (folder / BASE_TEMPLATE_FILE).is_file():
        writer.add_chat_template(PLAIN_TEMPLATE)
    elif isinstance(templates := tokenizer.chat_template, dict):
        named = [{"name": name, "template": text} for name, text in templates.items()]
        writer.add_chat_template(named)
    elif templates:
        writer.add_chat_template(templates)
