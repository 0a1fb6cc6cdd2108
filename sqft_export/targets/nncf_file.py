"""OpenVINO files that NNCF's weight compression has quantized, as OpenVINO's users make them."""

import shutil
from pathlib import Path

import numpy as np
import openvino as ov

from sqft_export.targets.folder import GRAPHS


def compress_ir(source: Path, folder: Path, samples: list[list[int]], group_size: int) -> None:
    """Write a copy of a float IR in symmetric INT4, with AWQ and scale estimation.

    Embedding and head become INT8, which is NNCF's default.

    :param source: OpenVINO folder with float weights.
    :param samples: token ids of the calibration samples.
    :param group_size: inputs per scale; -1: one scale per row.
    """
    import nncf
    from nncf.quantization.advanced_parameters import GroupSizeFallbackMode

    file = GRAPHS["openvino"]
    kept = shutil.ignore_patterns(file, Path(file).with_suffix(".bin").name)
    shutil.copytree(source, folder, ignore=kept)
    graph = ov.Core().read_model(source / file)
    names = {name for port in graph.inputs for name in port.names}
    feeds = [{k: v for k, v in _inputs(ids).items() if k in names} for ids in samples]
    graph = nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=group_size,
        awq=True,
        scale_estimation=True,
        dataset=nncf.Dataset(feeds),
        subset_size=len(feeds),
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=16
        ),
    )
    ov.save_model(graph, folder / file, compress_to_fp16=False)


def _inputs(ids: list[int]) -> dict[str, np.ndarray]:
    """Return the inputs of a stateful IR for one sample."""
    row = np.array([ids], np.int64)
    return {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "position_ids": np.arange(row.shape[1], dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
