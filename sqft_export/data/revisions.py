"""The commit of a dataset on the hub, for cache keys."""

from pathlib import Path


def dataset_revision(name: str, wanted: str | None, online: bool) -> str | None:
    """Return the commit of a dataset from the hub, or else from the local cache.

    If neither is known, returns ``wanted``.

    :param wanted: commit, tag or branch; None: main.
    :param online: whether to query the hub; if false, no request leaves this machine.
    """
    from huggingface_hub import HfApi, constants

    if online:
        try:
            return HfApi().dataset_info(name, revision=wanted, timeout=10).sha
        except Exception:  # offline, private or deleted: use the local cache
            pass
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs"
    file = folder / (wanted or "main")
    return file.read_text().strip() if file.is_file() else wanted
