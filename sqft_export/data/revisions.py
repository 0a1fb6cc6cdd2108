"""Which commit of a dataset on the hub is meant, for keys."""

from pathlib import Path


def dataset_revision(name: str, wanted: str | None, online: bool) -> str | None:
    """The commit of a dataset: the hub's, or that of the local cache; None where neither is known.

    :param wanted: commit, tag or branch; None: main.
    :param online: ask the hub; else nothing leaves this machine.
    """
    from huggingface_hub import HfApi, constants

    if online:
        try:
            return HfApi().dataset_info(name, revision=wanted, timeout=10).sha
        except Exception:  # offline, private, away: what is here decides
            pass
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs"
    file = folder / (wanted or "main")
    return file.read_text().strip() if file.is_file() else wanted
