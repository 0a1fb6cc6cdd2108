"""Check with every exporter, before any work, whether it supports the model.

A listed family is tested with every target, so that its config decides. A model of another type is
rehearsed: a random miniature of its config is exported, run, and compared with torch.
"""

import contextlib
import functools
import importlib.metadata
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sqft_export.errors import one_line
from sqft_export.libraries.optimum import supported_versions
from sqft_export.machine.host import installed
from sqft_export.model.architecture import transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.config import ModelConfig
from sqft_export.model.contexts import context_length, deployed_config
from sqft_export.model.families import FAMILIES, builder_lacks, rope_type
from sqft_export.model.miniature import write_miniature
from sqft_export.plan.layout import Layout
from sqft_export.plan.readers import conversion_failure
from sqft_export.recipe.schema import Export, OnnxGraph, Recipe
from sqft_export.targets import target
from sqft_export.targets.gguf.architectures import architecture_lacks, first_version
from sqft_export.targets.gguf.tokenizer import NotExpressible, read_vocabulary
from sqft_export.targets.web import NO_ADAPTER
from sqft_export.targets.web.graph import PART_BYTES
from sqft_export.verify.lengths import LONGEST_VERIFIED, unverified_lengths

PACKAGES = {
    "openvino": ("openvino", "openvino_tokenizers", "optimum.intel"),
    "onnx": ("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir"),
    "gguf": ("gguf",),
    "web": ("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir"),
}
# Families whose windows OpenVINO GenAI does not apply with paged attention, its default.
WITHOUT_PAGED_WINDOWS = ("olmo3", "exaone4")
_REHEARSED_TOKENS = 24
# Largest difference of logits, in their standard deviations. Rounding is far below, another graph
# above.
_MAX_LOGIT_DIFFERENCE = 1e-2
_COLORS = re.compile(r"\x1b?\[\d+m")


def target_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a fault for every target that the model cannot have and that is not skipped."""
    for name, reason in unsupported_targets(recipe, layout).items():
        others = ", ".join(other for other in recipe.export.targets if other != name)
        way_out = f"export.targets=[{others}]" if others else "another target"
        yield f"export.targets: found {name}, but {reason}; use {way_out}, or leave {name} out"


def drop_unsupported(recipe: Recipe, layout: Layout) -> Recipe:
    """Return the recipe without targets that the model cannot have, if another one works.

    With ``export.on_unsupported: error``, or if no target works, nothing is dropped;
    :func:`target_faults` then refuses the recipe.
    """
    reasons = unsupported_targets(recipe, layout)
    works = len(reasons) < len(recipe.export.targets)
    if not reasons or not works or recipe.export.on_unsupported == "error":
        return recipe
    return recipe.without_targets(reasons)


def find_skipped_targets(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a warning for every target that was dropped, with the reason."""
    for name, reason in recipe.skipped.items():
        yield (
            f"export.targets: {name} is skipped: {reason}; export.on_unsupported=error refuses the "
            "recipe instead"
        )


def find_caps(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a warning if a deployment has a shorter context or another dtype than the model."""
    if recipe.export.targets and installed("transformers"):
        config = transformers_config(layout.config, "config.json").to_dict()
        if rope_type(config) == "dynamic":
            yield (
                "model: rope_type dynamic: deployments compute as the model up to "
                f"{context_length(config)} tokens (max_position_embeddings), which is their context"
            )
        for length in unverified_lengths(config):
            yield (
                f"verify: texts of more than {length.tokens} tokens ({length.what}) are not "
                f"compared with torch; the longest text has {LONGEST_VERIFIED}"
            )
    if "openvino" in recipe.export.targets and (reason := _paged_windows_lack(layout.config)):
        yield reason
    since = first_version(layout.config)
    if "gguf" in recipe.export.targets and since:
        yield f"export.targets: gguf: llama.cpp reads {layout.config['model_type']} from {since} on"
    if "gguf" in recipe.export.targets and layout.width == 8:
        yield "model: weights are float64; GGUF stores those that are not quantized as float32"


def _paged_windows_lack(config: ModelConfig) -> str | None:
    """Return how OpenVINO GenAI computes the windows of a model; None if by default."""
    if config["model_type"] not in WITHOUT_PAGED_WINDOWS or not config.get("sliding_window"):
        return None
    return (
        f"export.targets: openvino: OpenVINO GenAI computes texts of more than "
        f"{config['sliding_window']} tokens (sliding_window) of {config['model_type']} correctly "
        'with ATTENTION_BACKEND="SDPA" only; its default has no windows there'
    )


def unsupported_targets(recipe: Recipe, layout: Layout) -> dict[str, str]:
    """Return target -> why the model cannot have it, for targets whose packages are installed."""
    wanted = [name for name in recipe.export.targets if _is_installed(name)]
    if not wanted or not installed("transformers"):
        return {}
    config = transformers_config(layout.config, "config.json").to_dict()
    found = {name: _REASONS[name](recipe, layout, config) for name in wanted}
    found = {name: reason or conversion_failure(name, layout) for name, reason in found.items()}
    return {name: reason for name, reason in found.items() if reason}


def _is_installed(name: str) -> bool:
    return all(installed(package) for package in PACKAGES[name])


def _openvino_lacks(recipe: Recipe, layout: Layout, config: ModelConfig) -> str | None:
    model_type = config["model_type"]
    if layout.family.recurrent:
        return None  # traced without optimum-intel
    if reason := _optimum_lacks(layout.family.openvino_config or model_type):
        return reason
    return None if model_type in FAMILIES else _rehearsal_lacks("openvino", recipe, layout)


@functools.cache
def _optimum_lacks(model_type: str) -> str | None:
    """Return why optimum-intel can't export the model type with this transformers, or None."""
    from packaging.version import Version

    supported = supported_versions(model_type)
    if supported is None:
        return f"optimum-intel has no OpenVINO export for {model_type}"
    if model_type in FAMILIES:  # our export ignores optimum's version bounds
        return None
    here = importlib.metadata.version("transformers")
    least, most = supported.least or here, supported.most or here
    if Version(least) <= Version(here) <= Version(most):
        return None
    bound = f"up to {most}" if Version(here) > Version(most) else f"from {least} on"
    return f"optimum-intel exports {model_type} with transformers {bound}; {here} is installed"


def _onnx_lacks(recipe: Recipe, layout: Layout, config: ModelConfig) -> str | None:
    config, graph = deployed_config(config), recipe.export.onnx_graph
    lacks = builder_lacks(layout.family, config)
    if graph == "fused" or (graph == "auto" and lacks is None):
        return None  # what the builder lacks is a fault of export.onnx_graph
    if rope_type(config) == "longrope":
        way_out = "" if lacks else "; export.onnx_graph=fused has it"
        return f"torch's exporter can't trace rope_type longrope in a standard graph{way_out}"
    if layout.family.recurrent:
        way_out = f", and the builder {lacks}" if lacks else "; export.onnx_graph=fused has them"
        return f"a standard graph has no operators of recurrent layers{way_out}"
    if config["model_type"] in FAMILIES:
        return None
    return _rehearsal_lacks("onnx", recipe, layout)


def _gguf_lacks(recipe: Recipe, layout: Layout, config: ModelConfig) -> str | None:
    if lacks := architecture_lacks(config):
        return lacks
    if layout.folder is None:
        return None
    try:
        read_vocabulary(layout.folder, layout.embedding[0])
    except NotExpressible as error:
        return f"its tokenizer can't be written for llama.cpp: {error}"
    return None


def _web_lacks(recipe: Recipe, layout: Layout, config: ModelConfig) -> str | None:
    if recipe.unmerged:
        return NO_ADAPTER
    rows, width = layout.embedding
    size = rows * width * (recipe.quantize.embedding_bits or 32) // 8
    if size > PART_BYTES:
        return (
            f"its embedding has {size:,} bytes, and a browser holds at most {PART_BYTES:,} in one "
            "buffer; set quantize.embedding_bits: 8"
        )
    return _onnx_lacks(recipe, layout, config)


_REASONS = {
    "openvino": _openvino_lacks,
    "onnx": _onnx_lacks,
    "gguf": _gguf_lacks,
    "web": _web_lacks,
}


def _rehearsal_lacks(name: str, recipe: Recipe, layout: Layout) -> str | None:
    plain = {k: v for k, v in layout.config.items() if k != "quantization_config"}
    return rehearse(name, json.dumps(plain, sort_keys=True), recipe.export.onnx_graph)


@functools.cache
def rehearse(name: str, config: str, onnx_graph: OnnxGraph) -> str | None:
    """Export a random miniature of a config, run it, and compare its logits with torch.

    :param config: JSON of ``config.json``.
    :return: why the target cannot have such a model; None if it can, or if no miniature can
        be made.
    """
    made = transformers_config(json.loads(config), "config.json")
    with tempfile.TemporaryDirectory(prefix="sqft-") as scratch, _silence():
        model, deployed = Path(scratch) / "model", Path(scratch) / "deployed"
        deployed.mkdir()
        try:
            write_miniature(made, model)
            Checkpoint(model).check()
        except Exception:  # the small sizes are inconsistent, so nothing is known
            return None
        try:
            target(name).export(model, deployed, Export(onnx_graph=onnx_graph))
            difference = _logit_difference(name, model, deployed)
        except Exception as error:  # tracers and runtimes raise many kinds
            return f"the export of a small {made.model_type} model fails: {_cause_of(error)}"
    if difference < _MAX_LOGIT_DIFFERENCE:
        return None
    return (
        f"a small {made.model_type} model computes other logits there than in torch (up to "
        f"{difference:.2g} standard deviations)"
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep libraries from printing messages about the miniature."""
    level, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(level)


def _logit_difference(name: str, model: Path, deployed: Path) -> float:
    """Return the largest difference of logits from torch, in their standard deviations."""
    ids = np.random.RandomState(0).randint(5, 400, (1, _REHEARSED_TOKENS))
    sessions = target("torch"), target(name)
    ours, theirs = (
        session.open_session(folder, True, None).forward(ids)
        for session, folder in zip(sessions, (model, deployed), strict=True)
    )
    return float(np.abs(ours - theirs).max() / ours.std())


def _cause_of(error: BaseException) -> str:
    """Return the first cause of an error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = _COLORS.sub("", one_line(Exception(str(error)), 160))
    return f"{type(error).__name__}: {text}"
