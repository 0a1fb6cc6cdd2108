"""Upload a deployment to the Hugging Face hub in one commit, with its full model card."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqft_export.artifacts.store import files_of
from sqft_export.errors import HostError, UserError, one_line
from sqft_export.inference.hub_card import facts_of, hub_card
from sqft_export.inference.locate import (
    Deployment,
    deployments_of_run,
    find_deployment,
    require_report,
)
from sqft_export.packed.seal import PROVENANCE, Provenance, require_seal, sealed_text
from sqft_export.packed.usage import CARD
from sqft_export.report.document import REPORT, read_report
from sqft_export.targets.folder import is_deployment

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Publication:
    """The files of a repository: paths in the folder, and texts that replace some of them."""

    deployment: Deployment
    paths: dict[str, Path]
    texts: dict[str, str]


def prepare(folder: Path) -> Publication:
    """Check a deployment and write its card; nothing is sent.

    :param folder: a deployment inside a run, or a run, which stands for its best deployment.
    :raises UserError: if the folder is no deployment of a finished run.
    :raises DamagedError: if a file of the deployment was changed.
    """
    found = _deployment_of_run(folder)
    provenance = require_seal(found.path)
    report = read_report(require_report(found.path.parent.parent) / REPORT)
    license = str((provenance.get("base") or {}).get("license") or "unknown")
    card = hub_card((found.path / CARD).read_text(), found, report, facts_of(report, license))
    texts = {CARD: card, PROVENANCE: _seal_with(provenance, CARD, card)}
    paths = {
        str(file.relative_to(found.path)): file
        for file in files_of(found.path, PROVENANCE)
        if file.name != CARD
    }
    return Publication(found, paths, texts)


def _deployment_of_run(folder: Path) -> Deployment:
    """Return the deployment with its row in the run's report."""
    if not is_deployment(folder):
        return find_deployment(folder)
    run = folder.resolve().parent.parent
    for found in deployments_of_run(run):
        if found.path.resolve() == folder.resolve():
            return found
    raise UserError(f"{folder}: is no deployment of the latest report in {run}; give the run")


def _seal_with(provenance: Provenance, name: str, text: str) -> str:
    """Return the text of ``provenance.json`` after a file got another text."""
    content = text.encode()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return sealed_text({**provenance, "files": {**provenance["files"], name: entry}})


def publish(publication: Publication, repository: str, private: bool) -> str:
    """Create the repository if it is missing, upload all files, and return the commit's address.

    :param repository: ``owner/name``.
    :raises UserError: if the name is not valid, or the hub refuses it.
    :raises HostError: if the hub can't be reached.
    """
    from httpx import TransportError  # what the hub's client raises without a connection
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_repository(repository)
    sources = [*publication.paths.items(), *_encoded(publication.texts)]
    operations = [CommitOperationAdd(name, source) for name, source in sources]
    api = HfApi(library_name="sqft-export")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.create_commit(
            repository, operations, commit_message=f"Upload {publication.deployment.name}"
        )
    except LocalTokenNotFoundError as error:
        raise UserError("push: no token of the hub; run `hf auth login` first") from error
    except HfHubHTTPError as error:
        hint = "; `hf auth login` sets a token" if error.response.status_code == 401 else ""
        raise UserError(f"push: {repository}: {one_line(error)}{hint}") from error
    except (OSError, TransportError) as error:
        raise HostError(f"push: the hub can't be reached: {one_line(error)}") from error
    return made.commit_url


def _encoded(texts: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    for name, text in texts.items():
        yield name, text.encode()


def check_repository(repository: str) -> None:
    """Check the name of a repository.

    :raises UserError: if it is not ``owner/name``.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UserError(
            f"push: found repository {one_line(repository)!r}; expected owner/name, with letters, "
            "digits, '-', '_' and '.'"
        )
