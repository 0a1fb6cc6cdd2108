"""Make a recipe from a model, a data file and the name of a preset.

The preset says how weights are compressed, and whether they are trained. The other settings follow
from the model, the data and the machine:

sequence length  the 99th percentile of the training examples, rounded up
new tokens       the same of the answers
steps            three epochs, up to ten if they have fewer than 100 steps; 5 % of them warmup
batch            16 examples per step, 8 or 4 if that gives fewer than 100 steps; in parts that fit
                 into this machine's memory
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqft_export.data.columns import kind_of_rows
from sqft_export.data.items import Item, load_tokenizer, sample_items
from sqft_export.data.tables import READERS, Table, suffix_of
from sqft_export.errors import UserError, one_line
from sqft_export.machine.counters import machine_facts
from sqft_export.model.chat import has_template
from sqft_export.model.contexts import context_length
from sqft_export.model.hub import model_folder
from sqft_export.plan.layout import Layout, layout_of
from sqft_export.plan.memory import predict_memory
from sqft_export.plan.presets import (
    DEFAULT_PRESET,
    EPOCHS,
    MIN_STEPS,
    MOST_EPOCHS,
    STEP_EXAMPLES,
    SectionMapping,
    preset_sections,
)
from sqft_export.plan.workload import Workload, workload_of
from sqft_export.recipe.load import parse_recipe
from sqft_export.recipe.schema import BUILTIN, DATASET_NAMES, HUB, Model, Recipe
from sqft_export.recipe.writing import recipe_text
from sqft_export.textfiles import read_json
from sqft_export.untrusted import real_path

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TEXT_SUFFIXES = (".txt", ".md", ".text")
# For a model without a chat template; its end token ends every answer.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'System: ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Names of columns that people use in place of ours.
COLUMN_NAMES: tuple[dict[str, str], ...] = (
    {},
    {"prompt": "question", "answer": "answer"},
    {"prompt": "question", "answer": "response"},
    {"prompt": "prompt", "answer": "response"},
    {"prompt": "instruction", "answer": "response"},
    {"prompt": "input", "answer": "output"},
    {"messages": "conversation"},
    {"messages": "dialogue"},
)
# Names of files in a data folder, without file types; the first held-out one is the test data.
SPLIT_FILES = ("train", "test", "valid", "validation")
SPLITS_OF_DATASET = "dataset_dict.json"  # in a folder that save_to_disk wrote
COUNTED_ITEMS = 1000  # whose lengths are counted
WARMUP_SHARE = 0.05
LENGTH_MULTIPLE = 32
MIN_LENGTH, MAX_LENGTH = 64, 2048
ANSWER_MULTIPLE = 16
MIN_ANSWER, MAX_ANSWER = 16, 512
SMALL_WEIGHTS, LARGE_WEIGHTS = 20e6, 3e9  # of the decoder's Linears
EMBEDDING_SHARE = 0.2  # of all weights; a larger embedding goes to INT8
MEMORY_SHARE = 0.6  # of the machine's memory that training may take
# Examples per batch, and gradient checkpointing; the fastest first.
BATCHES = (
    *((16, False), (8, False), (4, False)),
    *((8, True), (4, True), (2, True), (1, True)),
)


@dataclass(frozen=True)
class Request:
    """A model and data, in place of a recipe.

    model: folder, name on the hub, or builtin:tiny.
    data: file, save_to_disk folder, hub:<name>, or the name of a known dataset.
    test: held-out data; None: a part of ``data``.
    """

    model: str
    data: str
    test: str | None = None
    preset: str = DEFAULT_PRESET


def write_preset(request: Request) -> tuple[str, str]:
    """Return the name and the YAML text of the recipe of a request.

    A model on the hub is downloaded if needed: its tokenizer and sizes decide settings.

    :raises UserError: if the model, the data or the preset is unknown.
    """
    sections = preset_sections(request.preset)
    model = model_section(request.model)
    name = run_name(model)
    place = Path(f"{name}.yaml")
    folder = _folder_of(model, place)
    draft = {
        "name": name,
        "model": model,
        "task": task_section(request, folder),
        **sections,
    }
    draft = _with_settings(draft, parse_recipe(recipe_text(draft, ""), place), folder)
    data = one_line(f"{request.model} on {request.data}")
    head = f"Preset {request.preset} for {data}. Run it: sqft-export run <this file>"
    return name, recipe_text(draft, head)


def model_section(model: str) -> dict[str, str]:
    """Return the recipe's section of a model: a folder or a name on the hub.

    :raises UserError: if it is neither.
    """
    if model.startswith(BUILTIN):
        return {"path": model}
    folder = Path(model)
    if (folder / "config.json").is_file():
        return {"path": str(real_path(folder))}
    if folder.is_dir():
        raise UserError(
            f"{model}: has no config.json, so it is not a Hugging Face model folder; for a run or "
            "a deployment use sqft-export chat, inspect or benchmark"
        )
    if HUB_NAME.fullmatch(model) and not folder.exists():
        return {"hub": model}
    raise UserError(
        f"{one_line(model)}: neither a model folder nor a name on the hub, such as "
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def run_name(model: dict[str, str]) -> str:
    """Return the name of a run: the last part of the model's name, as a recipe allows it."""
    source = model.get("hub") or model["path"].removeprefix(BUILTIN)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name).lstrip("._-")
    return name[:100] or "model"


def _folder_of(model: dict[str, str], place: Path) -> Path:
    section: Any = Model(**model)
    recipe = Recipe.model_construct(**{"model": section})
    recipe._file = place
    folder = model_folder(recipe, download=True)
    assert folder is not None
    return folder


def task_section(request: Request, folder: Path) -> SectionMapping:
    """Return the recipe's task, recognised by the data: a text, a known dataset, or conversations.

    :raises UserError: if the data is missing, or its columns are unknown.
    """
    request = _with_files_of_folder(request)
    data = request.data
    sources = [data] if request.test is None else [data, request.test]
    if data in DATASET_NAMES and not Path(data).exists():
        return {"kind": "dataset", "name": data}
    for source in sources:
        if not source.startswith(HUB) and not Path(source).exists():
            raise UserError(
                f"{one_line(source)}: no such data; give a file, {HUB}<dataset on the hub>, or one "
                f"of {', '.join(DATASET_NAMES)}"
            )
    if Path(data).suffix.lower() in TEXT_SUFFIXES:
        if request.test:
            raise UserError(f"{request.test}: of a text file, the end is held out; leave out test")
        return {"kind": "text", "text": str(real_path(Path(data)))}
    return _chat_section(request, folder)


def _with_files_of_folder(request: Request) -> Request:
    """Return the request with the training and test files of a data folder.

    Such a folder has ``train.<type>`` and may have ``test.<type>``, ``valid.<type>`` or
    ``validation.<type>``. A folder of ``save_to_disk`` with a test split is its own test data.

    :raises UserError: if two files have the same role.
    """
    folder = Path(request.data)
    if request.data.startswith(HUB) or not folder.is_dir():
        return request
    splits = folder / SPLITS_OF_DATASET
    if splits.is_file():
        has_test = "test" in read_json(splits).get("splits", [])
        return replace(request, test=request.test or (request.data if has_test else None))
    found = [file for file in sorted(folder.iterdir()) if suffix_of(file) in READERS]
    files = {role: [f for f in found if f.name.partition(".")[0] == role] for role in SPLIT_FILES}
    for role, named in files.items():
        if len(named) > 1:
            names = ", ".join(file.name for file in named)
            raise UserError(f"{request.data}: found {names}; one file per split is read: {role}")
    if not files["train"]:
        return request
    held_out = [str(named[0]) for role, named in files.items() if named and role != "train"]
    test = request.test or (held_out[0] if held_out else None)
    return replace(request, data=str(files["train"][0]), test=test)


def _chat_section(request: Request, folder: Path) -> SectionMapping:
    """Return a task of conversations; a model without a chat template gets a plain one."""
    section: SectionMapping = {"kind": "chat", "train": _absolute(request.data)}
    if request.test is not None:
        section["test"] = _absolute(request.test)
    if columns := _columns_of(section["train"]):
        section["columns"] = columns
    if not has_template(folder):
        start = "{{ bos_token }}" if _adds_start_token(folder) else ""
        section["template"] = start + PLAIN_CHAT_TEMPLATE
    return section


def _adds_start_token(folder: Path) -> bool:
    """Return whether the tokenizer adds its start token to a text, as llama.cpp then does too."""
    tokenizer = load_tokenizer(folder)
    return tokenizer.bos_token_id is not None and (
        tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    )


def _absolute(source: str) -> str:
    return source if source.startswith(HUB) else str(real_path(Path(source)))


def _columns_of(source: str) -> dict[str, str]:
    """Return the names of the data's columns, as our name -> theirs; {} if they are ours.

    :raises UserError: naming the columns found and those known.
    """
    number, row = next(iter(Table(source).rows()))
    place = f"{source}:{number}"
    for names in COLUMN_NAMES:
        renamed = {ours: theirs for ours, theirs in names.items() if ours != theirs}
        if set(names.values()) <= set(row) and _is_known(row, place, renamed):
            return renamed
    kind_of_rows(row, place, {})  # raises the error that lists the columns
    return {}


def _is_known(row: Mapping[str, object], place: str, names: dict[str, str]) -> bool:
    try:
        kind_of_rows(row, place, names)
    except UserError:
        return False
    return True


def _with_settings(draft: SectionMapping, recipe: Recipe, folder: Path) -> SectionMapping:
    """Return the draft with the settings that depend on model and data."""
    layout = layout_of(recipe, folder)
    context = context_length(layout.config) or MAX_LENGTH
    _, items = sample_items(recipe, load_tokenizer(folder), "train", COUNTED_ITEMS)
    made = {name: dict(part) if isinstance(part, dict) else part for name, part in draft.items()}
    length = sequence_length(items, context)
    made["task"]["sequence_length"] = made["calibration"]["sequence_length"] = length
    if "max_new_tokens" in type(recipe.task).model_fields:
        made["task"]["max_new_tokens"] = answer_length(items)
    made["quantize"] |= _grid_of(layout)
    workload = workload_of(recipe, folder)
    if workload.examples is not None:
        made["calibration"]["samples"] = min(recipe.calibration.samples, workload.examples)
    if recipe.adapt is not None:
        made["adapt"] |= _training_of(recipe, layout, workload, length)
    return made


def percentile(lengths: list[int], share: float = 0.99) -> int:
    """Return the smallest length that at least ``share`` of all lengths do not exceed."""
    return sorted(lengths)[max(0, math.ceil(share * len(lengths)) - 1)]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def sequence_length(items: list[Item], context: int) -> int:
    """Return the tokens per training example that 99 % of the items fit into."""
    found = _round_up(percentile([len(item.ids) for item in items]), LENGTH_MULTIPLE)
    return min(max(found, MIN_LENGTH), MAX_LENGTH, context)


def answer_length(items: list[Item]) -> int:
    """Return the new tokens that 99 % of the answers fit into."""
    found = _round_up(percentile([len(item.target) for item in items]), ANSWER_MULTIPLE)
    return min(max(found, MIN_ANSWER), MAX_ANSWER)


def _grid_of(layout: Layout) -> SectionMapping:
    """Return the grid settings of a model's size."""
    grid: SectionMapping = {"group_size": 128 if layout.weights > LARGE_WEIGHTS else 64}
    if layout.head > EMBEDDING_SHARE * (layout.weights + layout.others):
        grid["embedding_bits"] = 8
    return grid


def _training_of(recipe: Recipe, layout: Layout, workload: Workload, length: int) -> SectionMapping:
    """Return the training settings of a model's size and the number of examples."""
    step, epochs = step_and_epochs(workload.examples or 1)
    fitting, checkpointing = _fitting_batch(recipe, layout, workload, length)
    batch = min(step, fitting)
    steps = math.ceil(math.ceil((workload.examples or 1) / batch) / (step // batch)) * epochs
    settings: SectionMapping = {
        "learning_rate": 2e-3 if layout.weights < SMALL_WEIGHTS else 3e-4,
        "warmup_steps": max(1, round(WARMUP_SHARE * steps)),
        "epochs": epochs,
        "batch": batch,
        "accumulation": step // batch,
        "loss_on": "answer",
        "precision": "auto",
    }
    return settings | ({"gradient_checkpointing": True} if checkpointing else {})


def step_and_epochs(examples: int) -> tuple[int, int]:
    """Return the examples per optimizer step, and the epochs, for a number of training examples."""
    steps = (step for step in STEP_EXAMPLES if examples * EPOCHS >= MIN_STEPS * step)
    step = next(steps, STEP_EXAMPLES[-1])
    return step, min(max(EPOCHS, math.ceil(MIN_STEPS * step / examples)), MOST_EPOCHS)


def _fitting_batch(
    recipe: Recipe, layout: Layout, workload: Workload, length: int
) -> tuple[int, bool]:
    """Return the largest batch whose training fits into memory, and gradient checkpointing."""
    from sqft_export.machine.device import device_memory, device_of  # imports torch

    room = device_memory(device_of(recipe.device)) or MEMORY_SHARE * machine_facts().memory_bytes
    task = recipe.task.model_copy(update={"sequence_length": length})
    for batch, checkpointing in BATCHES:
        update = {"batch": batch, "gradient_checkpointing": checkpointing}
        adapt = recipe.training.model_copy(update=update)
        trial = recipe.model_copy(update={"task": task, "adapt": adapt})
        if predict_memory(trial, layout, workload)["adapt"] <= room:
            return batch, checkpointing
    return BATCHES[-1]
