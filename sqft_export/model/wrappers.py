"""Read the text model of a multimodal wrapper, such as Gemma 3, Ministral 3 or Qwen3-VL.

A wrapper's ``config.json`` has the config of its text model as ``text_config``. The stored names of
its weights have a prefix such as ``model.language_model.``. The other tensors belong to vision
towers, projectors or heads that predict several tokens. All code after this module sees a text
model: its config, and its weights under the names of its class. The wrapper's folder is only read.
"""

import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqft_export.errors import UserError
from sqft_export.model.companions import companions, write_config
from sqft_export.model.config import ModelConfig
from sqft_export.model.tensorfiles import TensorInfo, TensorWriter

if TYPE_CHECKING:
    from sqft_export.model.checkpoint import Checkpoint

_Values = dict[str, Any]  # of a config of unknown structure
# Fields whose presence marks a multimodal model.
MULTIMODAL_FIELDS = ("vision_config", "audio_config", "vision_tower")
# Text model of a wrapper -> model type that computes the same on text. Their rotary positions have
# three parts (time, height, width), which are equal for text.
TEXT_TYPES = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# Wrappers whose published configs have the text model's fields at the top -> their text model.
FLAT_WRAPPERS = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
_ROPE_FIELDS = ("rope_parameters", "rope_scaling")
_THREE_PART_FIELDS = ("mrope_section", "mrope_interleaved")
# Fields that a text config takes from the wrapper if it lacks them.
_SHARED_FIELDS = (
    *("dtype", "torch_dtype", "quantization_config", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
# Prefixes of a text model in stored names, before ``embed_tokens``; the longest ones first.
_PREFIXES = (
    *("model.language_model.model.", "language_model.model.", "model.language_model."),
    *("language_model.", "model.text_model.", "text_model.model.", "text_model.", "model."),
)
_HEADS = ("lm_head.", "language_model.lm_head.", "text_model.lm_head.", "model.lm_head.")
_EMBEDDING = "embed_tokens.weight"
# Files that describe pictures, sound or video to loaders of the wrapper.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_SHARD_BYTES = 2**28  # tensors that are buffered before a file is written
_CACHE_PREFIX = "text-model-"  # folder in a run: this and a digest of the wrapper


@dataclass(frozen=True)
class LeftOut:
    """A part of a wrapper that the text model does not have.

    part: first distinct component of its tensors' names, such as ``vision_tower``.
    """

    part: str
    tensors: int
    bytes: int


def is_wrapper(config: Mapping[str, object]) -> bool:
    """Return whether a ``config.json`` describes a multimodal model with a text model in it."""
    multimodal = any(config.get(name) for name in MULTIMODAL_FIELDS)
    described = isinstance(config.get("text_config"), dict)
    return described or (multimodal and config.get("model_type") in FLAT_WRAPPERS)


def has_wrapper_names(stored: Mapping[str, TensorInfo]) -> bool:
    """Return whether a checkpoint has the names of a wrapper's text model.

    transformers saves a text model such as ``qwen3_5_text`` so.
    """
    return f"model.language_model.{_EMBEDDING}" in stored


def text_config_of(config: ModelConfig, where: str) -> ModelConfig:
    """Return the config of a wrapper's text model; other configs stay unchanged.

    :param where: name of the config in messages.
    :raises UserError: if transformers has no causal language model of the text model's type.
    """
    if not is_wrapper(config):
        return config
    outer = cast(_Values, config)
    inner = outer.get("text_config")
    text = dict(inner) if isinstance(inner, dict) else _flat_text(outer)
    text["model_type"] = _text_type(outer, text, where)
    if text["model_type"] in TEXT_TYPES.values():
        text |= {k: _plain_rope(text[k]) for k in _ROPE_FIELDS if isinstance(text.get(k), dict)}
    text |= {k: outer[k] for k in _SHARED_FIELDS if text.get(k) is None and k in outer}
    tied = _tied(outer, text)
    text |= {} if tied is None else {"tie_word_embeddings": tied}
    text["architectures"] = [_class_of(text["model_type"])]
    return cast(ModelConfig, text)


def _flat_text(outer: _Values) -> _Values:
    """Return the text model's fields of a wrapper that has them at the top."""
    others = ("vision", "image", "video")
    fields = {k: v for k, v in outer.items() if not any(word in k for word in others)}
    return fields | {"model_type": FLAT_WRAPPERS[outer["model_type"]]}


def _text_type(outer: _Values, text: _Values, where: str) -> str:
    """Return the type that the text model is written as.

    :raises UserError: if transformers has no causal language model of that type.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = text.get("model_type") or _default_text(outer).get("model_type")
    kind = TEXT_TYPES.get(str(found), found)
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{where}: model_type: {outer.get('model_type')} has a text model of type {found!r}, "
            "which is not a causal language model in this version of transformers"
        )
    return kind


def _class_of(model_type: str) -> str:
    """Return the name of the causal language model class of a model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return found if isinstance(found, str) else found[0]


def _default_text(outer: _Values) -> _Values:
    """Return the text config that transformers gives a wrapper's type; {} for unknown types."""
    from transformers import AutoConfig

    try:
        made = AutoConfig.for_model(str(outer.get("model_type")))
    except ValueError:
        return {}
    found = made.to_dict().get("text_config")
    return found if isinstance(found, dict) else {}


def _tied(outer: _Values, text: _Values) -> bool | None:
    """Return whether the configs tie embedding and head; None if neither has the field.

    The wrapper's field counts first, because its class owns the head.
    """
    for config in (outer, text):
        if isinstance(found := config.get("tie_word_embeddings"), bool):
            return found
    return None


def _plain_rope(rope: _Values) -> _Values:
    """Return rotary parameters without the split into time, height and width."""
    plain = {k: v for k, v in rope.items() if k not in _THREE_PART_FIELDS}
    kinds = {k: "default" for k in ("type", "rope_type") if plain.get(k) == "mrope"}
    return plain | kinds


def text_tensors(stored: Mapping[str, TensorInfo], where: str) -> dict[str, TensorInfo]:
    """Return the text model's tensors of a wrapper, under the names of the text model's class.

    :param stored: all tensors of the wrapper, under their stored names.
    :raises UserError: if no text model is found.
    """
    prefix = _prefix_of(stored, where)
    renamed = ((_text_name(name, prefix), info) for name, info in stored.items())
    return {name: info for name, info in renamed if name}


def left_out(stored: Mapping[str, TensorInfo], where: str) -> list[LeftOut]:
    """Return the parts of a wrapper that its text model does not have, the largest first."""
    prefix, groups = _prefix_of(stored, where), defaultdict[str, list[TensorInfo]](list)
    for name, info in stored.items():
        if _text_name(name, prefix) is None:
            inner = name.removeprefix(prefix).removeprefix("model.")
            groups[inner.partition(".")[0]].append(info)
    found = [LeftOut(p, len(infos), sum(i.bytes for i in infos)) for p, infos in groups.items()]
    return sorted(found, key=lambda one: -one.bytes)


def _prefix_of(stored: Mapping[str, TensorInfo], where: str) -> str:
    """Return the prefix of the text model's tensors."""
    for prefix in _PREFIXES:
        if f"{prefix}{_EMBEDDING}" in stored:
            return prefix
    raise UserError(
        f"{where}: the text model's {_EMBEDDING} is stored under none of "
        f"{', '.join(_PREFIXES)}; stored names are such as {min(stored)}"
    )


def _text_name(name: str, prefix: str) -> str | None:
    """Return a tensor's name in the text model's class; None if it belongs to another part."""
    for head in _HEADS:
        if name.startswith(head):
            return f"lm_head.{name.removeprefix(head)}"
    inner = name.removeprefix(prefix)
    if inner == name or inner.partition(".")[0] in ("visual", "vision_tower"):
        return None
    return f"model.{inner}"


def wrapper_note(checkpoint: "Checkpoint") -> str | None:
    """Return which text model is read and which parts are left out; None for a text model."""
    outer = checkpoint.wrapper_config
    if outer is None:
        return None
    parts = [
        f"{one.part} ({one.tensors} tensors, {one.bytes:,} bytes)"
        for one in left_out(checkpoint.stored, str(checkpoint.folder))
    ]
    return (
        f"model: {outer.get('model_type')} is a multimodal model; its text model is compressed as "
        f"{checkpoint.config['model_type']}, left out: {', '.join(parts) or 'nothing'}"
    )


def write_text_model(checkpoint: "Checkpoint", folder: Path) -> None:
    """Write the text model of a wrapper to a folder, one tensor in memory at a time.

    Tokenizer, chat template and generation config are copied; values and dtypes stay unchanged.

    :param folder: is written next to its place and then renamed, so that it is always complete.
    """
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in companions(checkpoint.folder):
        if not file.name.endswith(_PROCESSOR_FILES):
            shutil.copyfile(file, partial / file.name)
    write_config(partial, checkpoint.config)
    with TensorWriter(partial, shard_bytes=_SHARD_BYTES) as writer:
        for name, tensor in checkpoint.tensors(checkpoint.headers):
            writer.add(name, tensor)
    partial.rename(folder)


def text_model_folder(root: Path, digest: str) -> Path:
    """Return the place of a wrapper's text model in the folder of a run.

    :param digest: of the wrapper's files.
    """
    return root / f"{_CACHE_PREFIX}{digest[:16]}"
