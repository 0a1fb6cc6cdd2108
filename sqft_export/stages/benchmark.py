"""benchmark: score and time every row of the report on the same held-out items.

Each row runs in a separate process (``measure/worker.py``), one after the other, with the same
number of threads. Under a launcher, its processes split the scoring of the rows in torch.
Deployments run in the default precision of their runtime, not in the exact mode.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from sqft_export.artifacts.store import key_of
from sqft_export.data.conversations import first_places, held_out_conversations
from sqft_export.data.items import (
    SCORE_FIELDS,
    SCORE_FILES,
    TASK_FILES,
    TEST_FIELDS,
    Data,
    Item,
    answer_stops,
    first_of_every_set,
    load_tokenizer,
)
from sqft_export.data.scoring import Judged, ScoringRequest, judge, questions
from sqft_export.kernels.choice import STOCK
from sqft_export.machine.counters import machine_facts
from sqft_export.machine.device import device_of
from sqft_export.machine.host import allowed_processors
from sqft_export.machine.processes import Processes, join_processes
from sqft_export.measure.agreement import ReferenceModels
from sqft_export.measure.chance import GUESSING_PERPLEXITY, chance_accuracy, is_at_chance
from sqft_export.measure.jobs import (
    AdapterParts,
    LatencyRequest,
    LatencySamples,
    LmEvalRequest,
    MeasuredModel,
    Requests,
    TimedScores,
    WorkerResult,
    requested,
)
from sqft_export.measure.peers import PEER_STAGES, peer_p_values, peers_in
from sqft_export.measure.results import (
    DENSE,
    DENSE_LORA,
    MERGED,
    Agreement,
    BenchmarkResults,
    BenchmarkRow,
    BenchmarkSettings,
    RepeatedConversations,
    RowKind,
    Runtime,
)
from sqft_export.measure.rows import (
    TITLES,
    Row,
    answer_entry,
    deployments_in,
    interval_field,
    latency_spreads,
    measure_accuracy,
    stored_bytes,
)
from sqft_export.measure.samples import sample_answers
from sqft_export.measure.statistics import mcnemar
from sqft_export.measure.worker import measure_in_process
from sqft_export.metrics import (
    ExportMetrics,
    PeersMetrics,
    RowsMetrics,
    SparsityMetrics,
    read_metrics,
)
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.recipe.schema import Benchmark, Chat, Recipe
from sqft_export.recipe.sections import (
    AdaptSection,
    BenchmarkSection,
    DeviceSection,
    PeersSection,
    QuantizeSection,
    TaskSections,
)
from sqft_export.recipe.view import section_fields
from sqft_export.report.verdict import chance_text
from sqft_export.stages import BASE_FIELDS, Context
from sqft_export.targets.devices import DEVICE_KINDS, devices, why_not_run
from sqft_export.targets.execution import kernel_notes, why_not_our_kernels
from sqft_export.targets.folder import ADAPTER_FOLDER, context_of, runtime_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONSUMES: tuple[str, ...] = (
    "sparsify",
    "reconstruct",
    "quantize",
    "search",
    "merge",
    "export-openvino",
    "export-onnx",
    "export-gguf",
    "teacher",
    "baselines",
    *PEER_STAGES,
)
READS: tuple[str, ...] = ("model", "test", "device", "precision", "lm_eval_tasks", "score")
SETTINGS = (
    *section_fields("benchmark", Benchmark, without=("lm_eval_folder",)),
    # These decide the rows and their titles.
    *("quantize.bits", "quantize.reconstruct", "unmerged", "peers"),
)
FREE: tuple[str, ...] = ("device", "benchmark.lm_eval_folder", *TASK_FILES, *SCORE_FILES)
VERSION = 15
RESUMES = False
DISTRIBUTED = True  # the rows in torch


PILOT_ITEMS = 8  # items per set that are timed to estimate how many items fit into the minutes
# Kinds of rows that all later rows are compared with -> the field of the comparison.
REFERENCES: dict[RowKind, str] = {"base": "beside_dense", "merged": "beside_merged"}
# Id, kind, name, word in ``benchmark.baselines``, pass, and folder in its artifact.
BASELINES: tuple[tuple[str, RowKind, str, str, str, str], ...] = (
    (DENSE_LORA, "baseline", "dense + LoRA", "dense-lora", "teacher", "dense-lora"),
    ("sparse", "compressed", "sparse", "sparse", "sparsify", "model"),
    (
        "sparse-reconstructed",
        "compressed",
        "sparse, reconstructed",
        "sparse",
        "reconstruct",
        "model",
    ),
    (
        "sparse-quantized",
        "compressed",
        "sparse + {codes}",
        "sparse-quantized",
        "baselines",
        "sparse-quantized",
    ),
)
MOVABLE = (MERGED, *TITLES)  # ids of the rows that are also measured on other devices


class Sections(
    TaskSections,
    QuantizeSection,
    AdaptSection,
    DeviceSection,
    BenchmarkSection,
    PeersSection,
    Protocol,
):
    """The recipe sections that this pass reads."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the fields of the benchmark, the base, and the test items."""
    return (*SETTINGS, *BASE_FIELDS, *TEST_FIELDS, *SCORE_FIELDS)


def rows(context: Context[Sections]) -> list[Row]:
    """Return the rows of this recipe in the order of the passes."""
    wanted = context.recipe.benchmark.baselines
    table = [*_baselines(context), *_peers(context), *_tuned(context), *_deployments(context)]
    if "dense" in wanted:
        model = context.model
        table.insert(0, Row(DENSE, "base", "dense base", "torch", model, (model,), 0.0))
    if device_of(context.recipe.device).type != "cpu":
        table = [replace(r, device="gpu") if r.runtime == "torch" else r for r in table]
    return on_devices(table, context.recipe.benchmark.targets)


def _baselines(context: Context[Sections]) -> Iterator[Row]:
    """Yield the rows of models without the recipe's full pipeline."""
    wanted, quantize = context.recipe.benchmark.baselines, context.recipe.quantize
    codes = f"INT{quantize.bits}{', reconstructed' if quantize.reconstruct else ''}"
    for id, kind, name, word, stage, folder in BASELINES:
        if stage in context.inputs and word in wanted:
            path = context.inputs[stage].path / folder
            # Reconstruction keeps all zeros, so its sparsity is that of sparsify.
            sparsity = _sparsity(context, "sparsify" if stage == "reconstruct" else stage)
            yield Row(id, kind, name.format(codes=codes), "torch", path, (path,), sparsity)


def _sparsity(context: Context[Sections], stage: str) -> float:
    """Return the share of zero weights in the model of a pass."""
    return read_metrics(context.inputs[stage], SparsityMetrics).sparsity["all"]


def _tuned(context: Context[Sections]) -> Iterator[Row]:
    """Yield the torch rows of the deployed model: unmerged if it was tuned, and merged."""
    inputs, recipe = context.inputs, context.recipe
    wanted, merged = recipe.benchmark.baselines, inputs["merge"].path / "model"
    sparsity = _sparsity(context, "merge")
    if "adapted" in wanted and "search" in inputs:
        base = context.base()
        grids = base.grids.glob("grids*.safetensors") if base.grids else []
        stored = (base.folder, inputs["search"].path / "adapter", *grids)
        name = "tuned, unmerged"
        yield Row("adapted", "adapted", name, "torch", base.folder, stored, sparsity)
    if "merged" in wanted and not recipe.unmerged:
        yield Row(MERGED, "merged", "merged", "torch", merged, (merged,), sparsity)


def _deployments(context: Context[Sections]) -> Iterator[Row]:
    """Yield the rows of every deployment and its packed and sparse copies.

    The last one is the GGUF deployment on our kernels, if they can run in the installed llama.cpp.
    """
    recipe, sparsity, ours = context.recipe, _sparsity(context, "merge"), None
    for target in TITLES:
        if f"export-{target}" not in context.inputs or why_not_run(target, recipe.unmerged):
            continue
        artifact = context.inputs[f"export-{target}"].path
        for found in deployments_in(artifact, target):
            folder, stored = found.folder, (found.folder, found.folder / ADAPTER_FOLDER)
            row = Row(found.id, "deployment", found.name, target, folder, stored, sparsity)
            notes = _head_notes(context) if target == "gguf" else []
            plain = row.id == "gguf"
            missing = why_not_our_kernels(folder) if plain else None
            yield replace(row, notes=(*kernel_notes(folder, STOCK, missing), *notes))
            if plain and missing is None:
                ours = replace(row.on_our_kernels(), notes=(*kernel_notes(folder, "auto"), *notes))
    if ours is not None:
        yield ours


def _head_notes(context: Context[Sections]) -> list[str]:
    """Return the note about the output head of the GGUF file; none if it was not measured."""
    head = read_metrics(context.inputs["export-gguf"], ExportMetrics).head
    return [str(head)] if head else []


def _peers(context: Context[Sections]) -> Iterator[Row]:
    """Yield the rows of the dense base with LoRA that was quantized after training."""
    for stage in PEER_STAGES:
        made = context.inputs.get(stage)
        notes = read_metrics(made, PeersMetrics).notes if made else {}
        for found in peers_in(made.path) if made else ():
            runtime, folder = cast(Runtime, runtime_of(found.folder)), found.folder
            if why_not_run(runtime, False):
                continue
            yield Row(
                found.id,
                "peer",
                found.name,
                runtime,
                folder,
                (folder,),
                0.0,
                notes=(*notes.get(found.id, ()), *kernel_notes(folder, STOCK)),
            )


def on_devices(table: list[Row], targets: tuple[str, ...]) -> list[Row]:
    """Return the rows with one row per requested device for the merged model and deployments.

    Devices that this machine lacks are left out. All other rows keep the device that they have.

    :param targets: devices of the recipe: ``cpu``, ``auto``, or a kind of accelerator.
    """
    others = [d for d in DEVICE_KINDS[1:] if {d, "auto"} & set(targets)]
    available = {(d.runtime, d.kind) for d in devices() if d.missing is None} if others else set()
    made = [row for row in table if row.id in MOVABLE]
    on_others = [
        row.on(kind)
        for kind in others
        for row in made
        if (row.runtime, kind) in available and row.device != kind
    ]
    if {"cpu", "auto"} & set(targets):
        return table + on_others
    return [row for row in table if row not in made or row.device in targets] + on_others


def _model(context: Context[Sections], row: Row) -> MeasuredModel:
    """Return a row as the model of a worker's job."""
    parts = None
    if row.kind == "adapted":
        base, searched = context.base(), context.inputs["search"].path
        parts = AdapterParts(
            adapter=searched / "adapter",
            masks=base.masks,
            grids=base.grids,
            unmerged=base.unmerged,
        )
    precision = context.reads.get("precision")
    return MeasuredModel(
        kind="adapted" if parts else row.runtime,
        folder=row.folder,
        threads=threads(context.recipe),
        device=row.device,
        execution=row.execution,
        precision=str(precision) if precision else None,
        parts=parts,
    )


def threads(recipe: Sections) -> int:
    """Return the number of threads of every row: the recipe's, or all allowed processors."""
    return recipe.benchmark.threads or allowed_processors()


def run(context: Context[Sections]) -> RowsMetrics:
    """Write ``results.json``, and ``items.jsonl`` with every answer of every row."""
    tokenizer, table = load_tokenizer(context.model), rows(context)
    items = Data(context.recipe, tokenizer).test
    with join_processes(context.folder.name.partition(".")[0]) as processes:
        if not processes.is_first:
            _help_rows(context, table, items, tokenizer, processes)
            return RowsMetrics(rows=0, warnings=[])
        scored, measured = _measure_rows(context, table, items, tokenizer, processes)
    return _write(context, table, scored, measured, tokenizer)


def _write(
    context: Context[Sections],
    table: list[Row],
    items: list[Item],
    measured: "dict[str, _Measured]",
    tokenizer: "PreTrainedTokenizerBase",
) -> RowsMetrics:
    """Judge the answers of all rows and write the results."""
    recipe = context.recipe
    judged = {r.id: judge(recipe, items, measured[r.id].scores, tokenizer) for r in table}
    with (context.folder / "items.jsonl").open("w") as log:
        for row in table:
            for number, answer in enumerate(judged[row.id]):
                place = {"id": row.id, "row": row.name, "item": number}
                entry = place | answer_entry(answer).to_json()
                log.write(json.dumps(entry) + "\n")
    weights = Checkpoint(context.model).parameters
    results = [_result(row, weights, judged, measured[row.id]) for row in table]
    results = _add_shares_of_dense(results, chance_accuracy(items))
    document = BenchmarkResults(
        settings=_settings(recipe, items),
        machine=machine_facts(),
        rows=results,
        samples=sample_answers(table, judged, tokenizer),
    )
    text = json.dumps(document.to_json(), indent=2) + "\n"
    (context.folder / "results.json").write_text(text)
    return RowsMetrics(rows=len(results), warnings=_warnings(results, recipe.adapt is not None))


def _add_shares_of_dense(rows: list[BenchmarkRow], chance: float | None) -> list[BenchmarkRow]:
    """Return the rows with ``recovery``, the accuracy divided by that of the dense base.

    The dense base also gets ``chance`` and ``at_chance``. Rows stay unchanged without a dense base.
    They get no ``recovery`` if it is at chance level.

    :param chance: accuracy of guessing, or None if it is unknown.
    """
    if rows[0].kind != "base":
        return rows
    dense = rows[0].model_copy(update={"chance": chance})
    dense = dense.model_copy(update={"at_chance": is_at_chance(dense)})
    rows = [dense, *rows[1:]]
    if dense.at_chance or not dense.accuracy:
        return rows
    return [row.model_copy(update={"recovery": row.accuracy / dense.accuracy}) for row in rows]


@dataclass
class _Measured:
    """The results of a row's processes.

    first: of the process that scored the row.
    latencies: of every process.
    compared: field of the row -> comparison with a reference row.
    """

    first: WorkerResult
    latencies: list[LatencySamples]
    compared: dict[str, Agreement]

    @property
    def scores(self) -> TimedScores:
        return requested(self.first.scores)


def _result(
    row: Row, weights: int, judged: dict[str, list[Judged]], measured: _Measured
) -> BenchmarkRow:
    """Return the result of a row.

    Its answers are compared with those of the first row and with those of dense + LoRA.

    :param weights: number of weights of the base model.
    :param judged: row id -> judged answers.
    """
    first, lora = (
        [answer.right for answer in judged.get(other, [])]
        for other in (next(iter(judged)), DENSE_LORA)
    )
    right = [answer.right for answer in judged[row.id]]
    stored, (ttft, tpot) = stored_bytes(row.stored), latency_spreads(measured.latencies)
    result = BenchmarkRow(
        id=row.id,
        kind=row.kind,
        name=row.name,
        runtime=row.runtime,
        device=row.device,
        sparsity=row.sparsity,
        file_bytes=stored,
        bits_per_weight=8 * stored / weights,
        **dict(measure_accuracy(judged[row.id], measured.scores, first)),
        ttft=ttft,
        tpot=tpot,
        load_seconds=measured.first.load_seconds,
        perplexity=measured.scores.perplexity,
        **interval_field(measured.scores),
        token_accuracy=measured.scores.token_accuracy,
        score_seconds=measured.scores.seconds,
        steady_memory_bytes=measured.first.steady_memory_bytes,
        peak_memory_bytes=measured.first.peak_memory_bytes,
        p_same_as_lora=mcnemar(right, lora) if right and lora else None,
        p_same_as_peers=peer_p_values(right, judged) if row.kind == "deployment" else {},
        notes=list(row.notes),
    )
    return result.model_copy(update=measured.compared | _lm_eval_fields(measured.first))


def _lm_eval_fields(result: WorkerResult) -> dict[str, object]:
    """Return the fields of a row with lm-eval's metrics; none if they were not requested."""
    if result.lm_eval is None:
        return {}
    return {"lm_eval": result.lm_eval, "lm_eval_warnings": result.lm_eval_warnings}


def _lm_eval_request(recipe: Sections) -> LmEvalRequest | None:
    benchmark = recipe.benchmark
    if not benchmark.lm_eval:
        return None
    tasks, folder = list(benchmark.lm_eval), recipe.lm_eval_folder
    return LmEvalRequest(tasks=tasks, folder=folder, items=benchmark.items)


def _measure_rows(
    context: Context[Sections],
    table: list[Row],
    items: list[Item],
    tokenizer: "PreTrainedTokenizerBase",
    processes: Processes,
) -> tuple[list[Item], dict[str, _Measured]]:
    """Run every row in every round; return the scored items, and the results by row id.

    Rows are interleaved, and every second round reverses their order. A slow moment of the machine
    then affects all rows alike. The first process of a row also scores the items.
    """
    config, started = context.recipe.benchmark, time.monotonic()
    rounds, minutes = config.rounds, config.minutes
    scored = first_of_every_set(items, PILOT_ITEMS if minutes else config.items)
    run_row = _row_runner(context, (rounds + bool(minutes)) * len(table), processes)
    found: dict[str, _Measured] = {}
    latency, lm_eval = _latency_request(context.recipe, scored), _lm_eval_request(context.recipe)
    references = _References(context.folder, items, table)
    first = Requests(
        latency=latency,
        questions=_questions(context, tokenizer, scored),
        lm_eval=None if minutes else lm_eval,  # the minutes do not include lm-eval's tasks
        distributions=references.request,
    )
    for row in table:
        result = run_row(row, first)
        found[row.id] = _Measured(result, [requested(result.latency)], references.compare(row))
    for number in range(1, rounds):
        for row in table if number % 2 == 0 else table[::-1]:
            again = run_row(row, Requests(latency=latency))
            found[row.id].latencies.append(requested(again.latency))
    if minutes:
        left = 60 * minutes - (time.monotonic() - started)
        count = processes.from_first(lambda: _items_per_set(found, left))
        scored = first_of_every_set(items, count)
        final = Requests(questions=_questions(context, tokenizer, scored), lm_eval=lm_eval)
        for row in table:
            found[row.id].first = run_row(row, final)
    return scored, found


def _help_rows(
    context: Context[Sections],
    table: list[Row],
    items: list[Item],
    tokenizer: "PreTrainedTokenizerBase",
    processes: Processes,
) -> None:
    """Score a part of the rows in torch, as a process that is not the first."""
    minutes, lm_eval = context.recipe.benchmark.minutes, _lm_eval_request(context.recipe)
    scored = first_of_every_set(items, PILOT_ITEMS if minutes else context.recipe.benchmark.items)
    run_row = _row_runner(context, 0, processes)
    mine = [row for row in table if row.runtime == "torch"]
    first = _questions(context, tokenizer, scored)
    for row in mine:
        run_row(row, Requests(questions=first, lm_eval=None if minutes else lm_eval))
    if minutes:
        count = processes.from_first(lambda: PILOT_ITEMS)
        final = _questions(context, tokenizer, first_of_every_set(items, count))
        for row in mine:
            run_row(row, Requests(questions=final, lm_eval=lm_eval))


def _row_runner(
    context: Context[Sections], total: int, processes: Processes
) -> Callable[[Row, Requests], WorkerResult]:
    """Return a function that measures a row in a process.

    :param total: number of processes, one after the other.
    :param processes: processes that split the scoring of rows in torch. They start such a row
        together: before, another process would disturb the rows that the first one times.
    """
    advance, numbers = context.start(total), itertools.count()
    name = context.folder.name.partition(".")[0]
    scratch = context.folder if processes.is_first else None  # the first one seals the folder

    def run_row(row: Row, requests: Requests) -> WorkerResult:
        group = ""
        if processes.count > 1 and row.runtime == "torch" and requests.questions:
            group = f"{name}/{next(numbers)}"
            processes.gather(None)
        result = measure_in_process(_model(context, row), requests, scratch, group)
        advance(row.name)
        return result

    return run_row


def _latency_request(recipe: Sections, items: list[Item]) -> LatencyRequest:
    """Return the request for latencies; its prompt is the beginning of the items."""
    benchmark = recipe.benchmark
    ids = [token for item in items for token in item.ids]
    return LatencyRequest(
        prompt=ids[: benchmark.prompt_tokens],
        new_tokens=benchmark.new_tokens,
        repeats=benchmark.repeats,
    )


class _References:
    """Compare every row with the reference rows before it; nothing if the table has none.

    request: for a row's distributions.
    """

    def __init__(self, scratch: Path, items: list[Item], table: list[Row]):
        wanted = any(row.kind in REFERENCES for row in table)
        self._models = ReferenceModels(scratch, items) if wanted else None
        self.request = self._models.request() if self._models else None

    def compare(self, row: Row) -> dict[str, Agreement]:
        """Return field of the row -> comparison with a reference row."""
        return self._models.compare(REFERENCES.get(row.kind)) if self._models else {}


def _questions(
    context: Context[Sections], tokenizer: "PreTrainedTokenizerBase", items: list[Item]
) -> ScoringRequest:
    """Return the request that scores the items."""
    stop = answer_stops(context.recipe, context.model, tokenizer)
    return questions(context.recipe, items, stop, tokenizer, context_of(context.model))


def _items_per_set(found: dict[str, _Measured], seconds: float) -> int:
    """Return how many items of every set all rows together can score within a time.

    The estimate is linear in the time that the pilot items took.
    """
    pilot_seconds = sum(measured.scores.seconds for measured in found.values())
    return max(PILOT_ITEMS, int(PILOT_ITEMS * seconds / pilot_seconds))


def _warnings(results: list[BenchmarkRow], was_tuned: bool) -> list[str]:
    """Return a warning if tuning made the model worse, and if the base does not know the task."""
    found = []
    before = [row for row in results if row.kind == "compressed"][-1:]
    tuned = [row for row in results if row.kind in ("adapted", "merged") and was_tuned]
    for start, row in itertools.product(before, tuned):
        for figure, one, other, worse in _compared_figures(row, start):
            if worse:
                found.append(
                    f"tuning made the model worse: {figure} of {row.name!r} is {one:.4g}, that of "
                    f"{start.name!r} before tuning is {other:.4g}; try a lower adapt.learning_rate"
                )
    found += dict.fromkeys(warning for row in results for warning in row.lm_eval_warnings)
    for row in (row for row in results if row.kind == "base"):
        if row.perplexity > GUESSING_PERPLEXITY:
            found.append(
                f"the dense base has a perplexity of {row.perplexity:.0f} on the answers: it "
                "does not know this task or text; check the tokenizer and the prompts"
            )
        elif row.at_chance:
            found.append(f"{chance_text(row)}; check the tokenizer and the prompts")
    return found


def _compared_figures(
    row: BenchmarkRow, start: BenchmarkRow
) -> list[tuple[str, float, float, bool]]:
    """Return figure, its values in both rows, and whether a row is worse by more than noise.

    A perplexity is worse if it is more than 2 % higher. An accuracy is worse if it is below the
    confidence interval of ``start``.
    """
    risen = not row.perplexity <= 1.02 * start.perplexity  # NaN counts as worse
    fallen = row.accuracy < (start.interval[0] if start.interval else start.accuracy)
    return [
        ("perplexity", row.perplexity, start.perplexity, risen),
        ("accuracy", row.accuracy, start.accuracy, fallen),
    ]


def _repeated_conversations(recipe: Sections) -> RepeatedConversations | None:
    """Return how many test conversations are training conversations too; None for other tasks."""
    if not isinstance(recipe.task, Chat):
        return None
    _, seen = held_out_conversations(recipe, recipe.task)
    return RepeatedConversations(count=len(seen), places=first_places(seen))


def _settings(recipe: Sections, items: list[Item]) -> BenchmarkSettings:
    """Return the settings that the report prints, with a digest of the scored items."""
    scored = [[item.prompt, item.target, item.text] for item in items]
    return BenchmarkSettings(
        items=len(items),
        items_sha256=key_of({"items": scored}),
        threads=threads(recipe),
        rounds=recipe.benchmark.rounds,
        latency_prompt_tokens=recipe.benchmark.prompt_tokens,
        latency_new_tokens=recipe.benchmark.new_tokens,
        latency_repeats=recipe.benchmark.repeats,
        repeated=_repeated_conversations(recipe),
    )
