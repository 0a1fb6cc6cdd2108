"""The folder of the base model that passes read; of a multimodal model, its text model."""

from collections.abc import Callable
from pathlib import Path

from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.wrappers import text_model_folder, write_text_model
from sqft_export.run.digests import model_digest


def base_folder(model: Path, root: Path, sha256_of: Callable[[Path], str], write: bool) -> Path:
    """Return the folder that passes read the base model from.

    The text model of a multimodal model is written into the run's folder once, and found again by
    the digest of the original. Keys of passes depend on the original, so that ``plan``, which
    writes nothing, has the same ones.

    :param root: folder of the run.
    :param write: write a missing text model. Only the first of several processes writes.
    """
    checkpoint = Checkpoint(model)
    if checkpoint.wrapper_config is None:
        return model
    folder = text_model_folder(root, model_digest(model, sha256_of))
    if write and not folder.is_dir():
        write_text_model(checkpoint, folder)
    return folder
