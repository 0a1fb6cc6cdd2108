"""Check that a ``genai_config.json`` only sets options of ONNX Runtime GenAI and runs no code.

Session options have an allow-list: some options load libraries or read and write files, and new
versions of the runtime add options.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypedDict

from sqft_export.errors import UserError, one_line
from sqft_export.targets.folder import GENAI_CONFIG
from sqft_export.textfiles import read_json
from sqft_export.untrusted import fault_of_file

CUSTOM_LIBRARY = "custom_ops_library"
# Allowed options. None of them names a file.
RUN_OPTIONS = {"log_severity_level", "log_verbosity_level"}
SESSION_OPTIONS = {
    *("log_id", "log_severity_level", "log_verbosity_level", "graph_optimization_level"),
    *("intra_op_num_threads", "inter_op_num_threads", "use_env_allocators"),
    *("enable_cpu_mem_arena", "enable_mem_pattern", "provider_options"),
    *("disable_cpu_ep_fallback", "disable_quant_qdq", "enable_quant_qdq_cleanup"),
}
# Allowed options of a provider. Options that name libraries, caches or files are excluded.
PROVIDER_OPTIONS = {
    *("device_id", "device_type", "precision", "num_of_threads", "num_streams"),
    *("enable_cuda_graph", "enable_skip_layer_norm_strict_mode", "gpu_mem_limit"),
    *("arena_extend_strategy", "cudnn_conv_algo_search", "do_copy_in_default_stream", "use_tf32"),
    *("tunable_op_enable", "tunable_op_tuning_enable", "performance_preference", "device_filter"),
}
PROVIDERS = {"cpu", "cuda", "dml", "rocm", "webgpu", "openvino"}
TRUST = "where you trust the folder, pass trust_custom_ops=True"


class DecoderConfig(TypedDict):
    """Sizes in the decoder section of ``genai_config.json``, which has more fields."""

    head_size: int
    num_attention_heads: int
    num_key_value_heads: int


class BuiltDecoder(DecoderConfig):
    """The decoder section that ONNX Runtime GenAI's builder writes.

    inputs: name in GenAI -> name of the graph's input.
    """

    inputs: dict[str, str]


def check_genai_config(folder: Path) -> None:
    """Refuse a ``genai_config.json`` that runs code of its folder, or reads outside the folder.

    :raises UserError: naming the entry.
    """
    file = folder / GENAI_CONFIG
    if fault := fault_of_file(file):
        raise UserError(f"{file}: {fault if file.exists() else 'is missing'}")
    for path, key, value in _entries(read_json(file)):
        if fault := _fault_of_entry(key, value):
            raise UserError(f"{file}: {one_line(path)}: {fault}")


def _entries(node: object, path: str = "") -> Iterator[tuple[str, str, object]]:
    """Yield path, key and value of every entry, including nested ones."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{path}.{key}", key, value
            yield from _entries(value, f"{path}.{key}")
    elif isinstance(node, list):
        for value in node:
            yield from _entries(value, path)


def _fault_of_entry(key: str, value: object) -> str | None:
    """Return what is wrong with an entry, or None."""
    if key == CUSTOM_LIBRARY and value:
        return f"{one_line(repr(value))} is a library that would run; {TRUST}"
    if key.endswith("filename") and not _is_plain_name(value):
        return f"found {one_line(repr(value))}; a file of the folder is expected"
    if key == "run_options":
        return _fault_of_keys(value, RUN_OPTIONS)
    if key == "session_options":
        return _fault_of_keys(value, SESSION_OPTIONS)
    return _fault_of_providers(value) if key == "provider_options" else None


def _is_plain_name(value: object) -> bool:
    kinds = (PurePosixPath, PureWindowsPath)
    return isinstance(value, str) and value != ".." and all(k(value).name == value for k in kinds)


def _fault_of_keys(value: object, allowed: set[str]) -> str | None:
    """Return what is wrong with an object that may only have ``allowed`` keys, or None."""
    if not isinstance(value, dict):
        return f"found {one_line(repr(value))}; an object is expected"
    unknown = sorted(set(value) - allowed - {CUSTOM_LIBRARY})  # the library has a separate message
    if not unknown:
        return None
    shown = one_line(", ".join(unknown))
    return f"found {shown}; allowed are {', '.join(sorted(allowed))}; {TRUST}"


def _fault_of_providers(value: object) -> str | None:
    """Return what is wrong with a list of providers and their options, or None."""
    if not isinstance(value, list):
        return f"found {one_line(repr(value))}; a list of providers is expected"
    for provider in value:
        if fault := _fault_of_keys(provider, PROVIDERS):
            return fault
        for options in provider.values():
            if fault := _fault_of_keys(options, PROVIDER_OPTIONS):
                return fault
    return None
