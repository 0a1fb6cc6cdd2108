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
    energy     of the processor package over the measured passes, if the kernel reports it

Every process runs one unmeasured warm-up round.
"""

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.data.datasets import missing_sets
from sqft_export.data.items import held_out, stop_ids
from sqft_export.data.scoring import judge, questions
from sqft_export.errors import UserError
from sqft_export.kernels.choice import STOCK
from sqft_export.kernels.extension import require_kernels
from sqft_export.kernels.ir import is_specialized
from sqft_export.measure.agreement import ReferenceModels
from sqft_export.measure.machine import machine_facts
from sqft_export.measure.rows import accuracy_row, answer_entry
from sqft_export.measure.statistics import bootstrap_ratio, percentiles
from sqft_export.measure.worker import measure_in_process
from sqft_export.model.checkpoint import file_bytes
from sqft_export.packed.execution import resolve_execution
from sqft_export.run.host import installed
from sqft_export.targets.devices import find_device
from sqft_export.targets.folder import (
    GRAPHS,
    check_files,
    context_of,
    kind_of,
    number_in_config,
    vocabulary_of,
)
from sqft_export.untrusted import MAX_IR_BYTES, read_bounded

NOT_SIGNIFICANT = "the 95 % interval contains 1: not significantly different"
MIN_ROUNDS = 5  # a bootstrap interval over fewer rounds is not reliable
TOO_FEW_ROUNDS = f"fewer than {MIN_ROUNDS} rounds: no verdict"


@dataclass(frozen=True)
class DeviceSettings:
    """Settings of a benchmark of deployments.

    prompt_tokens: prompt lengths for TTFT. TPOT is measured after the first one. Lengths that do
    not fit into a model's context together with ``new_tokens`` are left out.
    batches: batch sizes for tokens/s.
    rounds: processes per folder.
    threads: CPU threads; None: the runtime's choice.
    cpus: processors that the process may use; None: any.
    execution: kernels that OpenVINO folders run on, see ``packed/execution.py``. Each is measured.
    """

    prompt_tokens: tuple[int, ...] = (32, 128, 512, 2048)
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 4, 16)
    rounds: int = 5
    threads: int | None = None
    cpus: tuple[int, ...] | None = None
    device: str = "cpu"
    execution: tuple[str, ...] = ("stock",)


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


def _job(measured: MeasuredFolder, settings: DeviceSettings) -> dict[str, Any]:
    """Return the part of a worker's job that all measurements of a folder share."""
    return {
        "kind": kind_of(measured.folder),
        "folder": str(measured.folder),
        "execution": measured.execution,
        "threads": settings.threads,
        "device": settings.device,
    }


def _measured_folders(folders: list[Path], settings: DeviceSettings) -> dict[str, MeasuredFolder]:
    """Return every folder under its name, an OpenVINO folder once per requested kind of kernels.

    A specialized folder states its own kernels and is measured once.

    :raises UserError: if the kernels are not available, or the device has its own.
    """
    requested = [resolve_execution(kernels) for kernels in settings.execution]
    if set(requested) != {STOCK}:
        if settings.device != "cpu":
            raise UserError(
                f"--execution: found {requested}; {settings.device} has its own kernels, allowed "
                f"is {STOCK}"
            )
        require_kernels()
    found = {}
    for name, folder in zip(names_of(folders), folders, strict=True):
        check_files(folder)
        fixed = kind_of(folder) != "openvino" or is_specialized(
            read_bounded(folder / GRAPHS["openvino"], MAX_IR_BYTES)
        )
        for kernels in [STOCK] if fixed else requested:
            label = name if fixed or requested == [STOCK] else f"{name}, {kernels}"
            found[label] = MeasuredFolder(folder, kernels)
    return found


def measure_latencies(
    folders: dict[str, MeasuredFolder], settings: DeviceSettings, vocabulary: dict[str, int]
) -> dict[str, list[dict[str, Any]]]:
    """Return the worker's results of every folder, one entry per round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for number in range(settings.rounds):
        order = list(folders.items())
        for name, folder in order if number % 2 == 0 else order[::-1]:
            job = {"vocabulary": vocabulary[name], "profile": asdict(settings)}
            found[name].append(measure_in_process(_job(folder, settings) | job))
    return found


def _spread(samples: list[float]) -> dict[str, float]:
    median, p90, p99 = percentiles(samples, 50, 90, 99)
    return {"median": median, "p90": p90, "p99": p99}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and percentiles over all rounds of one folder."""
    ttft = {
        length: _spread([s for run in runs for s in run["ttft_ms"][length]])
        for length in runs[0]["ttft_ms"]
    }
    energies = [run["energy_joules"] for run in runs]
    tokens = sum(run["passes"] for run in runs)
    known = [energy for energy in energies if energy is not None]
    return {
        "load_seconds": _spread([run["load_seconds"] for run in runs]),
        "ttft_ms": ttft,
        "tpot_ms": _spread([s for run in runs for s in run["tpot_ms"]]),
        "tokens_per_second": {
            batch: _spread([run["tokens_per_second"][batch] for run in runs])["median"]
            for batch in runs[0]["tokens_per_second"]
        },
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "steady_memory_bytes": int(np.median([run["steady_memory_bytes"] for run in runs])),
        "joules_per_token": sum(known) / tokens if len(known) == len(runs) else None,
    }


def _medians(runs: list[dict[str, Any]], figure: str) -> list[float]:
    """Return one number per round: seconds of ``load``, or median milliseconds."""
    if figure == "load":
        return [run["load_seconds"] for run in runs]
    if figure == "tpot":
        return [float(np.median(run["tpot_ms"])) for run in runs]
    first = next(iter(runs[0]["ttft_ms"]))
    return [float(np.median(run["ttft_ms"][first])) for run in runs]


def _warning(low: float, high: float, rounds: int) -> str | None:
    if rounds < MIN_ROUNDS:
        return TOO_FEW_ROUNDS
    return NOT_SIGNIFICANT if low <= 1 <= high else None


def ratios(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Compare load time, TTFT and TPOT of every folder with the first one.

    :return: the ratio of medians, its 95 % interval, and a warning if it is not significant.
    """
    first, *others = found
    found_ratios = []
    for name in others:
        for figure in ("load", "ttft", "tpot"):
            one, other = _medians(found[name], figure), _medians(found[first], figure)
            low, high = bootstrap_ratio(one, other)
            ratio = float(np.median(one) / np.median(other))
            found_ratios.append(
                {
                    "folder": name,
                    "over": first,
                    "figure": figure,
                    "ratio": ratio,
                    "low": low,
                    "high": high,
                    "warning": _warning(low, high, len(one)),
                }
            )
    return found_ratios


@dataclass(frozen=True)
class Questions:
    """Requests that measure accuracy, and what is needed to judge the answers.

    requests: the result of ``scoring.questions``, for the worker.
    """

    recipe: Any
    items: list[Any]
    tokenizer: Any
    requests: dict[str, Any]


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
    :param text: text file, split into windows.
    :param items: largest number of items or windows.
    :raises UserError: if both are given, the data cannot be read, or no item fits into the context.
    """
    if task is None and text is None:
        return None
    if task is not None and text is not None:
        raise UserError("--task and --text: found both; only one of them is allowed")
    from sqft_export.recipe.schema import Dataset, Recipe, Text

    section: Any
    if text is not None:
        section = Text(kind="text", text=str(text.resolve()), test_share=0.5)
    else:
        local = str(data.resolve()) if data else None
        try:
            # Only the test sets are read.
            section = Dataset(kind="dataset", name=task, folder=local)  # type: ignore[arg-type]
        except ValueError as error:
            names = ", ".join(Dataset.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]
            raise UserError(f"--task: found {task!r}; allowed are {names}") from error
    recipe = Recipe.model_construct(**{"task": section})
    tokenizer = _Tokenizer(folder)
    context = context_of(folder) or sys.maxsize
    if task is not None:
        _check_data(section)
    found = held_out(recipe, tokenizer)
    chosen = [item for item in found if len(item.ids) <= context][:items]
    if not chosen:
        raise UserError(f"{folder}: no item fits into the model's context of {context} tokens")
    stop = stop_ids(folder, tokenizer)
    requests = questions(recipe, chosen, stop, tokenizer, context_of(folder))
    return Questions(recipe, chosen, tokenizer, requests)


def _check_data(section: Any) -> None:
    """Check that the test sets are complete. Training sets are not needed.

    :raises UserError: if a test set is missing.
    """
    folder = Path(section.folder) if section.folder else None
    if faults := list(missing_sets(section, folder, splits=("test",))):
        raise UserError("\n".join(f"benchmark: {fault}" for fault in faults))


def write_results(document: dict[str, Any], out: Path) -> None:
    """Write ``results.json``, and ``items.jsonl`` with every answer of every folder."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "items.jsonl").open("w") as log:
        for row in document.get("accuracy", []):
            for number, item in enumerate(row["items"]):
                log.write(json.dumps({"folder": row["folder"], "item": number} | item) + "\n")
    (out / "results.json").write_text(json.dumps(document, indent=2) + "\n")


def score_folders(
    folders: dict[str, MeasuredFolder], questions: Questions, settings: DeviceSettings
) -> dict[str, list[dict[str, Any]]]:
    """Return ``accuracy`` of every folder with its interval, and ``agreement`` with the first one.

    Each folder is loaded once for both.
    """
    rows: list[dict[str, Any]] = []
    agreements: list[dict[str, Any]] = []
    first_right: list[bool] = []
    with tempfile.TemporaryDirectory() as scratch:
        comparison = ReferenceModels(Path(scratch), questions.items)
        for name, folder in folders.items():
            job = {"questions": questions.requests} | comparison.job_part()
            result = measure_in_process(_job(folder, settings) | job)
            judged = judge(questions.recipe, questions.items, result, questions.tokenizer)
            first_right = first_right or [answer.right for answer in judged]
            rows.append(
                {"folder": name, "perplexity": result["perplexity"]}
                | accuracy_row(judged, result, first_right)
                | {"items": [answer_entry(answer) for answer in judged]}
            )
            agreements.append({"folder": name} | comparison.compare("first")["first"])
    return {"accuracy": rows, "agreement": agreements[1:]}


def benchmark_folders(
    folders: list[Path], settings: DeviceSettings, questions: Questions | None = None
) -> dict[str, Any]:
    """Measure deployments and return the document of ``results.json``.

    :param questions: requests that measure accuracy; None: measure latency, memory and energy only.
    :raises UserError: if a folder is no deployment, a measurement fails, or a runtime does not
        support the device.
    """
    named = _measured_folders(folders, settings)
    kinds = {name: kind_of(measured.folder) for name, measured in named.items()}
    sizes = {name: vocabulary_of(measured.folder) for name, measured in named.items()}
    cpus = settings.cpus
    if cpus and not hasattr(os, "sched_setaffinity"):
        raise UserError(f"--cpus: {platform.system()} can't bind a process to processors; leave it")
    if cpus and not set(cpus) <= set(range(os.cpu_count() or 1)):
        last = (os.cpu_count() or 1) - 1
        raise UserError(f"--cpus: found {list(cpus)}; this machine has 0 to {last}")
    for kind in sorted(set(kinds.values())):
        find_device(kind, settings.device)
    settings = _drop_long_prompts(settings, folders)
    found = measure_latencies(named, settings, sizes)
    document = {
        "machine": machine_facts(),
        "versions": runtime_versions(set(kinds.values())),
        "settings": asdict(settings),
        "folders": {
            name: {"runtime": kinds[name], "file_bytes": file_bytes(named[name].folder)}
            | summarize(runs)
            for name, runs in found.items()
        },
        "ratios": ratios(found),
    }
    if questions is not None:
        document |= score_folders(named, questions, settings)
    return document


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
    """Return the versions of this package and of the libraries of the runtimes."""
    import importlib.metadata

    libraries = {
        "openvino": ("openvino",),
        "onnx": ("onnxruntime",),
        "gguf": ("cyllama" if installed("cyllama") else "llama_cpp_python",),
        "torch": ("torch",),
    }
    names = ["sqft-export", *(name for kind in sorted(kinds) for name in libraries[kind])]
    return {name: importlib.metadata.version(name) for name in names}
