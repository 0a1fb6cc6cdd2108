"""`sqft-export benchmark`: measure deployments on the device that they were copied to.

Needs only the runtime: no torch, no recipe, no network. Each folder is measured in a separate
process. Folders are interleaved, and every second round reverses their order, so that a slow moment
of the machine affects all of them. Definitions:

    load       from the folder to a session that can answer
    TTFT       the forward pass over the prompt and the argmax of the first token, batch 1
    TPOT       one forward pass over one token and the argmax of the next, batch 1
    tokens/s   new tokens of all rows of a batch over the time of their passes, without prefill
    agreement  on the tokens of a task or text: the share with the same argmax as the first folder,
               and the KL divergence from the first folder, in nats per token
    memory     peak: of the process, runtime included; steady: resident after the last answer
    device     the largest amount of a GPU's memory that loading and passes took, by NVML
    energy     of the device over all passes, if RAPL (processor) or NVML (NVIDIA) reports it
    power      this energy over the time of the passes

Every process runs unmeasured warm-up passes for each prompt length and batch size: GPUs compile
their kernels in them. A pass ends when its logits or its argmax token are in the process's own
memory, so the clock stops after the device is done.
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from sqft_export.data.datasets import missing_sets
from sqft_export.data.items import Item, held_out, stop_ids
from sqft_export.data.scoring import ScoringRequest, judge, questions
from sqft_export.errors import UserError
from sqft_export.kernels.choice import STOCK
from sqft_export.kernels.extension import require_kernels
from sqft_export.kernels.ir import is_specialized
from sqft_export.machine.counters import machine_facts
from sqft_export.machine.host import distribution_of, installed
from sqft_export.measure.agreement import ReferenceModels
from sqft_export.measure.comparable import write_comparable
from sqft_export.measure.jobs import (
    MeasuredModel,
    Profile,
    ProfileRequest,
    Requests,
    WorkerResult,
    requested,
)
from sqft_export.measure.results import (
    DeploymentResults,
    DeviceSettings,
    Figure,
    FigureRatio,
    FolderAccuracy,
    FolderAgreement,
    FolderResults,
    Percentiles,
    Runtime,
    TaskMetrics,
)
from sqft_export.measure.rows import answer_entry, interval_field, measure_accuracy
from sqft_export.measure.statistics import bootstrap_ratio, percentiles
from sqft_export.measure.worker import measure_in_process
from sqft_export.model.checkpoint import file_bytes
from sqft_export.packed.execution import resolve_execution
from sqft_export.recipe.schema import DATASET_NAMES, Dataset, Recipe, Text
from sqft_export.targets.devices import find_device
from sqft_export.targets.execution import kernel_notes, kernels_title, why_not_our_kernels
from sqft_export.targets.folder import (
    GRAPHS,
    check_files,
    context_of,
    kind_of,
    number_in_config,
    vocabulary_of,
)
from sqft_export.targets.gguf.bindings import binding_module
from sqft_export.targets.gguf.quantizer import fallback_notes
from sqft_export.untrusted import MAX_IR_BYTES, read_bounded

NOT_SIGNIFICANT = "the 95 % interval contains 1: not significantly different"
MIN_ROUNDS = 5  # a bootstrap interval over fewer rounds is not reliable
TOO_FEW_ROUNDS = f"fewer than {MIN_ROUNDS} rounds: no verdict"


def names_of(folders: list[Path]) -> list[str]:
    """Return short unique names of the folders: the parts of their paths that differ.

    :raises UserError: if a folder is given twice.
    """
    parts = [list(folder.resolve().parts) for folder in folders]
    if len({tuple(p) for p in parts}) < len(parts):
        raise UserError(f"{folders[0]}: found the same folder twice; every folder is compared once")
    if len(folders) == 1:
        return [folders[0].name]
    while len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


@dataclass(frozen=True)
class MeasuredFolder:
    """A deployment folder and the kernels that it runs on."""

    folder: Path
    execution: str = "stock"


def _runtime(folder: Path) -> Runtime:
    return cast(Runtime, kind_of(folder))


def _model(measured: MeasuredFolder, settings: DeviceSettings) -> MeasuredModel:
    """Return a folder as the model of a worker's job."""
    return MeasuredModel(
        kind=_runtime(measured.folder),
        folder=measured.folder,
        execution=measured.execution,
        threads=settings.threads,
        device=settings.device,
    )


def _measured_folders(
    folders: list[Path], settings: DeviceSettings, names: list[str]
) -> dict[str, MeasuredFolder]:
    """Return every folder under its name, once per requested kind of kernels that it can run on.

    A specialized folder states its own kernels and is measured once, as is a GGUF folder if our
    kernels can't run in the installed llama.cpp.

    :param names: short unique name of every folder.
    :raises UserError: if the kernels are not available, or the device has its own.
    """
    wanted = [resolve_execution(kernels) for kernels in settings.execution]
    if set(wanted) != {STOCK}:
        if settings.device != "cpu":
            raise UserError(
                f"--execution: found {wanted}; {settings.device} has its own kernels, allowed "
                f"is {STOCK}"
            )
        if any(kind_of(folder) == "openvino" for folder in folders):
            require_kernels()
    found = {}
    for name, folder in zip(names, folders, strict=True):
        check_files(folder)
        fixed = not _has_several_kernels(folder)
        for kernels in [STOCK] if fixed else wanted:
            title = kernels_title(kind_of(folder), kernels)
            label = name if fixed or wanted == [STOCK] else f"{name}, {title}"
            found[label] = MeasuredFolder(folder, kernels)
    return found


def _has_several_kernels(folder: Path) -> bool:
    """Return whether a folder runs on both the runtime's kernels and ours."""
    if kind_of(folder) == "gguf":
        return why_not_our_kernels(folder) is None
    return kind_of(folder) == "openvino" and not is_specialized(
        read_bounded(folder / GRAPHS["openvino"], MAX_IR_BYTES)
    )


def measure_latencies(
    folders: dict[str, MeasuredFolder], settings: DeviceSettings, vocabulary: dict[str, int]
) -> dict[str, list[WorkerResult]]:
    """Return the worker's results of every folder, one entry per round."""
    found: dict[str, list[WorkerResult]] = {name: [] for name in folders}
    for number in range(settings.rounds):
        order = list(folders.items())
        for name, folder in order if number % 2 == 0 else order[::-1]:
            request = ProfileRequest(
                prompt_tokens=settings.prompt_tokens,
                new_tokens=settings.new_tokens,
                batches=settings.batches,
                vocabulary=vocabulary[name],
                device=settings.device,
                cpus=settings.cpus,
            )
            result = measure_in_process(_model(folder, settings), Requests(profile=request))
            found[name].append(result)
    return found


def _percentiles(samples: list[float]) -> Percentiles:
    median, p90, p99 = percentiles(samples, 50, 90, 99)
    return Percentiles(median=median, p90=p90, p99=p99)


def _profiles(runs: list[WorkerResult]) -> list[Profile]:
    return [requested(run.profile) for run in runs]


def _median_rates(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return batch size -> median over all rounds."""
    return {batch: float(np.median([one[batch] for one in rounds])) for batch in rounds[0]}


def summarize(
    measured: MeasuredFolder, runs: list[WorkerResult], wanted: Collection[str] = (STOCK,)
) -> FolderResults:
    """Return medians and percentiles over all rounds of one folder.

    :param wanted: requested kernels.
    """
    profiles = _profiles(runs)
    known = [one for one in profiles if one.energy_joules is not None]
    joules = sum(one.energy_joules or 0.0 for one in known)
    all_known = len(known) == len(runs)
    on_device = [run.device_memory_bytes for run in runs if run.device_memory_bytes is not None]
    return FolderResults(
        runtime=_runtime(measured.folder),
        file_bytes=file_bytes(measured.folder),
        load_seconds=_percentiles([run.load_seconds for run in runs]),
        ttft_ms={
            length: _percentiles([s for one in profiles for s in one.ttft_ms[length]])
            for length in profiles[0].ttft_ms
        },
        tpot_ms=_percentiles([s for one in profiles for s in one.tpot_ms]),
        tokens_per_second=_median_rates([one.tokens_per_second for one in profiles]),
        prompt_tokens_per_second=_median_rates([one.prompt_tokens_per_second for one in profiles]),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        steady_memory_bytes=int(np.median([run.steady_memory_bytes for run in runs])),
        joules_per_token=joules / sum(one.passes for one in known) if all_known else None,
        watts=joules / sum(one.seconds for one in known) if all_known else None,
        device_memory_bytes=max(on_device, default=None),
        notes=[*_notes(measured, wanted), *filter(None, [runs[0].placement])],
    )


def _notes(measured: MeasuredFolder, wanted: Collection[str]) -> list[str]:
    """Return the notes about a deployment's files and its llama.cpp.

    Reading a GGUF file needs the gguf package.

    :param wanted: requested kernels.
    """
    folder = measured.folder
    file = folder / GRAPHS["gguf"]
    about_file = fallback_notes(file) if file.is_file() and installed("gguf") else []
    requested_ours = set(wanted) != {STOCK}
    missing = why_not_our_kernels(folder) if requested_ours and file.is_file() else None
    return about_file + kernel_notes(folder, measured.execution, missing)


def _medians(runs: list[WorkerResult], figure: str) -> list[float]:
    """Return one number per round: seconds of ``load``, or median milliseconds."""
    if figure == "load":
        return [run.load_seconds for run in runs]
    profiles = _profiles(runs)
    if figure == "tpot":
        return [float(np.median(one.tpot_ms)) for one in profiles]
    first = next(iter(profiles[0].ttft_ms))
    return [float(np.median(one.ttft_ms[first])) for one in profiles]


def _warning(low: float, high: float, rounds: int) -> str | None:
    if rounds < MIN_ROUNDS:
        return TOO_FEW_ROUNDS
    return NOT_SIGNIFICANT if low <= 1 <= high else None


def ratios(found: dict[str, list[WorkerResult]]) -> list[FigureRatio]:
    """Compare the medians of load time, TTFT and TPOT of every folder with the first one."""
    first, *others = found
    found_ratios = []
    for name in others:
        for figure in get_args(Figure):
            one, other = _medians(found[name], figure), _medians(found[first], figure)
            low, high = bootstrap_ratio(one, other)
            ratio = float(np.median(one) / np.median(other))
            found_ratios.append(
                FigureRatio(
                    folder=name,
                    over=first,
                    figure=figure,
                    ratio=ratio,
                    low=low,
                    high=high,
                    warning=_warning(low, high, len(one)),
                )
            )
    return found_ratios


@dataclass(frozen=True)
class Questions:
    """Requests that measure accuracy, and what is needed to judge the answers.

    requests: the result of ``scoring.questions``, for the worker.
    """

    recipe: Recipe
    items: list[Item]
    tokenizer: "_Tokenizer"
    requests: ScoringRequest


class _Tokenizer:
    """A tokenizer from ``tokenizer.json`` through the tokenizers library, without transformers."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{folder}: no tokenizer.json; --task and --text need it")
        self.backend_tokenizer = Tokenizer.from_file(str(file))
        self.pad_token_id = number_in_config(folder, "pad_token_id")
        self.eos_token_id = number_in_config(folder, "eos_token_id")
        self.bos_token_id = number_in_config(folder, "bos_token_id")

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, list]:
        """Return ``input_ids`` of a text, or of every text of a list."""
        texts = [text] if isinstance(text, str) else text
        found = self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids = [one.ids for one in found]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def decode(
        self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """Decode as transformers does; the tokenizers library cannot clean up spaces."""
        assert not clean_up_tokenization_spaces
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def questions_of(
    folder: Path, task: str | None, data: Path | None, text: Path | None, items: int
) -> Questions | None:
    """Return the requests of a task or a text file, tokenized by the folder's tokenizer.

    :param task: name of a dataset; None: use ``text``. Returns None if both are None.
    :param data: local folder of the dataset; None: the default one.
    :param text: text file; its second half is split into windows and scored.
    :param items: largest number of items or windows.
    :raises UserError: if both are given, the data cannot be read, or no item fits into the context.
    """
    if task is None and text is None:
        return None
    if task is not None and text is not None:
        raise UserError("--task and --text: found both; only one of them is allowed")
    section = _text_section(text) if text else _dataset_section(str(task), data)
    recipe = Recipe.model_construct(task=section)  # type: ignore[call-arg]  # only its task is read
    tokenizer = _Tokenizer(folder)
    context = context_of(folder) or sys.maxsize
    if isinstance(section, Dataset):
        _check_data(section)
    found = held_out(recipe, tokenizer)
    chosen = [item for item in found if len(item.ids) <= context][:items]
    if not chosen:
        raise UserError(f"{folder}: no item fits into the model's context of {context} tokens")
    stop = stop_ids(folder, tokenizer)
    requests = questions(recipe, chosen, stop, tokenizer, context_of(folder))
    return Questions(recipe, chosen, tokenizer, requests)


def _text_section(file: Path) -> Text:
    return Text(kind="text", text=str(file.resolve()), test_share=0.5)


def _dataset_section(name: str, data: Path | None) -> Dataset:
    """Return the task section of a dataset. Only its test sets are read.

    :raises UserError: if there is no dataset of that name.
    """
    local = str(data.resolve()) if data else None
    try:
        return Dataset.model_validate({"kind": "dataset", "name": name, "folder": local})
    except ValueError as error:
        names = ", ".join(DATASET_NAMES)
        raise UserError(f"--task: found {name!r}; allowed are {names}") from error


def _check_data(section: Dataset) -> None:
    """Check that the test sets are complete. Training sets are not needed.

    :raises UserError: if a test set is missing.
    """
    folder = Path(section.folder) if section.folder else None
    if faults := list(missing_sets(section, folder, splits=("test",))):
        raise UserError("\n".join(f"benchmark: {fault}" for fault in faults))


def write_results(document: DeploymentResults, out: Path) -> None:
    """Write ``results.json``, ``items.jsonl`` with every answer, and a JSON per deployment."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "items.jsonl").open("w") as log:
        for row in document.accuracy:
            for number, item in enumerate(row.items):
                entry = {"folder": row.folder, "item": number} | item.to_json()
                log.write(json.dumps(entry) + "\n")
    (out / "results.json").write_text(json.dumps(document.to_json(), indent=2) + "\n")
    write_comparable(document, out)


def score_folders(
    folders: dict[str, MeasuredFolder], questions: Questions, settings: DeviceSettings
) -> tuple[list[FolderAccuracy], list[FolderAgreement]]:
    """Return the accuracy of every folder, and the agreement of all others with the first one.

    Each folder is loaded once for both.
    """
    rows, agreements = list[FolderAccuracy](), list[FolderAgreement]()
    first_right: list[bool] = []
    with tempfile.TemporaryDirectory() as scratch:
        comparison = ReferenceModels(Path(scratch), questions.items)
        for name, folder in folders.items():
            wanted = Requests(questions=questions.requests, distributions=comparison.request())
            scores = requested(measure_in_process(_model(folder, settings), wanted).scores)
            judged = judge(questions.recipe, questions.items, scores, questions.tokenizer)
            first_right = first_right or [answer.right for answer in judged]
            rows.append(
                FolderAccuracy(
                    folder=name,
                    perplexity=scores.perplexity,
                    **interval_field(scores),
                    **dict(measure_accuracy(judged, scores, first_right)),
                    items=[answer_entry(answer) for answer in judged],
                )
            )
            found = comparison.compare("first")["first"]
            agreements.append(FolderAgreement(folder=name, **dict(found)))
    return rows, agreements[1:]


def benchmark_folders(
    folders: list[Path],
    settings: DeviceSettings,
    questions: Questions | None = None,
    lm_eval: dict[str, TaskMetrics] | None = None,
    sources: Mapping[Path, Path] | None = None,
) -> DeploymentResults:
    """Measure deployments and return the document of ``results.json``.

    :param questions: requests that measure accuracy; None: measure latency, memory and energy only.
    :param lm_eval: lm-eval results to include in the document.
    :param sources: temporary folder -> the user's path, shown as its name (``measure.against``).
    :raises UserError: if a folder is no deployment, a measurement fails, or a runtime does not
        support the device.
    """
    names = names_of([(sources or {}).get(folder, folder) for folder in folders])
    named = _measured_folders(folders, settings, names)
    kinds = {name: kind_of(measured.folder) for name, measured in named.items()}
    sizes = {name: vocabulary_of(measured.folder) for name, measured in named.items()}
    _check_processors(settings.cpus)
    for kind in sorted(set(kinds.values())):
        find_device(kind, settings.device)
    settings = _drop_long_prompts(settings, folders)
    found = measure_latencies(named, settings, sizes)
    document = DeploymentResults(
        machine=machine_facts(),
        versions=runtime_versions(set(kinds.values())),
        settings=settings,
        folders={
            name: summarize(named[name], runs, settings.execution) for name, runs in found.items()
        },
        ratios=ratios(found),
    )
    if lm_eval:
        document = document.model_copy(update={"lm_eval": lm_eval})
    if questions is None:
        return document
    accuracy, agreement = score_folders(named, questions, settings)
    return document.model_copy(update={"accuracy": accuracy, "agreement": agreement})


def _check_processors(cpus: tuple[int, ...] | None) -> None:
    """Refuse processors that this machine lacks or can't bind a process to."""
    if cpus and not hasattr(os, "sched_setaffinity"):
        raise UserError(f"--cpus: {platform.system()} can't bind a process to processors; leave it")
    if cpus and not set(cpus) <= set(range(os.cpu_count() or 1)):
        last = (os.cpu_count() or 1) - 1
        raise UserError(f"--cpus: found {list(cpus)}; this machine has 0 to {last}")


def _drop_long_prompts(settings: DeviceSettings, folders: list[Path]) -> DeviceSettings:
    """Return the settings without prompts that are too long for one of the models.

    :raises UserError: if no prompt length is left.
    """
    contexts = [context_of(folder) for folder in folders]
    shortest = min((c for c in contexts if c is not None), default=sys.maxsize)
    fitting = tuple(n for n in settings.prompt_tokens if n + settings.new_tokens <= shortest)
    if not fitting:
        raise UserError(
            f"--prompt-tokens: found {list(settings.prompt_tokens)} with {settings.new_tokens} new "
            f"tokens; the context of a model is {shortest} tokens in total"
        )
    return replace(settings, prompt_tokens=fitting)


def runtime_versions(kinds: set[str]) -> dict[str, str]:
    """Return the versions of this package and of the packages of the runtimes."""
    modules = {
        "openvino": "openvino",
        "onnx": "onnxruntime",
        "web": "onnxruntime",
        "gguf": binding_module(),
        "torch": "torch",
    }
    found = map(distribution_of, ("sqft_export", *(modules[kind] for kind in sorted(kinds))))
    return {one.name: one.version for one in found}
