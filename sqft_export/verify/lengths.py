"""Compare runtimes with torch beyond the text lengths at which a model changes.

Prompts of a task are short. A sliding window, the long factors of a rotary scaling, and the last
position of a learned table show in longer texts only. A config names these lengths; each is checked
on one text that passes it. The deployment of a small model is checked itself. For a large model, a
random miniature of the same config is exported and checked: two blocks with small widths.
"""

import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sqft_export.model.architecture import transformers_config
from sqft_export.model.contexts import POSITION_FIELDS
from sqft_export.model.floats import Reference
from sqft_export.model.miniature import write_miniature
from sqft_export.model.recurrent import CHUNK_TOKENS
from sqft_export.recipe.schema import Export
from sqft_export.targets import target
from sqft_export.targets.devices import why_not_exact, why_not_run
from sqft_export.targets.folder import context_of, graph_and_weights, runtime_of
from sqft_export.targets.gguf.architectures import uses_gelu_table
from sqft_export.targets.onnx.session import FUSED_OPERATOR
from sqft_export.targets.torch import TorchSession
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.compute import logit_tolerance, prompt_logits
from sqft_export.verify.gelu import use_gelu_table
from sqft_export.verify.subject import Subject

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LONGEST_VERIFIED = 8192  # tokens of a text
TOKENS_PAST = 8  # tokens of a text beyond the length that it checks
# The deployment itself is checked up to these numbers: weights * tokens, heads * tokens squared.
LARGEST_PRODUCT, LARGEST_SCORES = 2 * 10**11, 2**28
LENGTH_FIELDS = ("sliding_window", "original_max_position_embeddings")
# Columns of the causal convolutions of recurrent layers; shorter texts leave columns empty.
KERNEL_FIELDS = ("conv_L_cache", "linear_conv_kernel_dim")
DELTA_CHUNK = "chunk of the delta rule"
# Scalings of rotary positions whose angles depend on the length of a text.
LENGTH_DEPENDENT = {"dynamic", "longrope"}
MINIATURE_TOLERANCE = 1e-3  # standard deviations of logits; random weights round more


@dataclass(frozen=True)
class Length:
    """A text length at which a model may change.

    what: config field that names the length.
    tokens: longer texts are computed differently.
    last: the model accepts no longer text.
    within: the text that checks this length is one token shorter, not longer.
    """

    what: str
    tokens: int
    last: bool = False
    within: bool = False

    @property
    def text_tokens(self) -> int:
        """Tokens of a text that checks this length."""
        if self.within:
            return self.tokens - 1
        return self.tokens if self.last else self.tokens + TOKENS_PAST

    @property
    def title(self) -> str:
        """The length in the title of a check."""
        return f"{'within' if self.within else 'past'} {self.what} {self.tokens}"


def named_lengths(config: Mapping[str, object]) -> list[Length]:
    """Return the lengths within the context at which a model may change, shortest first.

    :param config: the transformers config as a dict.
    """
    positions = next((name for name in POSITION_FIELDS if name in config), POSITION_FIELDS[0])
    limit = config.get(positions)
    context = limit if isinstance(limit, int) else None
    found = {
        Length(name, value)
        for name, value in _entries(config)
        if name in LENGTH_FIELDS and type(value) is int and (context is None or value < context)
    }
    if config.get("use_sliding_window") is False:
        found = {length for length in found if length.what != "sliding_window"}
    scalings = {value for name, value in _entries(config) if name == "rope_type"}
    if context and ("dynamic" in scalings or not config.get("rope_parameters")):
        found.add(Length(positions, context, last=True))
    return sorted(found | _recurrent_lengths(config), key=lambda length: length.tokens)


def _recurrent_lengths(config: Mapping[str, object]) -> set[Length]:
    """Return the lengths at which the states of recurrent layers change."""
    kernels = ((name, config.get(name)) for name in KERNEL_FIELDS)
    found = {Length(name, size, within=True) for name, size in kernels if isinstance(size, int)}
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "linear_attention" in kinds:
        found.add(Length(DELTA_CHUNK, CHUNK_TOKENS))
    return found


def _entries(config: Mapping[str, object]) -> list[tuple[str, object]]:
    """Return names and values, including those of nested sections."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    return [*config.items(), *(entry for section in inner for entry in _entries(section))]


def unverified_lengths(config: Mapping[str, object]) -> list[Length]:
    """Return the lengths that no text of the certificate reaches."""
    scalings = {value for name, value in _entries(config) if name == "rope_type"}
    depends = bool(scalings & LENGTH_DEPENDENT)
    return [
        found
        for found in named_lengths(config)
        if found.text_tokens > LONGEST_VERIFIED and (depends or found.what == "sliding_window")
    ]


def check_lengths(
    certificate: Certificate, subject: Subject, name: str, reference: Reference
) -> None:
    """Compare logits past every named length that fits in the context of a deployment."""
    merged = subject.merged
    config = transformers_config(merged.config, merged.where)
    context = context_of(subject.exports[name] / "model") or LONGEST_VERIFIED
    longest = min(context, LONGEST_VERIFIED)
    wanted = [n for n in named_lengths(config.to_dict()) if n.text_tokens <= longest]
    if not wanted or why_not_run(name, False):
        return
    whole = [n for n in wanted if _is_affordable(subject, name, config, n.text_tokens)]
    if whole:
        _check_deployed(certificate, subject, name, reference, whole)
    if rest := [n for n in wanted if n not in whole]:
        _check_miniature(certificate, subject, name, config, rest)


def _is_affordable(subject: Subject, name: str, config: "PretrainedConfig", tokens: int) -> bool:
    """Return whether the deployment itself can be checked on a text of ``tokens`` tokens."""
    parameters, heads = subject.merged.parameters, config.num_attention_heads
    fits = parameters * tokens <= LARGEST_PRODUCT and heads * tokens**2 <= LARGEST_SCORES
    return fits and why_not_exact(name, parameters) is None


def _check_deployed(
    certificate: Certificate,
    subject: Subject,
    name: str,
    reference: Reference,
    lengths: list[Length],
) -> None:
    """Compare the deployments with torch on the concatenated prompts of the certificate."""
    tokens = itertools.cycle(itertools.chain.from_iterable(subject.asked.prompts))
    texts = [list(itertools.islice(tokens, length.text_tokens)) for length in lengths]
    expected = [next(iter(reference.logits([text]))) for text in texts]
    for label, folder in subject.deployments(name):
        session = target(name).open_session(folder, True, None)
        for length, text, ours in zip(lengths, texts, expected, strict=True):
            title = f"logits {length.title}: merged in torch and {label}"
            tolerance = logit_tolerance(subject, name)
            check = certificate.start("compute", title, "standard deviations", tolerance)
            [theirs] = prompt_logits(session, [text])
            worst = float(np.abs(ours - theirs).max() / ours.std())
            check.record_largest(worst, ours.size, f"a text of {len(text)} tokens")


def _onnx_graph(folder: Path) -> Literal["auto", "fused", "standard"]:
    """Return the graph form of an ONNX deployment; auto for other runtimes."""
    if runtime_of(folder) not in ("onnx", "web"):
        return "auto"
    graph, _ = graph_and_weights(folder)
    return "fused" if FUSED_OPERATOR in graph.read_bytes() else "standard"


def _check_miniature(
    certificate: Certificate,
    subject: Subject,
    name: str,
    config: "PretrainedConfig",
    lengths: list[Length],
) -> None:
    """Export two random blocks of the same config in the same form, and compare with torch."""
    with tempfile.TemporaryDirectory(prefix="sqft-") as scratch:
        model, deployed = Path(scratch) / "model", Path(scratch) / "deployed"
        deployed.mkdir()
        write_miniature(config, model)
        graph = _onnx_graph(subject.exports[name] / "model")
        target(name).export(model, deployed, Export(onnx_graph=graph))
        ours = target("torch").open_session(model, True, None)
        if name == "gguf" and uses_gelu_table(config.model_type):
            assert isinstance(ours, TorchSession)
            use_gelu_table(ours.model)
        theirs = target(name).open_session(deployed, True, None)
        for length in lengths:
            title = f"logits {length.title}: two blocks in torch and {name}"
            tolerance = max(MINIATURE_TOLERANCE, logit_tolerance(subject, name))
            check = certificate.start("compute", title, "standard deviations", tolerance)
            ids = np.random.RandomState(0).randint(5, 400, length.text_tokens).tolist()
            [one], [other] = (prompt_logits(session, [ids]) for session in (ours, theirs))
            worst = float(np.abs(one - other).max() / one.std())
            check.record_largest(worst, one.size, f"a text of {len(ids)} tokens")
