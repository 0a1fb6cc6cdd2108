"""Predicted bytes that each pass writes, and the check of free disk space."""

import shutil
from math import prod
from pathlib import Path

from sqft_export.errors import HostError
from sqft_export.machine.host import nearest_folder, size_text
from sqft_export.model.families import adapted
from sqft_export.model.hub import Download
from sqft_export.plan.layout import Layout, group_sizes
from sqft_export.plan.wrapped import text_model_bytes
from sqft_export.recipe.passes import pass_names
from sqft_export.recipe.schema import Recipe

# Tensors in the state of an interrupted pass that no shard contains yet, of two writers.
_HELD_BYTES = 2**25


def predict_bytes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Predict the bytes that each pass writes, from shapes and bit widths."""
    stored = (layout.weights + layout.others) * layout.width
    masks = layout.weights // 8
    groups = group_sizes(recipe, layout)
    scales = sum(prod(shape) // groups[name] for name, shape in layout.linears.items())
    adapter = adapter_bytes(recipe, layout)
    quantized = recipe.quantize.method != "none"
    # A scale has two bytes, a zero point at most one.
    codes = layout.weights * max(4, recipe.quantize.bits) // 8 + 3 * scales if quantized else 0
    # Token tables are float32 in the merged model, so that grid points are exact.
    tables, outer = layout.tables, layout.others - layout.tables
    merged = codes + outer * layout.width + 4 * tables if quantized else stored
    deployed = codes + 4 * outer + tables
    if not quantized:
        deployed = 4 * (layout.weights + layout.others)
    if recipe.export.sparse_files:
        deployed *= 2  # upper bound: a packed copy is never larger
    predicted = {
        "sparsify": stored + masks,
        "reconstruct": stored,
        "quantize": stored + 3 * scales,
        "adapt": adapter,
        "search": adapter,
        "merge": merged + masks,
        "export-openvino": deployed,
        "export-onnx": deployed,
        "export-gguf": deployed,
        "export-web": deployed,
        "teacher": stored,
        "baselines": merged,
        "peers-grid": 3 * stored + len(recipe.grid_targets) * deployed,
        # The float file and one quantized file of at most 6 bits per weight.
        "peers-gguf": 2 * stored + len(recipe.peers) * stored,
        "peers-nncf": 6 * stored,
    }
    return {name: predicted.get(name, 2**20) for name in pass_names(recipe)}


def state_bytes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Predict the bytes of the state that a pass saves after each block, to resume there.

    The state has the calibration samples' hidden states in float32. A reconstruction walks the
    dense model too. The state before it is deleted once a new one is complete.
    """
    tokens = recipe.calibration.samples * recipe.calibration.sequence_length
    hidden = 4 * tokens * layout.embedding[1]
    sparsify, quantize = recipe.sparsify.calibrates, recipe.quantize.calibrates
    walks = {
        "sparsify": int(sparsify),
        "reconstruct": 2,
        "quantize": 2 if recipe.quantize.reconstruct else int(quantize),
    }
    return {name: 2 * (_HELD_BYTES + count * hidden) for name, count in walks.items()}


def adapter_bytes(recipe: Recipe, layout: Layout) -> int:
    """Return the bytes of the low-rank matrices at the highest rank, in float32."""
    if recipe.adapt is None:
        return 0
    targets, _ = adapted(layout.family, recipe.adapt.target_modules, None)
    linears = [sum(s) for n, s in layout.linears.items() if n.rsplit(".", 1)[1] in targets]
    return 4 * recipe.adapt.max_rank * sum(linears)


def check_disk(
    recipe: Recipe,
    layout: Layout,
    root: Path,
    passes: list[str],
    download: Download | None = None,
) -> None:
    """Refuse passes that need more bytes than the disk has free.

    :param download: pending download of the base model; counted if it goes to the same disk.
    :raises HostError: if the disk is too small; the message has the bytes needed and free.
    """
    needed, free = disk_bytes(recipe, layout, root, passes)
    if download and _same_disk(root, download.cache):
        needed += download.bytes
    if free < needed:
        raise HostError(
            f"{recipe.file}: disk: {size_text(needed)} needed in {root}, {size_text(free)} free"
        )


def _same_disk(*places: Path) -> bool:
    return len({nearest_folder(place).stat().st_dev for place in places}) == 1


def disk_bytes(recipe: Recipe, layout: Layout, root: Path, passes: list[str]) -> tuple[int, int]:
    """Return the bytes that the passes need at most, with temporary files, and the free bytes."""
    written = predict_bytes(recipe, layout)
    # Temporary files: the state of an interrupted pass; an exporter's traced float32 copy; unpacked
    # copies in verify and benchmark.
    scratch = {
        **state_bytes(recipe, layout),
        **{
            f"export-{name}": 4 * (layout.weights + layout.others) for name in recipe.export.targets
        },
        "verify": 2
        * max((written.get(f"export-{n}", 0) for n in recipe.export.targets), default=0),
    }
    scratch["benchmark"] = scratch["verify"]
    if "gguf" in recipe.export.targets:  # its weights in float32
        scratch["verify"] += 4 * (layout.weights + layout.others)
    transient = max((scratch.get(name, 0) for name in passes), default=0)
    needed = sum(written.get(name, 0) for name in passes) + transient
    needed += text_model_bytes(layout) if passes else 0
    return needed, shutil.disk_usage(nearest_folder(root)).free
