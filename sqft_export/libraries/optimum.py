"""Private parts of optimum-intel: export configs, their version limits, the delta rule's loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import openvino as ov
    from openvino.frontend import NodeContext

DISTRIBUTION = "optimum-intel"
PRIVATE = (
    "optimum.exporters.openvino:model_configs",
    "optimum.exporters.openvino.model_configs:GemmaOpenVINOConfig.MAX_TRANSFORMERS_VERSION",
    "optimum.exporters.openvino._ov_ops:convert_recurrent_attention_cell",
    "optimum.exporters.tasks:TasksManager.get_supported_tasks_for_model_type",
)
TASK = "text-generation-with-past"
_LIMIT = "MAX_TRANSFORMERS_VERSION"


class VersionRange(NamedTuple):
    """Versions of transformers with which optimum-intel exports a model type; None: no limit."""

    least: str | None
    most: str | None


def _export_config(model_type: str) -> type | None:
    """Return the class that describes the export of a model type, or None."""
    from optimum.exporters.openvino import model_configs
    from optimum.exporters.tasks import TasksManager

    assert model_configs  # importing it fills the manager's table
    try:
        table = TasksManager.get_supported_tasks_for_model_type(
            model_type, "openvino", library_name="transformers"
        )
    except KeyError:
        return None
    return table[TASK].func if TASK in table else None


def supported_versions(model_type: str) -> VersionRange | None:
    """Return the versions of transformers for a model type; None if it can't be exported."""
    config = _export_config(model_type)
    if config is None:
        return None
    limits = (getattr(config, f"{end}_TRANSFORMERS_VERSION", None) for end in ("MIN", "MAX"))
    return VersionRange(*(None if limit is None else str(limit) for limit in limits))


@contextmanager
def without_version_limit(model_type: str) -> Iterator[None]:
    """Remove the upper limit of the transformers version of a model type while it is exported."""
    config = _export_config(model_type)
    own = {} if config is None else {k: v for k, v in vars(config).items() if k == _LIMIT}
    if config is not None:
        setattr(config, _LIMIT, None)
    try:
        yield
    finally:
        if config is not None:
            delattr(config, _LIMIT)
            for name, limit in own.items():
                setattr(config, name, limit)


def convert_delta_rule(context: "NodeContext") -> "list[ov.Output]":
    """Return the recurrence of a gated delta rule as the loop that OpenVINO fuses.

    :param context: node with the inputs query, key, value, logarithm of the decay, beta, state.
    """
    from optimum.exporters.openvino._ov_ops import convert_recurrent_attention_cell

    return list(convert_recurrent_attention_cell(context))
