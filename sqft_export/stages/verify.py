"""verify: write the certificate. A failed check stops the run.

The checks are in the package ``verify``: fidelity (trained -> merged), storage (merged -> files)
and compute (files -> results of the runtimes). One layer is in memory at a time.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from sqft_export.adapters.evidence import CAPTURED_SEQUENCES, capture
from sqft_export.adapters.loading import load_compressed
from sqft_export.data.items import (
    TASK_FILES,
    TEST_FIELDS,
    Data,
    deployed_text,
    encode,
    load_tokenizer,
    sample_texts,
)
from sqft_export.machine.device import device_name, device_of
from sqft_export.metrics import VerifyMetrics
from sqft_export.model.chat import has_template
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.plan.readers import differing_texts
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.sections import (
    AdaptSection,
    DeviceSection,
    VerifySections,
)
from sqft_export.stages import BASE_FIELDS, Context
from sqft_export.targets.devices import why_not_exact, why_not_run
from sqft_export.targets.text_api import missing_for_chat
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.certify import certify
from sqft_export.verify.storage import TOKEN_IDS
from sqft_export.verify.subject import MASKED_PASSES, Asked, Subject
from sqft_export.verify.text_answers import first_chat

CONSUMES: tuple[str, ...] = (
    "sparsify",
    "reconstruct",
    "quantize",
    "search",
    "merge",
    "export-openvino",
    "export-onnx",
    "export-gguf",
    "export-web",
)
READS: tuple[str, ...] = ("model", "test", "device")
FREE: tuple[str, ...] = ("device", *TASK_FILES)
VERSION = 8
RESUMES = False
DISTRIBUTED = False


class Sections(VerifySections, AdaptSection, DeviceSection, Protocol):
    """The recipe sections that this pass reads."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the fields of the checks, the base and the test items."""
    return ("verify", "dense_update", "export.targets", *BASE_FIELDS, *TEST_FIELDS)


def _queries(context: Context[Sections]) -> Asked:
    """Return prompts, texts and tolerances of the certificate."""
    recipe, tokenizer = context.recipe, load_tokenizer(context.model)
    items = Data(recipe, tokenizer).test[: recipe.verify.prompts]
    if items[0].text is not None:
        prompts = [item.prompt for item in items]
    else:  # the first quarter of a text window is the prompt
        prompts = [item.prompt + item.target[: max(2, len(item.target) // 4)] for item in items]
    samples = sample_texts(recipe, recipe.verify.prompts)
    texts = [deployed_text(tokenizer, text) for text in samples]
    return Asked(
        prompts,
        list(zip(texts, encode(tokenizer, texts), strict=True)),
        recipe.verify.new_tokens,
        recipe.verify.tolerance,
        recipe.verify.divergence,
        recipe.verify.tokenizers != "reported",
        _reported_readers(recipe, context.model),
        first_chat(recipe, tokenizer),
    )


def _reported_readers(recipe: Sections, model: Path) -> list[str]:
    """Return the runtimes whose tokenizer differs from the base's already before training."""
    if recipe.verify.tokenizers != "auto":
        return []
    checkpoint = Checkpoint(model)
    rows = checkpoint.shapes[f"{checkpoint.family.embedding}.weight"][0]
    return list(differing_texts(recipe, model, rows))


def _capture_untrained(context: Context[Sections], asked: Asked) -> Path:
    """Capture the forward of the compressed model, for recipes without training.

    It runs on the CPU, like the capture of a trained model in search.

    :return: the folder with the captured forward.
    """
    model = load_compressed(context.base(), torch.float32).eval()
    capture(model, asked.prompts[:CAPTURED_SEQUENCES], context.path("sparsify")).write(
        context.folder
    )
    return context.folder


def _why_no_chat(asked: Asked, name: str) -> str | None:
    """Return why the runtime's chat interface was not used; None if it was."""
    if asked.chat is None:
        return "the chat template writes today's date"
    missing = missing_for_chat(name, asked.chat)
    return f"the runtime's chat interface takes no {missing}" if missing else None


def _skipped_checks(subject: Subject, name: str) -> Iterator[str]:
    """Yield a warning for each check of a deployment that this machine cannot run."""
    if has_template(subject.merged.folder) and (reason := _why_no_chat(subject.asked, name)):
        yield f"{name}: no answer to messages was compared, only answers to token ids: {reason}"
    if exact := why_not_exact(name, subject.merged.parameters):
        yield f"{name} was not compared with torch in float32: {exact}"
    if default := why_not_run(name, subject.adapter is not None):
        yield f"{name} was not run in its default mode: {default}"


def _tokenizer_warnings(certificate: Certificate) -> Iterator[str]:
    """Yield a warning for every deployed tokenizer that differs, if the recipe allows it."""
    for check in certificate.checks:
        if check.name.startswith(TOKEN_IDS) and check.differing and check.passed:
            yield (
                f"{check}; texts that are tokenized by transformers are not affected; "
                "verify.tokenizers=required makes this an error"
            )


def run(context: Context[Sections]) -> VerifyMetrics:
    """Write ``verify.json``, and ``subject.json``, the inputs to repeat the checks.

    :raises CertificateError: if checks fail; lists all of them.
    """
    exports = {
        name.removeprefix("export-"): artifact.path
        for name, artifact in context.inputs.items()
        if name.startswith("export-")
    }
    passes = {n: context.inputs[n].path / "model" for n in MASKED_PASSES if n in context.inputs}
    asked = _queries(context)
    asked.write(context.folder)
    device = device_of(context.recipe.device)
    subject = Subject(
        asked,
        passes,
        context.path("sparsify"),
        context.path("search") or _capture_untrained(context, asked),
        context.inputs["merge"].path,
        exports,
        context.recipe.dense_update,
        context.folder,
    )
    certificate = certify(subject, context.start(1 + len(exports)), device)
    document = json.dumps(certificate.document().to_json(), indent=2) + "\n"
    (context.folder / "verify.json").write_text(document)
    certificate.require()
    return VerifyMetrics(
        checks=certificate.results(),
        device=device_name(device),
        warnings=[
            *(warning for name in exports for warning in _skipped_checks(subject, name)),
            *_tokenizer_warnings(certificate),
        ],
    )
