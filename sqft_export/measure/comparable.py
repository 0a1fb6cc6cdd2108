"""One JSON per deployment with the field names of other tools, so that their users can compare.

``lm_eval``     lm-evaluation-harness, ``results_*.json``: ``results`` by task, with keys
                ``<metric>,<filter>`` and ``<metric>_stderr,<filter>``
``llm_bench``   OpenVINO GenAI, ``tools/llm_bench`` with ``--report_json``: ``metadata`` and
                ``perfdata``. Latencies are in milliseconds, ``compile_time`` is in seconds
``sqft_export`` this package, ``FolderResults`` and the results of accuracy and of the self-test
"""

import json
import math
import re
from pathlib import Path

from pydantic import JsonValue

from sqft_export.measure.results import DeploymentResults, FolderAccuracy, FolderResults

FIELD_NAME_SOURCES = {
    "lm_eval": "lm-evaluation-harness, results_*.json: results",
    "llm_bench": "openvino.genai, tools/llm_bench --report_json: metadata and perfdata",
    "sqft_export": "sqft-export benchmark, results.json",
}
JsonObject = dict[str, JsonValue]


def write_comparable(document: DeploymentResults, out: Path) -> None:
    """Write ``<deployment>.json`` for every deployment into a folder."""
    for name in document.folders:
        file = out / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json"
        file.write_text(json.dumps(comparable_document(document, name), indent=2) + "\n")


def comparable_document(document: DeploymentResults, name: str) -> JsonObject:
    """Return the figures of one deployment in the field names of other tools."""
    found, tasks = document.folders[name], dict[str, JsonValue]()
    accuracy = next((row for row in document.accuracy if row.folder == name), None)
    if accuracy:
        tasks |= _task_results(accuracy)
    scored = document.lm_eval.get(name.partition(", ")[0], {})  # the same for all kernels
    tasks |= {task: dict[str, JsonValue](figures) for task, figures in scored.items()}
    own: JsonObject = {"machine": document.machine.to_json(), "figures": found.to_json()}
    if accuracy:
        own["accuracy"] = {k: v for k, v in accuracy.to_json().items() if k != "items"}
    if reference := document.reference.get(name):
        own["reference"] = reference.to_json()
    return {
        "sources": dict(FIELD_NAME_SOURCES),
        "lm_eval": {"results": tasks, "config": {"model": found.runtime, "model_args": name}},
        "llm_bench": _llm_bench(document, name, found),
        "sqft_export": own,
    }


def _task_results(row: FolderAccuracy) -> JsonObject:
    """Return accuracy by task as lm-eval names it, with the standard error of the mean."""
    results: JsonObject = {}
    for task, found in row.accuracy_by_set.items():
        results[task or "task"] = {
            "acc,none": found.accuracy,
            "acc_stderr,none": _standard_error(found.accuracy, found.items),
            "acc_norm,none": found.accuracy_normalized,
            "acc_norm_stderr,none": _standard_error(found.accuracy_normalized, found.items),
            "perplexity,none": row.perplexity,
            "sample_len": found.items,
        }
    if not results:
        results["text"] = {"acc,none": row.accuracy, "perplexity,none": row.perplexity}
    return results


def _standard_error(share: float, items: int) -> float:
    """Return the standard error of a mean of zeros and ones."""
    return math.sqrt(share * (1 - share) / max(1, items - 1))


def _llm_bench(document: DeploymentResults, name: str, found: FolderResults) -> JsonObject:
    """Return latencies at batch 1, one entry per prompt length."""
    settings, tpot = document.settings, found.tpot_ms.median
    results: list[JsonValue] = []
    for number, (length, ttft) in enumerate(found.ttft_ms.items()):
        later = tpot * (settings.new_tokens - 1)
        results.append(
            {
                "iteration": 1,
                "prompt_idx": number,
                "input_size": int(length),
                "infer_count": settings.new_tokens,
                "output_size": settings.new_tokens,
                "generation_time": (ttft.median + later) / 1e3,
                "latency": (ttft.median + later) / settings.new_tokens,
                "first_latency": ttft.median,
                "second_avg_latency": tpot,
                "second_token_throughput": 1e3 / tpot,
            }
        )
    metadata: JsonObject = {
        "model": name,
        "framework": found.runtime,
        "device": settings.device.upper(),
        "num_beams": 1,
        "batch_size": 1,
    }
    perfdata: JsonObject = {"compile_time": found.load_seconds.median, "results": results}
    return {"metadata": metadata, "perfdata": perfdata}
