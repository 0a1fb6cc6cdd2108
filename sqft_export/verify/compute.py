"""Check what each runtime computes: exact mode, default mode, kernels."""

from collections.abc import Iterator

import numpy as np

from sqft_export.measure.batches import (
    SCORING_PASS_TOKENS,
    pad_sequences,
    sort_by_length,
    split_batches,
)
from sqft_export.measure.decode import generate
from sqft_export.measure.likelihood import log_softmax
from sqft_export.model.floats import Reference
from sqft_export.packed.folders import PACKED
from sqft_export.targets import Session, target
from sqft_export.targets.devices import why_not_exact, why_not_run
from sqft_export.targets.gguf.architectures import uses_gelu_table
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.subject import Asked, Subject
from sqft_export.verify.text_answers import answer_by_ids, check_answer

BATCH = 16  # prompts per batch of the torch reference
# Standard deviations of logits. llama.cpp reads GELU from a float16 table; so does the reference
# (``gelu.py``). On average they agree to 1e-5. But an input at the border of two float16 may become
# either, and their values differ by 1e-3: the largest difference on random models was 2.6e-3.
GELU_TABLE_TOLERANCE = 5e-3
# Runtimes accumulate the state of a delta rule in float32 over all tokens; the reference does not.
DELTA_TOLERANCE = 1e-3
# Nats per token. llama.cpp's default mode rounds activations to 8 bits in blocks of 32.
GGUF_DIVERGENCE = 0.02


def check_compute(
    certificate: Certificate, subject: Subject, name: str, reference: Reference
) -> None:
    """Check kernels, logits, tokens, divergence and text answer of a target's deployments."""
    asked = subject.asked
    defaults: dict[str, list[np.ndarray]] = {}
    for label, folder in subject.deployments(name):
        if subject.quantized:
            title = f"layers on compressed kernels in {label}"
            kernels = certificate.start("compute", title, "layers")
            compressed = target(name).compressed_kernels(folder, subject.scratch)
            for layer in subject.quantized:
                kernels.count(np.array([layer not in compressed]), layer)
        answers: list[list[int]] = [[] for _ in asked.prompts]
        if why_not_exact(name, subject.merged.parameters) is None:
            tolerance = logit_tolerance(subject, name)
            exact = target(name).open_session(folder, True, None)
            answers = _check_exact(certificate, asked, label, exact, reference, tolerance)
            del exact
        if why_not_run(name, subject.adapter is not None):
            continue  # the verify stage reports the reason
        session = target(name).open_session(folder, False, None)
        defaults[label] = prompt_logits(session, asked.prompts)
        allowed = min(asked.divergence, GGUF_DIVERGENCE) if name == "gguf" else asked.divergence
        _check_default(certificate, asked, label, defaults[label], answers, reference, allowed)
        if label == name:
            answer = answer_by_ids(session, asked, folder)
            del session
            check_answer(certificate, asked, name, folder, answer)
    packed = subject.exports[name] / PACKED
    if packed.is_dir():
        title = f"logits: {name} dense and packed, default mode"
        same = certificate.start("compute", title, "standard deviations")
        session = target(name).open_session(packed, False, None)
        others = prompt_logits(session, asked.prompts)
        for number, (ours, theirs) in enumerate(zip(defaults[name], others, strict=True)):
            worst = np.abs(ours - theirs).max() / ours.std()
            same.record_largest(float(worst), ours.size, f"prompt {number}")


def logit_tolerance(subject: Subject, name: str) -> float:
    """Return the allowed logit difference of a target in exact mode, in standard deviations."""
    if "linear_attention" in subject.merged.family.recurrent:
        return max(subject.asked.tolerance, DELTA_TOLERANCE)
    if name == "gguf" and uses_gelu_table(subject.merged.config["model_type"]):
        return max(subject.asked.tolerance, GELU_TABLE_TOLERANCE)
    return subject.asked.tolerance


def prompt_logits(session: Session, prompts: list[list[int]]) -> list[np.ndarray]:
    """Return the logits of every prompt, each ``[length, vocabulary]``.

    The last token of a prompt is a separate step from the cache.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    for indices in split_batches(session, lengths, sort_by_length(lengths), SCORING_PASS_TOKENS):
        logits = _prefill_and_step([prompts[i] for i in indices], session)
        for index, one in zip(indices, logits, strict=True):
            found[index] = one
    return found


def _prefill_and_step(prompts: list[list[int]], session: Session) -> Iterator[np.ndarray]:
    """Yield the logits of a batch of prompts: a prefill without the last token, then one step."""
    session.reset()
    before = pad_sequences([prompt[:-1] or prompt for prompt in prompts], session.padding)
    first = session.forward(before.ids, before.mask)
    steps = np.array([[prompt[-1]] for prompt in prompts])
    mask = np.concatenate([before.mask, np.ones_like(steps)], axis=1)
    second = session.forward(steps, mask)
    for prompt, kept, one, other in zip(prompts, before.mask == 1, first, second, strict=True):
        yield np.concatenate([one[kept], other])[: len(prompt)]


def _check_exact(
    certificate: Certificate,
    asked: Asked,
    label: str,
    session: Session,
    reference: Reference,
    tolerance: float,
) -> list[list[int]]:
    """Compare logits over every prompt, and greedy tokens with the argmax in torch.

    :return: the greedy continuations.
    """
    both = f"merged in torch and {label}"
    title = f"logits: {both}"
    logits = certificate.start("compute", title, "standard deviations", tolerance)
    tokens = certificate.start("compute", f"greedy tokens: {both}", "tokens")
    continuations: list[list[int]] = []
    for start in range(0, len(asked.prompts), BATCH):
        prompts = asked.prompts[start : start + BATCH]
        answers = generate(session, prompts, asked.new_tokens, stop=[])
        ours = reference.logits([p + a for p, a in zip(prompts, answers, strict=True)])
        theirs = prompt_logits(session, prompts)
        for number, (prompt, answer, one, other) in enumerate(
            zip(prompts, answers, ours, theirs, strict=True), start
        ):
            of_prompt = one[: len(prompt)]
            worst = np.abs(of_prompt - other).max() / of_prompt.std()
            logits.record_largest(float(worst), of_prompt.size, f"prompt {number}")
            expected = one[len(prompt) - 1 : -1].argmax(axis=-1)
            tokens.count(expected != np.array(answer), f"prompt {number}")
        continuations += answers
    return continuations


def _check_default(
    certificate: Certificate,
    asked: Asked,
    label: str,
    default: list[np.ndarray],
    answers: list[list[int]],
    reference: Reference,
    allowed: float,
) -> None:
    """Check the mean KL divergence of the default mode from torch, in nats per token.

    :param default: logits of every prompt in the runtime's default mode.
    :param answers: continuations in exact mode. The reference may still hold their logits.
    """
    total, tokens = 0.0, 0
    title = f"divergence of {label} in its default mode"
    check = certificate.start("compute", title, "nats per token", allowed)
    for start in range(0, len(asked.prompts), BATCH):
        part = slice(start, start + BATCH)
        whole = [p + a for p, a in zip(asked.prompts[part], answers[part], strict=True)]
        for ours, theirs in zip(reference.logits(whole), default[part], strict=True):
            one, other = log_softmax(ours[: len(theirs)]), log_softmax(theirs)
            total += float((np.exp(one) * (one - other)).sum())
            tokens += len(one)
    check.record_largest(total / tokens, tokens, label)
