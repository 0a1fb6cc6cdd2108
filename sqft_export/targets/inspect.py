"""Describe a deployment folder from its files, without torch."""

from collections import Counter
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError, one_line
from sqft_export.numerics.codes import Quantized
from sqft_export.packed.seal import check_seal
from sqft_export.packed.usage import loaders_of, why_no_loader
from sqft_export.run.artifact import files_of, sha256_of
from sqft_export.targets import target
from sqft_export.targets.folder import SUFFIX, runtime_of

_WEIGHTS, _GRAPH, _TOKENIZER = "weights", "graph", "tokenizer and configs"


def inspect_folder(folder: Path) -> dict[str, Any]:
    """Return layers, bytes per kind of file, digests, stored model facts, and possible loaders.

    :raises UserError: if the folder is not a deployment, or its runtime is not installed.
    """
    runtime = runtime_of(folder)
    sealed = check_seal(folder, whole=True)
    module = target(runtime)
    try:
        layers = [_layer(name, quantized) for name, quantized in module.read_back(folder)]
        if runtime == "openvino":
            _add_kernels(folder, layers)
        facts = module.metadata(folder)
    except (UserError, ImportError, MemoryError):
        raise
    except Exception as error:  # an untrusted graph may raise any error in a reader
        raise UserError(f"{folder}: can't be read as {runtime}: {one_line(error)}") from error
    layers.sort(key=lambda layer: _sort_key(layer["layer"]))
    sizes: Counter[str] = Counter()
    for file in files_of(folder):
        sizes[_kind(file)] += file.stat().st_size
    return {
        "folder": str(folder),
        "runtime": runtime,
        "layers": layers,
        "bytes": dict(sizes),
        "files": {str(f.relative_to(folder)): sha256_of(f) for f in files_of(folder)},
        "sealed": sealed,
        "says": facts,
        "loads_in": _runtimes(folder),
    }


def _add_kernels(folder: Path, layers: list[dict[str, Any]]) -> None:
    """Add to each layer the kernel chosen on this machine, and its measured speedup."""
    from sqft_export.packed.execution import list_kernels

    chosen = list_kernels(folder)
    for layer in layers:
        if layer["layer"] in chosen:
            layer["runs_on"], layer["times_as_fast"] = chosen[layer["layer"]]


def _sort_key(name: str) -> list[Any]:
    """Return a key that sorts block 10 after block 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _layer(name: str, quantized: Quantized) -> dict[str, Any]:
    codes, scale, zero = quantized
    groups = scale.shape[1]
    inputs = codes.shape[1]
    size = -(-inputs // groups)
    largest_zero = int(zero.max(initial=0))
    bits = 4 if max(int(codes.max(initial=0)), largest_zero) < 16 else 8
    return {
        "layer": name,
        "shape": list(codes.shape),
        "bits": bits,
        "group_size": size,
        "symmetric": bool((zero == 2 ** (bits - 1)).all()),
        "sparsity": float((quantized.steps == 0).mean()),
    }


def _kind(file: Path) -> str:
    if "tokenizer" in file.name:
        return _TOKENIZER
    if file.suffix in (".bin", ".data", ".safetensors", ".onnx_adapter", ".gguf", SUFFIX):
        return _WEIGHTS
    return _GRAPH if file.suffix in (".xml", ".onnx") else _TOKENIZER


def _runtimes(folder: Path) -> list[dict[str, Any]]:
    """Return the runtimes that load the folder, with code, and the reason if one is unavailable."""
    return [
        {
            "runtime": loader.runtime,
            "code": loader.expression(folder),
            "installed": (missing := why_no_loader(folder, loader)) is None,
            "missing": missing,
        }
        for loader in loaders_of(folder)
    ]


def _kernel_text(layer: dict[str, Any]) -> str:
    if "runs_on" not in layer:
        return ""
    gain = layer["times_as_fast"]
    return f"  {layer['runs_on']}" + (f", {gain:.2f} times as fast as stock" if gain else "")


def inspection_text(found: dict[str, Any]) -> str:
    """Return the result of :func:`inspect_folder` as text."""
    lines = [f"{found['folder']}: {found['runtime']}"]
    lines += [f"  {key}: {value}" for key, value in sorted(found["says"].items())]
    lines += [f"  {size:>14,} bytes {kind}" for kind, size in found["bytes"].items()]
    lines.append("  as sealed" if found["sealed"] else "  not sealed: no provenance.json")
    lines.append("  loads in")
    for entry in found["loads_in"]:
        here = "" if entry["installed"] else f"  # {entry['missing']}"
        lines.append(f"    {entry['runtime']:16}  {entry['code']}{here}")
    if found["layers"]:
        lines.append(f"  {'layer':44} {'shape':>14} bits group  zeros")
    for layer in found["layers"]:
        shape = "x".join(map(str, layer["shape"]))
        kind = f"{layer['bits']}{'' if layer['symmetric'] else 'a'}"
        lines.append(
            f"  {layer['layer']:44} {shape:>14} {kind:>4} {layer['group_size']:>5} "
            f"{100 * layer['sparsity']:6.2f} %{_kernel_text(layer)}"
        )
    lines += [f"  {digest}  {name}" for name, digest in found["files"].items()]
    return "\n".join(lines)
