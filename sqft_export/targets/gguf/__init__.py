"""GGUF: one file for llama.cpp and programs built on it, with codes in llama.cpp's blocks.

``blocks.py`` defines how a grid is stored, ``architectures.py`` the names of tensors and config
keys, ``tokenizer.py`` how a tokenizer is stored. Layers are written one at a time. Codes are not
quantized again.
"""

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sqft_export.errors import UserError
from sqft_export.model.memory import release_memory
from sqft_export.numerics.codes import QuantizedWeight, from_arrays
from sqft_export.packed.blocks import BLOCK, count_repeats
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.packed.loaders import dense_gguf
from sqft_export.recipe.schema import Export
from sqft_export.targets.folder import ADAPTER_FOLDER, GRAPHS
from sqft_export.targets.gguf.architectures import (
    DELTA_FIELDS,
    Names,
    architecture_lacks,
    context_of_file,
    expert_number,
    naming_of,
    rotary_factors,
    split_parameter,
    write_keys,
)
from sqft_export.targets.gguf.blocks import BLOCK_TYPES, block_type, from_blocks, to_blocks
from sqft_export.targets.gguf.head import (
    HEAD_BYTES_PER_BLOCK,
    ROUNDED_KEY,
    dequantize_head,
    float_head,
    quantize_head,
    rounded_tensors,
)
from sqft_export.targets.gguf.session import ADAPTER_FILE, open_session
from sqft_export.targets.gguf.tokenizer import NotExpressible, write_tokenizer
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter, ReaderTensor
    from numpy.typing import DTypeLike

    from sqft_export.model.checkpoint import Checkpoint
    from sqft_export.model.config import ModelConfig

__all__ = [
    "add_adapter",
    "compressed_kernels",
    "export",
    "metadata",
    "open_session",
    "read_back",
    "read_floats",
    "rounded_head",
]

MODEL = GRAPHS["gguf"]
_PREFIX = "sqft_export."
MODEL_TYPE = f"{_PREFIX}model_type"
CONVOLUTION_DIMENSIONS = 3  # channels, 1, columns
# Copied next to the file, for programs that read configs. The file has the tokenizer too.
COPIED_FILES = ("config.json", "generation_config.json", "tokenizer*", "chat_template.jinja")


# Type of the first tensor -> file type that readers see. None: a numpy dtype.
_FILE_TYPES = {
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1",
    "Q8_0": "MOSTLY_Q8_0",
    "BF16": "MOSTLY_BF16",
    None: "MOSTLY_F16",
}


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write.

    name: llama.cpp's name.
    shape: of the array that ``make`` returns.
    kind: ggml's type; None: that of the dtype.
    make: computes the array when it is written.
    expert: number of the expert whose matrix it is; None for other tensors.
    is_head: whether it is a rounded output head.
    """

    name: str
    shape: tuple[int, ...]
    dtype: "DTypeLike"
    kind: str | None
    make: Callable[[], np.ndarray]
    expert: int | None = None
    is_head: bool = False


def export(
    merged: Path, folder: Path, options: Export, facts: dict[str, str] | None = None
) -> None:
    """Write the deployment folder of a merged model: ``model.gguf``, configs, tokenizer.

    :param merged: Hugging Face folder, in the GPTQ layout or with float weights.
    :param options: ``gguf_head: q8_0`` rounds a float head; ``auto`` and ``float`` keep it.
    :raises UserError: if GGUF can't represent the model or its tokenizer.
    """
    import gguf

    from sqft_export.model.architecture import transformers_config
    from sqft_export.model.checkpoint import Checkpoint
    from sqft_export.model.storage import model_facts

    checkpoint = Checkpoint(merged)
    config = transformers_config(checkpoint.config, checkpoint.where).to_dict()
    if lacks := architecture_lacks(config):
        raise UserError(f"{merged}: {lacks}")
    names = naming_of(config)
    writer = gguf.GGUFWriter(folder / MODEL, names.architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_keys(writer, config)
    rows = checkpoint.shapes[f"{checkpoint.family.embedding}.weight"][0]
    try:
        write_tokenizer(writer, merged, rows)
    except NotExpressible as error:
        raise UserError(f"{merged}: GGUF can't represent its tokenizer: {error}") from error
    for key, value in (facts or model_facts(checkpoint)).items():
        writer.add_string(f"{_PREFIX}{key}", value)
    head = float_head(checkpoint) if options.gguf_head == "q8_0" else None
    tensors = list(_tensors(checkpoint, names, config, head))
    _describe_tensors(writer, tensors)
    _write_tensors(writer, tensors)
    for pattern in COPIED_FILES:
        for file in merged.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    _cap_context(folder, config)


def _cap_context(folder: Path, config: "ModelConfig") -> None:
    """Write the context length of the GGUF file into the copied config, if it is shorter."""
    from sqft_export.model.companions import write_config

    stored, context = read_json(folder / "config.json"), context_of_file(config)
    if stored.get("max_position_embeddings", context) > context:
        write_config(folder, stored | {"max_position_embeddings": context})


def _describe_tensors(writer: "GGUFWriter", tensors: list[_Tensor]) -> None:
    """Add the names of a rounded head, and the file type, which is that of the first tensor."""
    import gguf

    if rounded := [tensor.name for tensor in tensors if tensor.is_head]:
        writer.add_string(ROUNDED_KEY, ",".join(rounded))
    first = next(tensor for tensor in tensors if not tensor.is_head)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[first.kind]])


def _write_tensors(writer: "GGUFWriter", tensors: list[_Tensor]) -> None:
    """Write the header, then one tensor at a time."""
    import gguf

    for tensor in tensors:
        kind = None if tensor.kind is None else gguf.GGMLQuantizationType[tensor.kind]
        size = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(tensor.dtype), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
        release_memory()
    writer.close()


def _tensors(
    checkpoint: "Checkpoint", names: Names, config: "ModelConfig", head: str | None
) -> Iterator[_Tensor]:
    """Yield all tensors in file order. Weights are read only when ``make`` is called.

    :param head: name of a float matrix that is rounded to Q8_0.
    """
    from sqft_export.model.storage import plain_names, quantized_names

    quantized = quantized_names(checkpoint)
    codes = (one for module in quantized for one in _codes_tensors(checkpoint, names, module))
    yield from _stack_experts(codes)
    keys = sorted(k for k in plain_names(checkpoint) if k.removesuffix(".weight") not in quantized)
    make = functools.partial(_plain_tensors, checkpoint, names, head)
    yield from _stack_experts(one for key in keys for one in make(key))
    if checkpoint.tied and names.architecture.head_always:
        [embedding] = make(f"{checkpoint.family.embedding}.weight")
        yield replace(embedding, name="output.weight")
    for name, factors in rotary_factors(config):
        made = functools.partial(np.asarray, factors)
        yield _Tensor(f"{name}.weight", factors.shape, np.float32, None, made)


def _stack_experts(tensors: Iterable[_Tensor]) -> Iterator[_Tensor]:
    """Yield the tensors; the matrices of all experts of a block are joined.

    Each expert is read when the tensor is written, in the order of the experts.
    """
    experts: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        if tensor.expert is None:
            yield tensor
        else:
            experts.setdefault(tensor.name, []).append(tensor)
    for name, parts in experts.items():
        parts.sort(key=lambda one: one.expert or 0)
        first = parts[0]

        def make(parts: list[_Tensor] = parts) -> np.ndarray:
            stacked = np.empty((len(parts), *parts[0].shape), parts[0].dtype)
            for row, part in zip(stacked, parts, strict=True):
                row[:] = part.make()
            return stacked

        yield _Tensor(name, (len(parts), *first.shape), first.dtype, first.kind, make)


def _codes_tensors(checkpoint: "Checkpoint", names: Names, module: str) -> Iterator[_Tensor]:
    """Yield the tensors of a quantized weight; most have one."""
    from sqft_export.model.storage import read_grid, read_quantized

    grid = read_grid(checkpoint, module)
    count, inputs = checkpoint.shapes[f"{module}.weight"]
    kind = block_type(grid.bits, grid.symmetric)
    if kind is None:
        raise UserError(f"{module}: asymmetric INT8 has no type in llama.cpp")

    def make(rows: slice) -> np.ndarray:
        found = read_quantized(checkpoint, module).numpy()
        if names.moves_columns(module):
            found = found.in_groups(inputs // BLOCK)
        permute = functools.partial(names.permute_rows, module)
        move = functools.partial(names.permute_columns, module)
        try:
            return to_blocks(found.map_arrays(permute).map_arrays(move).rows(rows), kind)
        except ValueError as error:
            raise UserError(f"{module}: {error}") from error

    for name, rows in names.tensors_of(module, count):
        shape = (len(range(count)[rows]), inputs // BLOCK * kind.bytes)
        part, expert = functools.partial(make, rows), expert_number(module)
        yield _Tensor(f"{name}.weight", shape, np.uint8, kind.name, part, expert)


def _plain_tensors(
    checkpoint: "Checkpoint", names: Names, head: str | None, key: str
) -> Iterator[_Tensor]:
    """Yield the tensors of a float parameter; a rounded one for the parameter ``head``."""
    if key != head:
        yield from _float_tensors(checkpoint, names, key)
        return
    module, (rows, inputs) = key.rpartition(".")[0], checkpoint.shapes[key]

    def make() -> np.ndarray:
        values = checkpoint.tensor(key).float().numpy()
        return quantize_head(names.permute_rows(module, values))

    [(name, _)] = names.tensors_of(module, rows)
    shape = (rows, inputs // BLOCK * HEAD_BYTES_PER_BLOCK)
    yield _Tensor(f"{name}.weight", shape, np.uint8, "Q8_0", make, is_head=True)


def _float_tensors(checkpoint: "Checkpoint", names: Names, key: str) -> Iterator[_Tensor]:
    """Yield the tensors of a float parameter; most have one.

    Matrices keep their dtype. Vectors become float32, which llama.cpp expects.
    """
    import torch

    module, part = split_parameter(key)
    shape = checkpoint.shapes[key]
    if len(shape) == CONVOLUTION_DIMENSIONS:
        yield _convolution_tensor(checkpoint, names, key)
        return
    # llama.cpp multiplies with routers in float32.
    is_matrix = len(shape) > 1 and not checkpoint.family.is_router(module)
    is_bfloat16 = is_matrix and checkpoint.headers[key].dtype in ("BF16",)
    is_float16 = is_matrix and checkpoint.headers[key].dtype == "F16"
    dtype = np.float16 if is_float16 else np.float32  # float64 is rounded

    def make(rows: slice) -> np.ndarray:
        if len(shape) == 1:
            return _vector_values(checkpoint, names, key)[rows]
        tensor = checkpoint.tensor(key)
        if is_bfloat16:
            halves = names.permute_rows(module, tensor.view(torch.int16).numpy())[rows]
            return np.ascontiguousarray(names.permute_columns(module, halves)).view(np.uint8)
        values = tensor.numpy() if is_matrix else tensor.float().numpy()
        values = names.permute_rows(module, values.astype(dtype, copy=False))[rows]
        return names.permute_columns(module, values)

    if own_name := names.tensor_of_parameter(key):
        yield _Tensor(own_name, shape, dtype, None, functools.partial(make, slice(None)))
        return
    bytes_wide, stored, kind = (2, np.uint8, "BF16") if is_bfloat16 else (1, dtype, None)
    for name, rows in names.tensors_of(module, shape[0]):
        sizes = (len(range(shape[0])[rows]), *(bytes_wide * width for width in shape[1:]))
        made, expert = functools.partial(make, rows), expert_number(module)
        yield _Tensor(f"{name}.{part}", sizes, stored, kind, made, expert)


def _vector_values(checkpoint: "Checkpoint", names: Names, key: str) -> np.ndarray:
    """Return a norm, bias or rate as llama.cpp stores it, float32."""
    from sqft_export.model.recurrent import DECAY_PARAMETER

    tensor = checkpoint.tensor(key).float()
    if key.endswith(DECAY_PARAMETER):
        tensor = -tensor.exp()
    owner = key.removesuffix(".weight").removesuffix(".bias")
    offset = checkpoint.family.offset_of(split_parameter(key)[0])
    return names.permute_rows(owner, tensor.numpy()) + np.float32(offset)


def _convolution_tensor(checkpoint: "Checkpoint", names: Names, key: str) -> _Tensor:
    """Return the filters of a convolution per channel: float32 ``[channels, columns]``."""
    module = key.rpartition(".")[0]
    channels, _, columns = checkpoint.shapes[key]

    def make() -> np.ndarray:
        filters = checkpoint.tensor(key).float().numpy().reshape(channels, columns)
        return names.permute_rows(module, filters)

    [(name, _)] = names.tensors_of(module, channels)
    return _Tensor(f"{name}.weight", (channels, columns), np.float32, None, make)


def add_adapter(folder: Path, adapter: Path) -> None:
    """Write an adapter next to the file, in the format of ``llama-cli --lora``.

    The scaling is multiplied into B.
    """
    import gguf

    from sqft_export.adapters.files import read_low_rank

    _, names = _read(folder)
    (folder / ADAPTER_FOLDER).mkdir()
    writer = gguf.GGUFWriter(folder / ADAPTER_FOLDER / ADAPTER_FILE, names.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # llama.cpp then applies no scaling
    for module, (lora_a, lora_b) in read_low_rank(adapter).items():
        lora_a = names.permute_columns(module, lora_a)
        lora_b = names.permute_rows(module, lora_b)
        for name, rows in names.tensors_of(module, len(lora_b)):
            writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(lora_a))
            writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(lora_b[rows]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.lru_cache(maxsize=1)
def _reader(file: Path, stamp: tuple[int, ...]) -> "GGUFReader":
    """Read a file with the ``gguf`` package, which takes seconds for a large vocabulary.

    :param stamp: inode, size and time of the file; the file is read again if it changes.
    """
    return read_gguf(file)


def _read(folder: Path) -> tuple["GGUFReader", Names]:
    """Return the opened file and the names of its tensors.

    :raises UserError: if another program wrote the file.
    """
    with dense_gguf(folder) as file:
        status = file.stat()
        reader = _reader(file, (status.st_ino, status.st_size, status.st_mtime_ns))
    field = reader.fields.get(MODEL_TYPE)
    if field is None:
        raise UserError(f"{folder / MODEL}: has no {MODEL_TYPE}; it was written by another program")
    architecture = reader.fields["general.architecture"].contents()
    heads = {
        "num_attention_heads": reader.fields[f"{architecture}.attention.head_count"].contents(),
        "num_key_value_heads": reader.fields[f"{architecture}.attention.head_count_kv"].contents(),
    }
    for name, key in DELTA_FIELDS.items():
        if f"{architecture}.{key}" in reader.fields:
            heads[name] = reader.fields[f"{architecture}.{key}"].contents()
    stored = {tensor.name.split(".", 2)[-1] for tensor in reader.tensors}
    return reader, Names(field.contents(), heads, "attn_norm_2.weight" in stored)


def _modules(
    reader: "GGUFReader", names: Names
) -> Iterator[tuple[str | None, str, list["ReaderTensor"]]]:
    """Yield module, parameter and the tensors with its rows, in order; None for no module."""
    held: dict[tuple[str, str], dict[int, ReaderTensor]] = {}
    for tensor in reader.tensors:
        stem, _, part = tensor.name.rpartition(".")
        module, (number, count) = names.module_of(stem), names.part_of(stem)
        if module is None or count == 1:
            yield module, part, [tensor]
            continue
        parts = held.setdefault((module, part), {})
        parts[number] = tensor
        if len(parts) == count:
            yield module, part, [parts[index] for index in range(count)]


def read_back(folder: Path) -> Iterator[tuple[str, QuantizedWeight[np.ndarray]]]:
    """Yield module and quantized weight, scale float16, one at a time, from the written file."""
    reader, names = _read(folder)
    rounded = rounded_tensors(reader)
    for module, _, tensors in _modules(reader, names):
        kind = BLOCK_TYPES.get(tensors[0].tensor_type.name)
        if kind is None or module is None or tensors[0].name in rounded:
            continue
        for one, data in _by_expert(module, _join([tensor.data for tensor in tensors])):
            restore = functools.partial(names.restore_rows, one)
            move = functools.partial(names.restore_columns, one)
            found = from_blocks(data, kind).map_arrays(restore).map_arrays(move)
            yield one, _longest_groups(found)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Return the rows of all parts; a single part is not copied."""
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _by_expert(module: str, data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield module and matrix of every expert of a tensor; other tensors stay unchanged."""
    if "*" not in module:
        yield module, data
        return
    for number, matrix in enumerate(data):
        yield module.replace("*", str(number)), matrix


def _longest_groups(found: QuantizedWeight[np.ndarray]) -> QuantizedWeight[np.ndarray]:
    """Merge neighbouring blocks with equal scale and zero point into one group."""
    numbers = np.stack([found.scale.view(np.uint16), found.zero_point.astype(np.uint16)], axis=2)
    count = count_repeats(numbers.reshape(-1, 2), numbers.shape[1])
    scale, zero_point = found.scale[:, ::count], found.zero_point[:, ::count]
    return from_arrays(found.codes, scale, zero_point, found.bits)


def read_floats(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of float tensors, float32, rows in the checkpoint's order.

    The name of a matrix ``[out, in]`` is its module. A vector has its parameter name, or an empty
    name if it belongs to no module.
    """
    reader, names = _read(folder)
    rounded = rounded_tensors(reader)
    for module, part, tensors in _modules(reader, names):
        is_rounded = tensors[0].name in rounded
        if tensors[0].tensor_type.name in BLOCK_TYPES and not is_rounded:
            continue
        values = _join([_values(tensor, is_rounded) for tensor in tensors])
        if key := names.key_of(tensors[0].name):
            yield key, names.restore_rows(key, values)
            continue
        if module is None:
            yield "", values
            continue
        for one, matrix in _by_expert(module, values):
            restored = names.restore_rows(one, matrix)
            if restored.ndim == 2:
                yield one, names.restore_columns(one, restored)
            else:
                yield names.parameter_of(one, part), restored


def _values(tensor: "ReaderTensor", is_rounded: bool) -> np.ndarray:
    """Return the values of a float tensor or of a rounded head, float32."""
    if is_rounded:
        return dequantize_head(tensor.data)
    if tensor.tensor_type.name == "BF16":
        return (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return tensor.data.astype(np.float32, copy=False)


def rounded_head(folder: Path) -> bool:
    """Return whether the output head of a deployment was rounded to Q8_0."""
    reader, _ = _read(folder)
    return bool(rounded_tensors(reader))


def metadata(folder: Path) -> dict[str, str]:
    """Return the model facts that the file stores."""
    reader, _ = _read(folder)
    return {
        key.removeprefix(_PREFIX): str(field.contents())
        for key, field in reader.fields.items()
        if key.startswith(_PREFIX)
    }


def compressed_kernels(folder: Path, scratch: Path) -> set[str]:
    """Return the modules whose tensors are quantized blocks, which llama.cpp multiplies."""
    reader, names = _read(folder)
    stored = [t for t in reader.tensors if t.tensor_type.name in BLOCK_TYPES]
    modules = ((str(names.module_of(t.name.rpartition(".")[0])), t.data) for t in stored)
    return {name for module, data in modules for name, _ in _by_expert(module, data)}
