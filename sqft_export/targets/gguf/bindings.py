"""llama.cpp in this process, by whichever binding is installed: what a session asks of it.

``cyllama`` has wheels and comes with the extra ``gguf-runtime``; ``llama-cpp-python`` is compiled
by those who have it, and is taken where it is alone.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from sqft_export.errors import UserError
from sqft_export.packed.loaders import gguf_model, silence_llama_cpp
from sqft_export.run.host import installed

SEQUENCES = 256  # that llama.cpp keeps apart
PASS = 512  # tokens that go through it at once
_FLOAT32 = 0  # ggml's number of the type


class Token(NamedTuple):
    """One of a pass. asked: whether its logits are."""

    id: int
    position: int
    sequence: int
    asked: bool


class Cache(Protocol):
    """A context of llama.cpp: a cache of so many tokens, and the pass that fills it."""

    def clear(self) -> None: ...

    def copy(self, sequence: int, to: int) -> None: ...

    def forget(self, sequence: int) -> None: ...

    def decode(self, tokens: list[Token]) -> int:
        """What ``llama_decode`` returns: 0 where all is well."""

    def logits(self, index: int) -> np.ndarray:
        """After the token at a place of the last pass, float32 ``[vocabulary]``; the next pass may
        overwrite it."""

    def likeliest(self, index: int) -> int: ...

    def close(self) -> None: ...


class Opened(Protocol):
    vocabulary: int

    def tokenize(self, text: str) -> list[int]: ...

    def cache(self, cells: int, threads: int, exact: bool) -> Cache:
        """:param exact: keys and values in float32, attention in several steps."""


def open_model(file: Path) -> Opened:
    """:raises UserError: if llama.cpp refuses the file."""
    return CyllamaModel(file) if installed("cyllama") else LlamaCppModel(file)


class CyllamaModel:
    def __init__(self, file: Path):
        self.model = gguf_model(file)
        self.vocabulary = self.model.n_vocab

    def tokenize(self, text: str) -> list[int]:
        return list(self.model.get_vocab().tokenize(text, True, True))

    def cache(self, cells: int, threads: int, exact: bool) -> "Cache":
        from cyllama.llama import llama_cpp

        params = llama_cpp.LlamaContextParams()
        _set(params, cells, threads, exact)
        context = llama_cpp.LlamaContext(model=self.model, params=params)
        return _CyllamaCache(context, self.vocabulary)


def _set(params: Any, cells: int, threads: int, exact: bool) -> None:
    """What both bindings call alike."""
    params.n_ctx, params.n_seq_max, params.kv_unified = cells, SEQUENCES, True
    params.n_batch = params.n_ubatch = PASS
    # Its own choice is four, which wait in a spin where there are fewer processors.
    params.n_threads = params.n_threads_batch = threads
    if exact:
        params.type_k = params.type_v = _FLOAT32
        params.flash_attn_type = 0


class _CyllamaCache:
    def __init__(self, context: Any, vocabulary: int):
        from cyllama.llama import llama_cpp

        self.context, self.vocabulary = context, vocabulary
        self.sampler = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
        self.sampler.add_greedy()

    def clear(self) -> None:
        self.context.kv_cache_clear(False)

    def copy(self, sequence: int, to: int) -> None:
        self.context.memory_seq_cp(sequence, to, -1, -1)

    def forget(self, sequence: int) -> None:
        self.context.memory_seq_rm(sequence, -1, -1)

    def decode(self, tokens: list[Token]) -> int:
        from cyllama.llama import llama_cpp

        batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for token in tokens:
            batch.add(token.id, token.position, [token.sequence], token.asked)
        return self.context.decode(batch)

    def logits(self, index: int) -> np.ndarray:
        # cyllama has no pointer to them: it makes a list, which is read in one pass.
        return np.fromiter(self.context.get_logits_ith(index), np.float32, self.vocabulary)

    def likeliest(self, index: int) -> int:
        # Taking logits out of it as a list costs more than they do.
        return self.sampler.sample(self.context, index)

    def close(self) -> None:
        self.context.close()


class LlamaCppModel:
    """llama-cpp-python's bindings of the C interface."""

    def __init__(self, file: Path):
        import llama_cpp

        silence_llama_cpp()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise UserError(f"{file}: llama.cpp can't load it")
        self.words = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(self.words)

    def __del__(self) -> None:
        import llama_cpp

        if getattr(self, "model", None):
            llama_cpp.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        import llama_cpp

        encoded = text.encode()
        room = len(encoded) + 8
        found = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.words, encoded, len(encoded), found, room, True, True)
        return list(found[:count])

    def cache(self, cells: int, threads: int, exact: bool) -> "Cache":
        import llama_cpp

        params = llama_cpp.llama_context_default_params()
        _set(params, cells, threads, exact)
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise UserError(f"llama.cpp can't make a cache of {cells} tokens")
        return _LlamaCppCache(self, context)


class _LlamaCppCache:
    def __init__(self, model: LlamaCppModel, context: Any):
        import llama_cpp

        self.model, self.context = model, context
        self.memory = llama_cpp.llama_get_memory(context)

    def __del__(self) -> None:
        self.close()

    def clear(self) -> None:
        import llama_cpp

        llama_cpp.llama_memory_clear(self.memory, False)

    def copy(self, sequence: int, to: int) -> None:
        import llama_cpp

        llama_cpp.llama_memory_seq_cp(self.memory, sequence, to, -1, -1)

    def forget(self, sequence: int) -> None:
        import llama_cpp

        llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def decode(self, tokens: list[Token]) -> int:
        import llama_cpp

        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token.id, token.position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, token.sequence
                batch.logits[index] = token.asked
            return llama_cpp.llama_decode(self.context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)

    def logits(self, index: int) -> np.ndarray:
        import llama_cpp

        found = llama_cpp.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(found, (self.model.vocabulary,))

    def likeliest(self, index: int) -> int:
        return int(self.logits(index).argmax())

    def close(self) -> None:
        import llama_cpp

        if self.context:
            llama_cpp.llama_free(self.context)
            self.context = None
