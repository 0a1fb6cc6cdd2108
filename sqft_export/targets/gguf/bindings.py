"""One interface to llama.cpp in this process, for every Python package that has one.

The first installed one is used. ``llama-cpp-python`` is compiled by its users for their processor.
``xllamacpp`` has wheels, built for AVX2, whose functions are visible. Both can run our kernels.
``cyllama`` comes with the extra ``gguf-runtime``. Its wheels are built for AVX2 too, and hide the
functions that our kernels need.
"""

import platform
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from sqft_export.errors import HostError, UserError
from sqft_export.kernels.choice import STOCK
from sqft_export.libraries.xllamacpp import llama_functions
from sqft_export.machine.host import LESS_MEMORY, distribution_of, installed
from sqft_export.packed.loaders import gguf_model, silence_llama_cpp
from sqft_export.targets.offload import OffloadDevice, require_device_memory

if TYPE_CHECKING:
    from cyllama.llama.llama_cpp import LlamaContext

MAX_SEQUENCES = 256  # separate sequences in a cache of llama.cpp
# The same for models with recurrent layers, whose states are allocated for every sequence.
RECURRENT_SEQUENCES = 16
PASS_TOKENS = 512  # tokens per call of llama_decode
_FLOAT32 = 0  # ggml's type number


class Token(NamedTuple):
    """A token of a pass. needs_logits: whether llama.cpp keeps its logits."""

    id: int
    position: int
    sequence: int
    needs_logits: bool


class ContextParameters(Protocol):
    """Parameters of a context, which have the same names in both bindings."""

    n_ctx: int
    n_seq_max: int
    kv_unified: bool
    n_batch: int
    n_ubatch: int
    n_threads: int
    n_threads_batch: int
    type_k: int
    type_v: int
    flash_attn_type: int


class Cache(Protocol):
    """A context of llama.cpp: a key-value cache of fixed size and the logits of the last pass."""

    def clear(self) -> None:
        """Remove all sequences."""

    def copy(self, sequence: int, to: int) -> None:
        """Copy a sequence to another number."""

    def forget(self, sequence: int) -> None:
        """Remove a sequence."""

    def decode(self, tokens: list[Token]) -> int:
        """Run a pass and return the status of ``llama_decode``; 0 is success."""

    def logits(self, index: int) -> np.ndarray:
        """Return the logits of token ``index`` of the last pass, float32 ``[vocabulary]``.

        The next pass may overwrite them.
        """

    def argmax(self, index: int) -> int:
        """Return the argmax of the logits of token ``index`` of the last pass."""

    def close(self) -> None:
        """Free the context."""


class Opened(Protocol):
    """A model that llama.cpp has loaded. vocabulary: logits per token."""

    vocabulary: int

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with special tokens parsed and added."""

    def cache(self, cells: int, threads: int, exact: bool, sequences: int = MAX_SEQUENCES) -> Cache:
        """Return a cache of ``cells`` tokens.

        :param exact: float32 keys and values, and no flash attention.
        :param sequences: largest number of separate sequences.
        """


def open_model(file: Path, gpu: OffloadDevice | None = None) -> Opened:
    """Load a model with the installed binding; only cyllama's off-loads layers.

    :param gpu: device that gets all layers; None: they stay on the CPU.
    :raises UserError: if llama.cpp refuses the file.
    :raises HostError: if the weights are larger than the free memory of the device.
    """
    functions = _c_functions()
    if gpu is None and functions is not None:
        return LlamaCppModel(file, functions)
    return CyllamaModel(file, gpu)


def _c_functions() -> ModuleType | SimpleNamespace | None:
    """Return an object with llama.cpp's functions; None if only cyllama is installed."""
    if not installed("llama_cpp"):
        return llama_functions()
    import llama_cpp

    return llama_cpp


def binding_module() -> str:
    """Return the module that :func:`open_model` uses."""
    if installed("llama_cpp"):
        return "llama_cpp"
    return "cyllama" if llama_functions() is None else "xllamacpp"


# Words of llama.cpp's description of a build, fastest instruction set first.
_INSTRUCTION_SETS = ("AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2", "AVX", "DOTPROD", "NEON")


def describe_build(execution: str) -> str:
    """Return the package that llama.cpp runs from, and the instruction set that it is built for.

    :param execution: stock, or which of our kernels multiply.
    """
    found, functions = distribution_of(binding_module()), _c_functions()
    if functions is None:
        build = "AVX2" if platform.machine() in ("x86_64", "AMD64") else ""
    else:
        features = functions.llama_print_system_info().decode()
        build = next((name for name in _INSTRUCTION_SETS if f" {name} = 1" in features), "")
    text = f"llama.cpp of {found.name} {found.version}"
    if build:
        text += f", an {build} build"
    return text if execution == STOCK else f"{text}, with our kernels ({execution})"


class CyllamaModel:
    """A model loaded by ``cyllama``."""

    def __init__(self, file: Path, gpu: OffloadDevice | None = None):
        if gpu is not None:
            require_device_memory(file, file.stat().st_size, gpu)
        self.model = gguf_model(file, None if gpu is None else gpu.number)
        self.vocabulary, self.gpu = self.model.n_vocab, gpu

    def tokenize(self, text: str) -> list[int]:
        return list(self.model.get_vocab().tokenize(text, True, True))

    def cache(
        self, cells: int, threads: int, exact: bool, sequences: int = MAX_SEQUENCES
    ) -> "Cache":
        from cyllama.llama import llama_cpp

        params = llama_cpp.LlamaContextParams()
        _set_parameters(params, cells, threads, exact, sequences)
        # Else a build with a GPU backend computes long prompts there, wherever the layers are.
        params.offload_kqv = params.op_offload = self.gpu is not None
        try:
            context = llama_cpp.LlamaContext(model=self.model, params=params)
        except (ValueError, RuntimeError) as error:
            raise _no_cache(cells, self.gpu) from error
        return _CyllamaCache(context, self.vocabulary)


def _no_cache(cells: int, gpu: OffloadDevice | None) -> UserError:
    """Return the error of a context that llama.cpp refused; a GPU has too little memory."""
    refused = f"llama.cpp can't make a cache of {cells} tokens"
    if gpu is None:
        return UserError(refused)
    return HostError(f"{gpu.name} ({gpu.description}): {refused}: out of memory; {LESS_MEMORY}")


def _set_parameters(
    params: ContextParameters, cells: int, threads: int, exact: bool, sequences: int
) -> None:
    """Set size, threads and precision of a context."""
    # Newer versions abort the process if the cache is smaller than the number of sequences.
    params.n_ctx = max(cells, sequences)
    params.n_seq_max, params.kv_unified = sequences, True
    params.n_batch = params.n_ubatch = PASS_TOKENS
    # The default is four threads, which busy-wait if there are fewer processors.
    params.n_threads = params.n_threads_batch = threads
    if exact:
        params.type_k = params.type_v = _FLOAT32
        params.flash_attn_type = 0


class _CyllamaCache:
    def __init__(self, context: "LlamaContext", vocabulary: int):
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
            batch.add(token.id, token.position, [token.sequence], token.needs_logits)
        return self.context.decode(batch)

    def logits(self, index: int) -> np.ndarray:
        # cyllama returns a list and no pointer; the list is converted once.
        return np.fromiter(self.context.get_logits_ith(index), np.float32, self.vocabulary)

    def argmax(self, index: int) -> int:
        # Converting the logits to a list takes longer than computing them.
        return self.sampler.sample(self.context, index)

    def close(self) -> None:
        self.context.close()


class LlamaCppModel:
    """A model loaded by llama.cpp's C functions.

    functions: the module ``llama_cpp``, or an object with the same functions.
    """

    def __init__(self, file: Path, functions: ModuleType | SimpleNamespace):
        self.functions = functions
        silence_llama_cpp(functions)
        functions.llama_backend_init()
        params = functions.llama_model_default_params()
        params.n_gpu_layers = 0
        params.no_host = True  # a GPU's pinned memory would go before our kernels
        self.model = functions.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise UserError(f"{file}: llama.cpp can't load it")
        self.vocab = functions.llama_model_get_vocab(self.model)
        self.vocabulary = functions.llama_vocab_n_tokens(self.vocab)

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.functions.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        encoded = text.encode()
        room = len(encoded) + 8
        found = (self.functions.llama_token * room)()
        size = len(encoded)
        count = self.functions.llama_tokenize(self.vocab, encoded, size, found, room, True, True)
        return list(found[:count])

    def cache(
        self, cells: int, threads: int, exact: bool, sequences: int = MAX_SEQUENCES
    ) -> "Cache":
        params = self.functions.llama_context_default_params()
        _set_parameters(params, cells, threads, exact, sequences)
        context = self.functions.llama_init_from_model(self.model, params)
        if not context:
            raise _no_cache(cells, None)
        return _LlamaCppCache(self, context)


class _LlamaCppCache:
    def __init__(self, model: LlamaCppModel, context: int | None):
        self.model, self.context, self.functions = model, context, model.functions
        self.memory = self.functions.llama_get_memory(context)

    def __del__(self) -> None:
        self.close()

    def clear(self) -> None:
        self.functions.llama_memory_clear(self.memory, False)

    def copy(self, sequence: int, to: int) -> None:
        self.functions.llama_memory_seq_cp(self.memory, sequence, to, -1, -1)

    def forget(self, sequence: int) -> None:
        self.functions.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def decode(self, tokens: list[Token]) -> int:
        batch = self.functions.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token.id, token.position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, token.sequence
                batch.logits[index] = token.needs_logits
            return self.functions.llama_decode(self.context, batch)
        finally:
            self.functions.llama_batch_free(batch)

    def logits(self, index: int) -> np.ndarray:
        found = self.functions.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(found, (self.model.vocabulary,))

    def argmax(self, index: int) -> int:
        return int(self.logits(index).argmax())

    def close(self) -> None:
        if self.context:
            self.functions.llama_free(self.context)
            self.context = None
