"""Build float models of quantized checkpoints, in memory or streamed module by module."""

from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor, nn

from sqft_export.errors import UserError
from sqft_export.machine.device import CPU
from sqft_export.model.architecture import transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.empty import empty_model
from sqft_export.model.storage import load_grids, plain_names, quantized_names, read_quantized
from sqft_export.numerics.affine import dequantize, fake_quantize
from sqft_export.numerics.codes import Grid, LowRank

Edit = Callable[[str, Tensor], Tensor]
# Argument of Gemma 4's blocks: a dict that they fill for later ones, which hooks would copy.
SHARED_STATES = "shared_kv_states"
MAX_CACHED_BYTES = 2**29  # logits that a Reference caches


class StreamedWeights(Mapping[str, Tensor]):
    """Maps parameter names to float32 weights; each access reads the weight from disk.

    updates: Linear -> the low-rank matrices A and B that are added to its weight.
    grids: module -> grid that its weight is rounded to.
    """

    def __init__(self, checkpoint: Checkpoint, updates: LowRank, grids: dict[str, Grid]):
        self.checkpoint, self.updates, self.grids = checkpoint, updates, grids

    def read(self, module: str, parameter: str) -> Tensor:
        """Return one parameter without its update, float32."""
        return self.checkpoint.tensor(f"{module}.{parameter}").float()

    def rows(self, table: str, ids: Tensor) -> Tensor:
        """Return some rows of a token table, float32 ``[ids, width]``."""
        found = self.checkpoint.tensor(f"{table}.weight")[ids].float()
        if (grid := self.grids.get(table)) is None:
            return found
        chosen = Grid(grid.scale[ids], grid.zero_point[ids], grid.bits, grid.group_size)
        return fake_quantize(found, chosen)

    def __getitem__(self, name: str) -> Tensor:
        module, _, parameter = name.rpartition(".")
        if parameter == "weight":  # a tied head has its own bias
            module = self.checkpoint.stored_name(module)
        weight = self.read(module, parameter)
        if parameter == "weight" and module in self.updates:
            lora_a, lora_b = map(torch.from_numpy, self.updates[module])
            weight = weight + lora_b @ lora_a
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.shapes)

    def __len__(self) -> int:
        return len(self.checkpoint.shapes)


class _MergedWeights(StreamedWeights):
    """The weights of a merged model as floats; codes are dequantized.

    kept: parameter name -> weight that was read before; None to read weights again each time.
    edit: changes every float weight that is read.
    """

    def __init__(self, folder: Path, updates: LowRank, keep: bool, edit: Edit | None):
        super().__init__(Checkpoint(folder), updates, load_grids(folder))
        self.edit = edit
        self.quantized = set(quantized_names(self.checkpoint))
        self.kept: dict[str, Tensor] | None = {} if keep else None

    def __getitem__(self, name: str) -> Tensor:
        if self.kept is None:
            return super().__getitem__(name)
        if name not in self.kept:
            self.kept[name] = super().__getitem__(name)
        return self.kept[name]

    def read(self, module: str, parameter: str) -> Tensor:
        if parameter == "weight" and module in self.quantized:
            return dequantize(*read_quantized(self.checkpoint, module))
        found = super().read(module, parameter)
        return self.edit(f"{module}.{parameter}", found) if self.edit else found


def streamed_model(
    checkpoint: Checkpoint, weights: StreamedWeights, device: torch.device
) -> nn.Module:
    """Build a model that reads a module's weights when the module runs, and frees them after.

    Of a token table besides the embedding, only the rows of a text are read.
    """
    config = transformers_config(checkpoint.config, checkpoint.where)
    model = empty_model(config, checkpoint.family.attention)
    attach_align_device_hook(
        model, device, offload=True, weights_map=weights, skip_keys=SHARED_STATES
    )
    for name, module in list(model.named_modules()):
        if name in checkpoint.family.tables:
            module.forward = partial(_look_up, module, partial(weights.rows, name))
    return model


def _look_up(table: nn.Module, rows: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Compute a token table's forward with only the rows that it needs.

    :param rows: returns the rows of some tokens, in their order.
    """
    tokens, places = ids.unique(return_inverse=True)
    table.padding_idx = None
    table.weight = nn.Parameter(rows(tokens.cpu()).to(ids.device), requires_grad=False)
    found = type(table).forward(table, places)
    table.weight = nn.Parameter(table.weight.to("meta"), requires_grad=False)
    return found


class Reference:
    """Reference outputs of a merged model: torch, float32, one module's weights in memory.

    :param folder: folder of the merged model.
    :param updates: Linear -> ``A`` float32 ``[rank, in]`` and ``B`` ``[out, rank]`` of an unmerged
        adapter; ``B`` includes the adapter's scaling.
    :param device: device to compute on.
    :param keep: keep all weights in memory after their first use.
    :param edit: name and float weight -> the weight to compute with.
    """

    def __init__(
        self,
        folder: Path,
        updates: LowRank | None = None,
        device: torch.device = CPU,
        keep: bool = False,
        edit: Edit | None = None,
    ):
        weights = _MergedWeights(folder, updates or {}, keep, edit)
        self.model = streamed_model(weights.checkpoint, weights, device)
        self.device = device
        self.cached: dict[str, list[np.ndarray]] = {}

    def logits(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Return the logits of every sequence, float32 ``[length, vocabulary]``, from one batch.

        Logits are cached up to ``MAX_CACHED_BYTES``, because every runtime is compared with them.
        """
        request = repr(sequences)
        if request in self.cached:
            return self.cached[request]
        found = self._compute(sequences)
        size = sum(one.nbytes for every in (*self.cached.values(), found) for one in every)
        if size <= MAX_CACHED_BYTES:
            self.cached[request] = found
        return found

    @torch.no_grad()
    def _compute(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Compute logits; padding is on the right, which causal attention does not attend to."""
        ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        found = self.model(input_ids=ids.to(self.device), use_cache=False).logits.cpu()
        return [one[: len(s)].numpy() for one, s in zip(found, sequences, strict=True)]


def float_tensors(
    checkpoint: Checkpoint, without: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of a model as floats; codes are dequantized, floats stay unchanged.

    :param without: names of weights to leave out.
    """
    quantized = quantized_names(checkpoint)
    coded = {f"{name}.weight" for name in quantized}
    plain = (n for n in plain_names(checkpoint) if n not in coded and n not in without)
    yield from checkpoint.tensors(plain)
    for name in quantized:
        if f"{name}.weight" not in without:
            yield f"{name}.weight", dequantize(*read_quantized(checkpoint, name))


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    replacements: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Load a merged or float model in evaluation mode.

    :param dtype: dtype of the weights; None keeps the stored dtypes and maps the files to memory.
    :param replacements: name of a Linear -> module that replaces it; its weight is not read.
    :raises UserError: if a weight is not stored.
    """
    config = transformers_config(checkpoint.config, checkpoint.where)
    model, replacements = empty_model(config, checkpoint.family.attention), replacements or {}
    for name, module in replacements.items():
        model.set_submodule(name, module)
    for name, tensor in float_tensors(checkpoint, {f"{name}.weight" for name in replacements}):
        parent, _, child = name.rpartition(".")
        value = nn.Parameter(tensor if dtype is None else tensor.to(dtype), requires_grad=False)
        model.get_submodule(parent).register_parameter(child, value)
    model.tie_weights()
    if missing := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise UserError(f"{checkpoint.folder}: {missing[0]} is not stored")
    if (checkpoint.folder / "generation_config.json").is_file():
        generation = model.generation_config.from_pretrained(checkpoint.folder)
        model.generation_config = generation
    return model.eval()
