"""Build models from configs without weights, to get shapes and the family of any model type.

torch and transformers are imported only when a model is built, since devices read configs too.
"""

import functools
import json
import logging
from typing import TYPE_CHECKING, Any

from sqft_export.errors import UserError, one_line
from sqft_export.model.config import ModelConfig
from sqft_export.model.decoding import find_decoder_fault
from sqft_export.model.empty import empty_model
from sqft_export.model.families import FAMILIES, Family
from sqft_export.model.structure import check_blocks, family_of_model, list_linears
from sqft_export.model.wrappers import MULTIMODAL_FIELDS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)
# Fields of config.json with the number of experts.
EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Size fields of config.json -> an upper limit that no real model exceeds.
_MAX_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "head_dim", "word_embed_proj_dim"), 2**17),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 2**19),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2**10),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 2**12),
    "vocab_size": 2**22,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2**24),
}
# Fields of config.json that differ between the artifacts of one model.
_SETTINGS_OF_STORAGE = ("quantization_config", "dtype", "torch_dtype", "tie_word_embeddings")
# Field -> value with which a listed family is no causal decoder, and why.
_NOT_CAUSAL = (
    ("add_cross_attention", True, "such a model decodes the outputs of an encoder"),
    ("use_bidirectional_attention", "all", "such a model lets tokens see later ones"),
)
_found_families: dict[str, Family] = {}  # config -> family of an unlisted model type


def family_of(config: ModelConfig, where: str) -> Family:
    """Return the family of a Hugging Face ``config.json``.

    The family of a model type that is not listed follows from the structure of its model.

    :param where: name of the config in messages.
    :raises UserError: naming ``where``, if the model has no blocks of Linears to compress.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    plain = {k: v for k, v in config.items() if k not in _SETTINGS_OF_STORAGE}
    key = json.dumps(plain, sort_keys=True, default=str)
    if key not in _found_families:
        _found_families[key] = _unlisted_family(config, where)
    return _found_families[key]


def _unlisted_family(config: ModelConfig, where: str) -> Family:
    model_type = str(config.get("model_type"))
    model = _empty_model_of(config, where)
    family = family_of_model(model, model_type, where)
    if fault := find_decoder_fault(model.config):
        raise UserError(f"{where}: model_type: {model_type} {fault}")
    logger.warning(
        "%s: model_type %s is not one of the tested ones (%s); detected structure: %s has %s; all "
        "of them get an adapter",
        where,
        model_type,
        ", ".join(sorted(FAMILIES)),
        family.blocks,
        "; ".join(list_linears(model, family.blocks)),
    )
    return family


def shapes_of(config: ModelConfig, where: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the model, from ``config.json`` alone.

    If embedding and head are tied, only the embedding is listed.

    :raises UserError: naming ``where`` and the setting, if transformers can't build the model.
    """
    return dict(_shapes(json.dumps(config, sort_keys=True, default=str), where))


@functools.cache
def _shapes(config: str, where: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    settings: ModelConfig = json.loads(config)
    model = _empty_model_of(settings, where)
    family = family_of(settings, where)
    # A listed family names its routers, experts and recurrent layers.
    if family.experts is None and not family.recurrent:
        check_blocks(model, family.blocks, where)
    return tuple((name, tuple(weight.shape)) for name, weight in model.named_parameters())


def transformers_config(config: ModelConfig, where: str) -> "PretrainedConfig":
    """Convert a ``config.json`` to transformers' config, without its quantization settings.

    :raises UserError: naming ``where`` and the field, if transformers rejects it.
    """
    from transformers import AutoConfig

    settings = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    try:
        return AutoConfig.for_model(config["model_type"], **_decode_floats(settings))
    except Exception as error:  # transformers and its validation raise many types
        raise UserError(f"{where}: transformers rejects it: {_error_text(error)}") from error


def _decode_floats(value: Any) -> Any:
    """Replace ``{"__float__": "Infinity"}``, transformers' form of infinity, by a float."""
    if isinstance(value, dict):
        if list(value) == ["__float__"]:
            return float(value["__float__"])
        return {key: _decode_floats(entry) for key, entry in value.items()}
    return [_decode_floats(entry) for entry in value] if isinstance(value, list) else value


def _error_text(error: Exception) -> str:
    """Return the type and message of an error on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def _empty_model_of(config: ModelConfig, where: str) -> "PreTrainedModel":
    """Build the empty model of a ``config.json``.

    :raises UserError: if transformers has no causal language model for ``model_type``, or it can't
        be compressed.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{where}: model_type: found {model_type!r}, which is not a causal language model in "
            f"this version of transformers; tested are {', '.join(sorted(FAMILIES))}"
        )
    _check_sizes(config, where)
    made = transformers_config(config, where)
    _refuse_unsupported(made, where)
    try:
        model = empty_model(made)
    except Exception as error:  # model classes raise anything if sizes don't fit each other
        raise UserError(
            f"{where}: transformers can't build its model: {_error_text(error)}"
        ) from error
    model.tie_weights()
    return model


def _check_sizes(config: ModelConfig, where: str) -> None:
    """Refuse sizes that no real model has: they would take hours and all memory to fail."""
    for field, most in _MAX_SIZES.items():
        found = config.get(field)
        sizes = found if isinstance(found, list) else [found]  # one per layer
        if found is not None and not all(type(n) is int and 0 < n <= most for n in sizes):
            raise UserError(f"{where}: {field}: found {found!r}; allowed are 1 to {most}")


def _refuse_unsupported(config: "PretrainedConfig", where: str) -> None:
    """Refuse mixtures of experts and multimodal models."""
    family = FAMILIES.get(config.model_type)
    for name in () if family and family.experts else EXPERT_FIELDS:
        if (getattr(config, name, None) or 0) > 1:
            raise UserError(
                f"{where}: model_type: {config.model_type} is a mixture of experts ({name}: "
                f"{getattr(config, name)}) whose experts are not known here; known are "
                f"{', '.join(sorted(name for name, one in FAMILIES.items() if one.experts))}"
            )
    for name, found, why in _NOT_CAUSAL:
        if getattr(config, name, None) == found:
            raise UserError(f"{where}: {name}: found {found!r}; {why}")
    for name in MULTIMODAL_FIELDS:
        if getattr(config, name, None):
            raise UserError(
                f"{where}: model_type: {config.model_type} is multimodal ({name}); only "
                "language models are compressed, for example its text model saved separately"
            )
