"""Checks that find every fault of a recipe from headers and data files, without loading a model.

A check takes recipe and layout. It yields a message per fault: field, value found, values allowed.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sqft_export.data.conversations import hub_sources, split_conversations
from sqft_export.data.datasets import missing_sets, records
from sqft_export.data.files import read_text
from sqft_export.data.items import count_examples, data_files
from sqft_export.data.problems import problem_records
from sqft_export.errors import UserError, one_line
from sqft_export.machine.host import installed
from sqft_export.model.architecture import transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.contexts import deployed_config
from sqft_export.model.existing import stored_grid
from sqft_export.model.families import adapted, builder_lacks, rank_groups
from sqft_export.plan.answers import answer_faults, cut_answer_faults
from sqft_export.plan.chat import chat_faults
from sqft_export.plan.context import context_faults
from sqft_export.plan.experts import expert_faults
from sqft_export.plan.exporters import PACKAGES as TARGET_PACKAGES
from sqft_export.plan.exporters import drop_unsupported, target_faults
from sqft_export.plan.gates import gate_faults
from sqft_export.plan.layout import Layout, fallback_sizes, group_sizes, layout_of
from sqft_export.plan.packing import packing_faults
from sqft_export.plan.peers import peer_faults
from sqft_export.plan.readers import token_faults
from sqft_export.plan.rendering import rendering_faults
from sqft_export.plan.tokenizer import tokenizer_faults
from sqft_export.recipe.schema import HUB, Amount, Chat, Dataset, Problems, Recipe, Text, matches
from sqft_export.sparsifiers import override_for
from sqft_export.targets.devices import devices, why_not_run
from sqft_export.targets.gguf.blocks import why_no_blocks
from sqft_export.textfiles import read_json
from sqft_export.untrusted import entries_of, fault_of_file

FaultFinder = Callable[[Recipe, Layout], Iterator[str]]
PACKAGES = TARGET_PACKAGES | {"nncf": ("nncf", "openvino")}
NEEDS_DATASETS = "needs the datasets library: pip install 'sqft-export[datasets]'"


def check_recipe(recipe: Recipe, folder: Path | None) -> Layout:
    """Return the layout of the base model, or refuse a recipe that cannot run on this machine.

    :raises UserError: if there are faults; it lists each one with field, value found and values
        allowed.
    """
    layout = layout_of(recipe, folder)
    kept = drop_unsupported(recipe, layout)
    faults = [fault for check in CHECKS for fault in check(kept, layout)]
    if not faults:  # these checks need data that can be tokenized
        faults = [fault for check in DATA_CHECKS for fault in check(kept, layout)]
    if faults:
        raise UserError("\n".join(f"{recipe.file}: {fault}" for fault in faults))
    return layout


def _task_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield missing files; raise on rows or templates that do not fit. Needs no tokenizer."""
    task = recipe.task
    if isinstance(task, Dataset):
        folder = recipe.resolve(task.folder) if task.folder else None
        missing = list(missing_sets(task, folder))
        yield from missing
        if folder is None and not installed("datasets"):
            yield f"task: the hub {NEEDS_DATASETS}"
        if folder is not None and not missing:
            _read_all(task, folder, recipe)
        return
    if isinstance(task, Chat):
        yield from _chat_source_faults(recipe, task)
        return
    files = [(split, f) for split in ("train", "test") for f in data_files(recipe, split)]
    for split, file in files:
        if fault := fault_of_file(file):
            found = fault if os.path.lexists(file) else "no such file"
            yield f"task.{'text' if isinstance(task, Text) else split}: {found}: {file}"
        elif isinstance(task, Problems):
            for _ in problem_records(task, file):
                pass
        else:
            read_text(file)


def _chat_source_faults(recipe: Recipe, task: Chat) -> Iterator[str]:
    """Yield a fault for a missing source.

    :raises UserError: naming a row that is no conversation.
    """
    if hub_sources(task) and not installed("datasets"):
        yield f"task: the hub {NEEDS_DATASETS}"
    for split in ("train", "test"):
        source = task.source(split)
        path = recipe.resolve(source)
        if source.startswith(HUB) or path.is_dir():
            continue
        if fault := fault_of_file(path):
            yield f"task.{split}: {fault if os.path.lexists(path) else 'no such file'}: {path}"
            return
    if not hub_sources(task):
        split_conversations(recipe, task)


def _read_all(task: Dataset, folder: Path, recipe: Recipe) -> None:
    """Read every row of a dataset.

    :raises UserError: at the first row that does not fit its set.
    """
    for split in ("train", "test"):
        for _ in records(task, split, folder, str(recipe.file)):
            pass


def _calibration_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    source = recipe.calibration.source
    if source == "task" or not recipe.calibrates:
        return
    path = recipe.resolve(source)
    if path.is_file() and path.suffix in (".txt", ".jsonl"):
        return
    if not source.startswith(HUB) and not path.is_dir():
        yield (
            f"calibration.source: found {one_line(repr(source))}; allowed are task, an existing "
            ".txt or .jsonl file, an existing dataset folder, and hub:<dataset>"
        )
    elif not installed("datasets"):
        yield f"calibration.source: {source} {NEEDS_DATASETS}"


def _target_module_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    adapt = recipe.adapt
    if adapt is None:
        return
    targets, _ = adapted(layout.family, adapt.target_modules, None)
    ends = layout.last_names
    if adapt.target_modules is None:  # a hybrid may have one kind of block only
        targets = tuple(name for name in targets if name in ends)
    if unknown := sorted(set(targets) - set(ends)):
        yield (
            f"adapt.target_modules: found {', '.join(unknown)}, which is the name of no decoder "
            f"Linear; allowed are {', '.join(ends)}"
        )
        return
    elastic = {name for group in adapt.elastic_groups or () for name in group}
    if beyond := sorted(elastic - set(targets)):
        yield (
            f"adapt.elastic_groups: found {', '.join(beyond)}, which get no adapter; allowed "
            f"are {', '.join(targets)}"
        )
    for end in targets:
        sizes = [s for name, s in layout.linears.items() if name.endswith("." + end)]
        if (size := min(map(min, sizes))) < adapt.max_rank:
            yield f"adapt.ranks: found {adapt.max_rank}, but {end} has only {size} rows or columns"


def _override_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    for number, override in enumerate(recipe.sparsify.overrides):
        if unmatched := [
            m for m in override.modules if not any(matches(n, (m,)) for n in layout.linears)
        ]:
            yield (
                f"sparsify.overrides.{number}.modules: found {', '.join(unmatched)}, which matches "
                f"no decoder Linear; last names are {', '.join(layout.last_names)}"
            )


def _pattern_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    sparsify = recipe.sparsify
    for name, (_, inputs) in layout.linears.items():
        override = override_for(sparsify, name)
        amount: Amount = override or sparsify
        found = amount.n_of_m() or amount.at_most
        if found and inputs % found[1]:
            where = f"overrides.{sparsify.overrides.index(override)}." if override else ""
            yield (
                f"sparsify.{where}{'pattern' if amount.pattern else 'at_most'}: found "
                f"{amount.pattern or list(found)}, but {name} has {inputs} inputs, "
                f"which {found[1]} does not divide"
            )


def _group_size_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    quantize = recipe.quantize
    if quantize.group_size_fallback == "allow":
        return
    for name, size in fallback_sizes(recipe, layout).items():
        yield (
            f"quantize.group_size: found {quantize.group_size}, which does not divide the "
            f"{layout.linears[name][1]} inputs of {name}; group_size_fallback: allow would use "
            f"{size}"
        )


def _existing_grid_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield settings that do not fit the quantization of the base model, or its absence."""
    stored, quantize = layout.config.get("quantization_config"), recipe.quantize
    if not isinstance(stored, dict):
        if quantize.method == "existing":
            yield "quantize.method: found existing, but the model is not quantized"
        return
    grid = stored_grid(stored)
    if grid.refused:
        yield f"model: {grid.refused}"
        return
    if quantize.method != "existing":
        yield f"quantize.method: found {quantize.method}, but the model is quantized; use existing"
    if recipe.sparsify.method not in ("existing", "none"):
        yield (
            f"sparsify.method: found {recipe.sparsify.method}, but the model is quantized; "
            "allowed are existing and none"
        )
    for field, found, stored_value in (
        ("bits", quantize.bits, grid.bits),
        ("group_size", quantize.group_size or -1, grid.group_size),
        ("symmetric", quantize.symmetric, grid.symmetric),
    ):
        if found != stored_value:
            yield f"quantize.{field}: found {found}, but the model has {stored_value}"
            return
    if quantize.symmetric and layout.folder is not None:
        yield from _zero_point_faults(layout.folder, quantize.bits)


def _zero_point_faults(folder: Path, bits: int) -> Iterator[str]:
    """Yield a fault if a zero point is not the middle code: a wrong format or asymmetric grid."""
    from sqft_export.model.storage import read_quantized

    checkpoint = Checkpoint(folder)
    for name in checkpoint.quantized_linears[:1]:
        zeros = read_quantized(checkpoint, name).zero_point
        if not bool((zeros == 2 ** (bits - 1)).all()):
            yield (
                f"quantize.symmetric: found true, but {name} has a zero point of "
                f"{int(zeros[0, 0])} instead of {2 ** (bits - 1)}; the grid is asymmetric, or "
                "checkpoint_format in the model's config is wrong"
            )


def _search_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    search, adapt = recipe.search, recipe.adapt
    if adapt is None:
        return
    if search.evaluates and not isinstance(recipe.task, Text):
        count = _readable_examples(recipe)
        if count is not None and search.items >= count:
            yield (
                f"search.items: found {search.items}, but the training data has only {count} items"
            )
    if search.configuration is None:
        return
    file = recipe.resolve(search.configuration)
    _, groups = adapted(layout.family, adapt.target_modules, adapt.elastic_groups)
    names = rank_groups(layout.linears, layout.family.blocks, groups if adapt.elastic else ())
    try:
        ranks = read_json(file, finite=True)
    except UserError as error:
        yield f"search.configuration: {error}"
        return
    if set(ranks) != set(names) or any(rank not in adapt.ranks for rank in ranks.values()):
        yield (
            f"search.configuration: {file}: expected a rank of {list(adapt.ranks)} for each of "
            f"{', '.join(names)}"
        )


def _readable_examples(recipe: Recipe) -> int | None:
    """Return the number of training items; None if they are on the hub or cannot be read."""
    files, task = data_files(recipe, "train"), recipe.task
    folder = recipe.resolve(task.folder) if isinstance(task, Dataset) and task.folder else None
    missing = isinstance(task, Dataset) and any(missing_sets(task, folder, ("train",)))
    unread = missing or any(fault_of_file(file) for file in files)
    return None if unread else count_examples(recipe)


def _package_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    wanted = [("export.targets", name, name) for name in map(str, recipe.export.targets)]
    if recipe.quantize.method == "nncf":
        wanted.append(("quantize.method", "nncf", "openvino"))
    for field, name, extra in wanted:
        missing = [module for module in PACKAGES[name] if not installed(module)]
        if missing:
            yield (
                f"{field}: {name} needs {', '.join(missing)}, not installed here; "
                f"pip install 'sqft-export[{extra}]', or remove {name}"
            )


def _logger_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    for name in recipe.log:
        if not installed(name):
            yield f"log: found {name}, not installed here; pip install {name}, or remove {name}"


def _graph_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    if "onnx" not in recipe.export.targets or recipe.export.onnx_graph != "fused":
        return
    config = transformers_config(layout.config, "config.json").to_dict()
    if lacks := builder_lacks(layout.family, deployed_config(config)):
        yield (
            f"export.onnx_graph: found fused, but ONNX Runtime GenAI's builder {lacks}; use "
            "standard, or auto"
        )


def _gguf_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield the settings of the grid that llama.cpp's blocks cannot store."""
    if "gguf" not in recipe.export.targets:
        return
    for fault in _gguf_grid_faults(recipe, layout):
        yield f"export.targets: found gguf, but {fault}; or remove gguf"


def _gguf_grid_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    quantize = recipe.quantize
    if quantize.method == "none":
        return
    if not quantize.symmetric:
        if quantize.bits == 8 or quantize.embedding_bits:
            yield "llama.cpp has no asymmetric INT8; set quantize.symmetric: true"
        if quantize.method in ("nncf", "existing"):
            yield (
                f"its blocks cannot hold the asymmetric scales of {quantize.method} exactly; "
                "set quantize.symmetric: true, or method: gptq"
            )
        if recipe.adapt and recipe.adapt.trainable_scales:
            yield "its blocks cannot hold trained scales; set adapt.trainable_scales: false"
    if quantize.method == "nncf" and quantize.nncf.int4_ratio < 1:
        yield "llama.cpp has no asymmetric INT8, which nncf.int4_ratio below 1 uses; set it to 1"
    sizes = group_sizes(recipe, layout)
    if quantize.embedding_bits:
        width = layout.embedding[1]
        sizes = sizes | {layout.family.embedding: width}
    for name, size in sizes.items():
        inputs = layout.linears[name][1] if name in layout.linears else size
        if why := why_no_blocks(inputs, size):
            yield f"{name} has {why}; set quantize.group_size to 32, 64 or 128"
            return


def _row_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a fault if the benchmark would have no row."""
    missing = [why_not_run(name, recipe.unmerged) for name in recipe.export.measured]
    if not recipe.benchmark.baselines and all(missing):
        reasons = "; ".join(dict.fromkeys(map(str, missing)))
        yield f"benchmark.baselines: found [], and no deployment can be run here ({reasons})"


def _accelerator_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    if recipe.device in ("auto", "cpu"):
        return
    from sqft_export.machine.device import device_of

    try:
        device_of(recipe.device)
    except UserError as error:
        yield str(error)


def _lm_eval_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    tasks = recipe.benchmark.lm_eval
    if not tasks:
        return
    if not installed("lm_eval"):
        yield "benchmark.lm_eval: lm-eval is not installed; pip install 'sqft-export[lm-eval]'"
        return
    folder = recipe.lm_eval_folder
    if folder and not folder.is_dir():
        yield f"benchmark.lm_eval_folder: no such folder: {folder}"
        return
    for path in entries_of(folder) if folder else ():
        if not path.is_dir() and (fault := fault_of_file(path)):
            yield f"benchmark.lm_eval_folder: {one_line(path)}: {fault}"
            return
    from sqft_export.measure.harness import unknown_tasks

    if unknown := unknown_tasks(tasks, folder):
        yield f"benchmark.lm_eval: found {', '.join(unknown)}, which lm-eval does not have"


def _device_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield the requested devices that no runtime of the recipe supports on this machine."""
    wanted = [d for d in recipe.benchmark.targets if d not in ("auto", "cpu")]
    found = devices() if wanted else []
    runtimes = {*recipe.export.targets, "torch"}
    for kind in wanted:
        candidates = [d for d in found if d.kind == kind and d.runtime in runtimes]
        if all(device.missing for device in candidates):
            reasons = "; ".join(f"{d.runtime} ({d.name}): {d.missing}" for d in candidates)
            yield (
                f"benchmark.targets: found {kind}, which no runtime supports on this machine "
                f"({reasons or 'no runtime of export.targets has such a device'}); auto uses all "
                "available devices"
            )


CHECKS: tuple[FaultFinder, ...] = (
    _task_faults,
    tokenizer_faults,
    _calibration_faults,
    _target_module_faults,
    expert_faults,
    _override_faults,
    _pattern_faults,
    _group_size_faults,
    _existing_grid_faults,
    _search_faults,
    _package_faults,
    _logger_faults,
    _graph_faults,
    target_faults,
    _gguf_faults,
    token_faults,
    _row_faults,
    peer_faults,
    _accelerator_faults,
    _device_faults,
    _lm_eval_faults,
    gate_faults,
)
DATA_CHECKS: tuple[FaultFinder, ...] = (
    answer_faults,
    cut_answer_faults,
    chat_faults,
    packing_faults,
    rendering_faults,
    context_faults,
)
