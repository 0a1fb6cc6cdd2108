"""What a runtime makes of its file: exact mode, default mode, kernels."""

from collections.abc import Iterator

import numpy as np

from sqft_export.measure.batches import SCORED, batches, by_length, padded
from sqft_export.measure.decode import generate
from sqft_export.measure.likelihood import log_softmax
from sqft_export.model.floats import Reference
from sqft_export.packed.folders import PACKED
from sqft_export.targets import Session, target
from sqft_export.targets.devices import why_not_exact, why_not_run
from sqft_export.targets.gguf.architectures import reads_a_table
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.subject import Asked, Subject
from sqft_export.verify.text_answers import answer_by_ids, check_text_answer

BATCH = 16  # prompts that go through the reference at once
# llama.cpp's float16 table of GELU, in standard deviations of logits; with the same table in torch
# they are as near as elsewhere.
GELU_TABLE = 5e-3
# Its default mode rounds activations to 8 bits by blocks of 32: nats a token.
GGUF_DIVERGENCE = 0.02


def check_compute(
    certificate: Certificate, subject: Subject, name: str, reference: Reference
) -> None:
    asked = subject.asked
    defaults: dict[str, list[np.ndarray]] = {}
    for label, folder in subject.deployments(name):
        if subject.quantized:
            title = f"layers on compressed kernels in {label}"
            kernels = certificate.start("compute", title, "layers")
            compressed = target(name).compressed_kernels(folder, subject.scratch)
            for layer in subject.quantized:
                kernels.count(np.array([layer not in compressed]), layer)
        said: list[list[int]] = [[] for _ in asked.prompts]
        if why_not_exact(name, subject.merged.parameters) is None:
            tolerance = logit_tolerance(subject, name)
            exact = target(name).open_session(folder, True, None)
            said = _check_exact(certificate, asked, label, exact, reference, tolerance)
            del exact
        if why_not_run(name, subject.adapter is not None):
            continue  # verify says so
        session = target(name).open_session(folder, False, None)
        defaults[label] = prompt_logits(session, asked.prompts)
        most = min(asked.divergence, GGUF_DIVERGENCE) if name == "gguf" else asked.divergence
        _check_default(certificate, asked, label, defaults[label], said, reference, most)
        if label == name:
            answer = answer_by_ids(session, asked, folder)
            del session
            check_text_answer(certificate, asked, name, folder, answer)
    packed = subject.exports[name] / PACKED
    if packed.is_dir():
        title = f"logits: {name} dense and packed, as deployed"
        same = certificate.start("compute", title, "standard deviations")
        session = target(name).open_session(packed, False, None)
        others = prompt_logits(session, asked.prompts)
        for number, (ours, theirs) in enumerate(zip(defaults[name], others, strict=True)):
            worst = np.abs(ours - theirs).max() / ours.std()
            same.worst(float(worst), ours.size, f"prompt {number}")


def logit_tolerance(subject: Subject, name: str) -> float:
    """The allowed difference of logits of a target in exact mode, in their standard deviations."""
    if name == "gguf" and reads_a_table(subject.merged.config["model_type"]):
        return max(subject.asked.tolerance, GELU_TABLE)
    return subject.asked.tolerance


def prompt_logits(session: Session, prompts: list[list[int]]) -> list[np.ndarray]:
    """``[length, vocabulary]`` of every prompt, its last token by a step from the cache."""
    found: list[np.ndarray] = [np.empty(0)] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    for indices in batches(session, lengths, by_length(lengths), SCORED):
        logits = _with_a_step([prompts[i] for i in indices], session)
        for index, one in zip(indices, logits, strict=True):
            found[index] = one
    return found


def _with_a_step(prompts: list[list[int]], session: Session) -> Iterator[np.ndarray]:
    """Prompts of two tokens and more side by side; the last token of each comes last."""
    session.reset()
    before = padded([prompt[:-1] or prompt for prompt in prompts], session.padding)
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
    """Logits over every prompt, and the tokens that follow: each the likeliest in torch.

    :return: those tokens.
    """
    both = f"merged in torch and {label}"
    title = f"logits: {both}"
    logits = certificate.start("compute", title, "standard deviations", tolerance)
    tokens = certificate.start("compute", f"greedy tokens: {both}", "tokens")
    said: list[list[int]] = []
    for start in range(0, len(asked.prompts), BATCH):
        prompts = asked.prompts[start : start + BATCH]
        answers = generate(session, prompts, asked.new_tokens, stop=[])
        ours = reference.logits([p + s for p, s in zip(prompts, answers, strict=True)])
        theirs = prompt_logits(session, prompts)
        for number, (prompt, answer, one, other) in enumerate(
            zip(prompts, answers, ours, theirs, strict=True), start
        ):
            of_prompt = one[: len(prompt)]
            worst = np.abs(of_prompt - other).max() / of_prompt.std()
            logits.worst(float(worst), of_prompt.size, f"prompt {number}")
            likeliest = one[len(prompt) - 1 : -1].argmax(axis=-1)
            tokens.count(likeliest != np.array(answer), f"prompt {number}")
        said += answers
    return said


def _check_default(
    certificate: Certificate,
    asked: Asked,
    label: str,
    default: list[np.ndarray],
    said: list[list[int]],
    reference: Reference,
    allowed: float,
) -> None:
    """Mean KL divergence of the runtime's default mode from torch, in nats a token.

    :param said: what follows the prompts in exact mode, for which torch was asked already.
    """
    total, tokens = 0.0, 0
    title = f"divergence of {label} in its default mode"
    check = certificate.start("compute", title, "nats a token", allowed)
    for start in range(0, len(asked.prompts), BATCH):
        part = slice(start, start + BATCH)
        whole = [p + s for p, s in zip(asked.prompts[part], said[part], strict=True)]
        for ours, theirs in zip(reference.logits(whole), default[part], strict=True):
            one, other = log_softmax(ours[: len(theirs)]), log_softmax(theirs)
            total += float((np.exp(one) * (one - other)).sum())
            tokens += len(one)
    check.worst(total / tokens, tokens, label)
