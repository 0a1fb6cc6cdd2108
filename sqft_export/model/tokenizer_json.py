"""Types of ``tokenizer.json``: the fields that this package reads."""

from typing import TypedDict


class TokenizerStep(TypedDict, total=False):
    """A step of a normalizer, pre-tokenizer or post-processor; ``Sequence`` has several steps."""

    type: str
    normalizers: list["TokenizerStep"]
    pretokenizers: list["TokenizerStep"]
    processors: list["TokenizerStep"]
    pattern: dict[str, str]
    content: str
    prepend: str
    prepend_scheme: str
    behavior: str
    add_prefix_space: bool
    use_regex: bool
    individual_digits: bool
    single: list[dict[str, object]]


class TokenizerModel(TypedDict, total=False):
    """The model of a tokenizer: vocabulary and merges."""

    type: str
    vocab: dict[str, int]
    merges: list[str | list[str]]
    byte_fallback: bool
    unk_token: str | None


class AddedToken(TypedDict, total=False):
    """A token outside the vocabulary of the model."""

    content: str
    id: int
    special: bool


class TokenizerFile(TypedDict, total=False):
    """The content of ``tokenizer.json``."""

    model: TokenizerModel
    added_tokens: list[AddedToken]
    normalizer: TokenizerStep | None
    pre_tokenizer: TokenizerStep | None
    post_processor: TokenizerStep | None
