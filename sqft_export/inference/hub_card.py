"""Write the model card with which a deployment is published on the Hugging Face hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sqft_export.data.datasets import SETS, set_names
from sqft_export.inference.locate import Deployment
from sqft_export.machine.counters import MachineFacts
from sqft_export.recipe.schema import HUB, Dataset
from sqft_export.report.document import Report
from sqft_export.report.tables import cells
from sqft_export.report.text import markdown
from sqft_export.targets.folder import kind_of

LIBRARIES = {
    "openvino": "openvino",
    "onnx": "onnxruntime-genai",
    "gguf": "gguf",
    "web": "transformers.js",
    "torch": "transformers",
}
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_ORIGIN = re.compile(r"^## Origin$", re.MULTILINE)


@dataclass(frozen=True)
class CardFacts:
    """Facts about the model that the front matter of a card lists.

    base: name of the base model on the hub; None for a local model.
    license: of the base, ``unknown`` if its card has none.
    quantized: whether the weights have fewer bits than those of the base.
    datasets: names of the training data on the hub.
    """

    base: str | None
    license: str
    quantized: bool
    datasets: list[str]


def facts_of(report: Report, license: str) -> CardFacts:
    """Return the facts of a run."""
    model, quantize = _section(report, "model"), _section(report, "quantize")
    base = model.get("hub")
    return CardFacts(
        base=str(base) if base else None,
        license=license,
        quantized=quantize.get("method") != "none",
        datasets=_hub_datasets(_section(report, "task")),
    )


def _section(report: Report, name: str) -> Mapping[str, object]:
    found = report.recipe.get(name)
    return found if isinstance(found, Mapping) else {}


def _hub_datasets(task: Mapping[str, object]) -> list[str]:
    """Return the names of a task's training data on the hub; empty for local files."""
    if task.get("kind") == "dataset":
        names = set_names(Dataset.model_validate(dict(task)), "train")
        return sorted({found[0] for name in names if (found := SETS[name].hub)})
    train = str(task.get("train") or "")
    return [train.removeprefix(HUB)] if train.startswith(HUB) else []


def hub_card(card: str, found: Deployment, report: Report, facts: CardFacts) -> str:
    """Return the card of a deployment with the hub's front matter and the measured table.

    :param card: the card in the deployment's folder; its text is kept.
    """
    text = _FRONT_MATTER.sub("", card)
    table = _measured(found, report)
    place = _ORIGIN.search(text)
    at = place.start() if place else len(text)
    return _front_matter(found, report, facts) + text[:at] + table + text[at:]


def _front_matter(found: Deployment, report: Report, facts: CardFacts) -> str:
    """Return the YAML block that the hub reads, with the results as ``model-index``."""
    from huggingface_hub import EvalResult, ModelCardData

    row, results = found.row, []
    if row is not None:
        data = facts.datasets[0] if facts.datasets else "own data"
        measured = {"accuracy": row.accuracy, "perplexity": row.perplexity}
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=data,
                dataset_name=data,
                metric_type=name,
                metric_value=value,
            )
            for name, value in measured.items()
        ]
    name = str(report.recipe["name"])
    data = ModelCardData(
        base_model=facts.base,
        base_model_relation="quantized" if facts.quantized else "finetune",
        datasets=facts.datasets or None,
        license=None if facts.license == "unknown" else facts.license,
        library_name=LIBRARIES[kind_of(found.path)],
        metrics=["accuracy", "perplexity"] if row else None,
        pipeline_tag="text-generation",
        tags=["sqft", "sparse", "quantized"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data}\n---\n"


def _measured(found: Deployment, report: Report) -> str:
    """Return a section with the measured rows: the dense base, this deployment, and its peer."""
    measured = found.row
    if measured is None:
        return ""
    advice = report.recommendation
    compared = {advice.ours, advice.peer} if advice and advice.peer else set()
    shown = compared if measured.id in compared else {measured.id}
    rows = [row for row in report.rows if row.kind == "base" or row.id in shown]
    settings, machine = report.settings, _machine_text(report.machine)
    note = (
        f"Accuracy ({report.measure}) on {settings.items} held-out items, with its 95 % interval; "
        f"speed at batch 1 with {settings.threads} threads on {machine}."
    )
    first = report.verdict if measured.id in compared else None
    return f"## Measured\n\n{markdown(cells(rows), first)}\n{note}\n\n"


def _machine_text(machine: MachineFacts) -> str:
    memory = machine.memory_bytes / 2**30
    return f"{machine.processor}, {machine.cores} cores, {memory:.0f} GiB"
