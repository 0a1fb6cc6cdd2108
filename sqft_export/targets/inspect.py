"""Describe a deployment folder from its files, without torch."""

from collections import Counter
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from sqft_export.artifacts.store import files_of, sha256_of
from sqft_export.errors import UserError, one_line
from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.packed.seal import check_seal
from sqft_export.packed.usage import loaders_of, why_no_loader
from sqft_export.targets import target
from sqft_export.targets.folder import UNLIMITED_SUFFIXES, is_deployment, runtime_of
from sqft_export.targets.grids import WeightGrid, describe_acceptance


class InspectedLayer(TypedDict):
    """A quantized weight.

    sparsity: share of zeros.
    runs_on, times_as_fast: kernel chosen on this machine and its speed-up over the runtime's own.
    """

    layer: str
    shape: list[int]
    bits: int
    group_size: int
    symmetric: bool
    sparsity: float
    runs_on: NotRequired[str]
    times_as_fast: NotRequired[float | None]


class InspectedLoader(TypedDict):
    """A way to load the folder in Python; ``missing`` says why it can't run on this machine."""

    runtime: str
    code: str
    installed: bool
    missing: str | None


class Inspection(TypedDict):
    """The result of ``inspect``.

    bytes: kind of file -> total size.
    files: file -> SHA-256.
    says: facts about the model that the deployment stores.
    accepted_by: device that we could not run on -> whether it takes the codes, with the source.
    """

    folder: str
    runtime: str
    layers: list[InspectedLayer]
    bytes: dict[str, int]
    files: dict[str, str]
    sealed: bool
    says: dict[str, str]
    loads_in: list[InspectedLoader]
    accepted_by: dict[str, str]


_WEIGHTS, _GRAPH, _TOKENIZER = "weights", "graph", "tokenizer and configs"


def inspect_folder(folder: Path) -> Inspection:
    """Return layers, bytes per kind of file, digests, stored model facts, and possible loaders.

    For a merged model, return its layers and whether Marlin takes them. For a multimodal Hugging
    Face model, return which tensors a run would read and leave out.

    :raises UserError: if the folder is not a deployment, or its runtime is not installed.
    """
    if not is_deployment(folder) and (facts := _wrapper_facts(folder)):
        return _model_inspection(folder, facts, [])
    if not is_deployment(folder) and (layers := _merged_layers(folder)):
        return _model_inspection(folder, {}, layers)
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
    return {
        "folder": str(folder),
        "runtime": runtime,
        "layers": layers,
        "bytes": _bytes_by_kind(folder),
        "files": {str(f.relative_to(folder)): sha256_of(f) for f in files_of(folder)},
        "sealed": sealed,
        "says": facts,
        "loads_in": _runtimes(folder),
        "accepted_by": _acceptance(runtime, layers),
    }


def _wrapper_facts(folder: Path) -> dict[str, str]:
    """Return the text model and the left out parts of a multimodal model; {} of other folders."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return {}
    from sqft_export.model.checkpoint import Checkpoint
    from sqft_export.model.wrappers import left_out

    checkpoint = Checkpoint(folder)
    if checkpoint.wrapper_config is None:
        return {}
    text = checkpoint.headers.values()
    size = sum(header.bytes for header in text)
    return {
        "model_type": str(checkpoint.wrapper_config.get("model_type")),
        "text model": f"{checkpoint.config['model_type']}: {len(text)} tensors, {size:,} bytes",
        **{
            f"left out: {one.part}": f"{one.tensors} tensors, {one.bytes:,} bytes"
            for one in left_out(checkpoint.stored, str(folder))
        },
    }


def _merged_layers(folder: Path) -> list[InspectedLayer]:
    """Return the quantized layers of a Hugging Face model; [] of a float model or other folder."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return []
    from sqft_export.model.checkpoint import Checkpoint
    from sqft_export.model.storage import quantized_names, read_quantized

    checkpoint = Checkpoint(folder)
    names = quantized_names(checkpoint)
    return [_layer(name, read_quantized(checkpoint, name).numpy()) for name in names]


def _grid_of(layer: InspectedLayer) -> WeightGrid:
    outputs, inputs = layer["shape"]
    size, symmetric = layer["group_size"], layer["symmetric"]
    return WeightGrid(layer["layer"], outputs, inputs, layer["bits"], size, symmetric)


def _acceptance(runtime: str, layers: list[InspectedLayer]) -> dict[str, str]:
    grids = [_grid_of(layer) for layer in layers]
    return describe_acceptance(runtime, grids)


def _model_inspection(
    folder: Path, facts: dict[str, str], layers: list[InspectedLayer]
) -> Inspection:
    """Return the result for a Hugging Face model.

    :param layers: its quantized layers.
    """
    return {
        "folder": str(folder),
        "runtime": "torch",
        "layers": layers,
        "accepted_by": _acceptance("torch", layers),
        "bytes": _bytes_by_kind(folder),
        "files": {str(f.relative_to(folder)): sha256_of(f) for f in files_of(folder)},
        "sealed": False,
        "says": facts,
        "loads_in": [],
    }


def _bytes_by_kind(folder: Path) -> dict[str, int]:
    """Return kind of file -> total size."""
    sizes: Counter[str] = Counter()
    for file in files_of(folder):
        sizes[_kind(file)] += file.stat().st_size
    return dict(sizes)


def _add_kernels(folder: Path, layers: list[InspectedLayer]) -> None:
    """Add to each layer the kernel chosen on this machine, and its measured speedup."""
    from sqft_export.packed.execution import list_kernels

    chosen = list_kernels(folder)
    for layer in layers:
        if layer["layer"] in chosen:
            layer["runs_on"], layer["times_as_fast"] = chosen[layer["layer"]]


def _sort_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts block 10 after block 9."""
    parts = name.split(".")
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _layer(name: str, quantized: QuantizedWeight[np.ndarray]) -> InspectedLayer:
    return {
        "layer": name,
        "shape": list(quantized.codes.shape),
        "bits": quantized.bits,
        "group_size": quantized.grid.group_size,
        "symmetric": quantized.grid.symmetric,
        "sparsity": float((quantized.steps == 0).mean()),
    }


def _kind(file: Path) -> str:
    if "tokenizer" in file.name:
        return _TOKENIZER
    if file.suffix in UNLIMITED_SUFFIXES:
        return _WEIGHTS
    return _GRAPH if file.suffix in (".xml", ".onnx") else _TOKENIZER


def _runtimes(folder: Path) -> list[InspectedLoader]:
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


def _kernel_text(layer: InspectedLayer) -> str:
    if "runs_on" not in layer:
        return ""
    gain = layer["times_as_fast"]
    return f"  {layer['runs_on']}" + (f", {gain:.2f} times as fast as stock" if gain else "")


def inspection_text(found: Inspection) -> str:
    """Return the result of :func:`inspect_folder` as text."""
    lines = [f"{found['folder']}: {found['runtime']}"]
    lines += [f"  {key}: {value}" for key, value in sorted(found["says"].items())]
    lines += [f"  {size:>14,} bytes {kind}" for kind, size in found["bytes"].items()]
    lines.append("  as sealed" if found["sealed"] else "  not sealed: no provenance.json")
    lines.append("  loads in")
    for entry in found["loads_in"]:
        here = "" if entry["installed"] else f"  # {entry['missing']}"
        lines.append(f"    {entry['runtime']:16}  {entry['code']}{here}")
    lines += [f"  {device}: {verdict}" for device, verdict in found["accepted_by"].items()]
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
