"""Run GGUF files in llama-cpp-python, with or without the plug-in; write logits to a file.

llama_run.py '{"models": ["model.gguf"], "plugin": true, "out": "logits.npz"}'
"""

import ctypes
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Job:
    """models: loaded one after the other, and used at the same time.

    again: free all models and load them once more before they are used.
    forced: continue with fixed tokens, not with greedy ones.
    batch: tokens per pass. kv: ggml's type of keys and values; None: float16.
    load_mode: number of llama.cpp's: 0: read the file; 1: map it; 3: map it and lock it in memory.
    lora: file of an adapter that is applied to the first model.
    shift: tokens after the fourth that are removed from the cache after the prompt.
    """

    models: list[str]
    out: str
    plugin: bool = True
    threads: int = 2
    batch: int = 512
    load_mode: int = 1
    lora: str | None = None
    shift: int = 0
    kv: int | None = None
    again: bool = False
    forced: bool = False
    prompt: int = 24
    new_tokens: int = 8


def load(job: Job):
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    assert hasattr(type(params), "load_mode")
    params.load_mode = job.load_mode
    models = [
        llama_cpp.llama_model_load_from_file(str(path).encode(), params) for path in job.models
    ]
    assert all(models)
    return models


def apply_adapter(model, context, file: str) -> None:
    import llama_cpp

    adapter = llama_cpp.llama_adapter_lora_init(model, file.encode())
    assert adapter
    kept = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    assert not llama_cpp.llama_set_adapters_lora(context, kept, 1, (ctypes.c_float * 1)(1.0))


def shift_cache(context, tokens: int) -> None:
    """Remove tokens from the cache, and move the later ones to their positions."""
    import llama_cpp

    memory = llama_cpp.llama_get_memory(context)
    assert llama_cpp.llama_memory_can_shift(memory)
    assert llama_cpp.llama_memory_seq_rm(memory, 0, 4, 4 + tokens)
    llama_cpp.llama_memory_seq_add(memory, 0, 4 + tokens, -1, -tokens)


def logits_of(model, job: Job) -> np.ndarray:
    """Return the logits of the last prompt token and of each greedy token."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 256, job.batch, job.batch
    params.n_threads = params.n_threads_batch = job.threads
    if job.kv is not None:
        params.type_k = params.type_v = job.kv
    context = llama_cpp.llama_init_from_model(model, params)
    assert context
    if job.lora is not None:
        apply_adapter(model, context, job.lora)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    waiting = [(7 * i + 3) % size for i in range(job.prompt)]
    found = []
    while len(found) <= job.new_tokens:
        for start in range(0, len(waiting), job.batch):
            part = waiting[start : start + job.batch]
            ids = (llama_cpp.llama_token * len(part))(*part)
            assert not llama_cpp.llama_decode(
                context, llama_cpp.llama_batch_get_one(ids, len(part))
            )
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (size,)).copy()
        found.append(row)
        if job.shift and len(found) == 1:
            shift_cache(context, job.shift)
        waiting = [(11 * len(found) + 5) % size if job.forced else int(row.argmax())]
    llama_cpp.llama_free(context)
    return np.stack(found)


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    if job.plugin:
        import sqft_export

        sqft_export.use_in_llama_cpp()
    import llama_cpp

    llama_cpp.llama_backend_init()
    models = load(job)
    if job.again:
        for model in models:
            llama_cpp.llama_model_free(model)
        models = load(job)
    np.savez(Path(job.out), *[logits_of(model, job) for model in models])
    for model in models:
        llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    main()
