"""Build the certificate of a run, or recompute it from the files of a finished run."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from sqft_export.artifacts.store import MANIFEST, Artifact, Store, check_artifact
from sqft_export.errors import DamagedError, UserError
from sqft_export.machine.device import CPU
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.compute import check_compute
from sqft_export.verify.fidelity import check_fidelity, load_reference
from sqft_export.verify.heads import reference_of
from sqft_export.verify.lengths import check_lengths
from sqft_export.verify.storage import check_storage
from sqft_export.verify.subject import MASKED_PASSES, Asked, Subject


def certify(
    subject: Subject, advance: Callable[[], None], device: torch.device = CPU
) -> Certificate:
    """Run every check and return the certificate.

    :param advance: called after the fidelity checks and after every deployment.
    :param device: device of the torch reference.
    """
    certificate = Certificate()
    reference = load_reference(subject, device)
    check_fidelity(certificate, subject, reference)
    advance()
    for name in subject.exports:
        check_storage(certificate, subject, name)
        expected = reference_of(certificate, subject, name, reference)
        check_compute(certificate, subject, name, expected)
        check_lengths(certificate, subject, name, expected)
        advance()
    return certificate


def certified_artifacts(root: Path) -> list[Path]:
    """Return the artifacts of ``verify`` in the folder of a run, newest first.

    :raises UserError: if the folder has no such artifact.
    """
    found = [file.parent for file in root.glob(f"verify-*/{MANIFEST}")]
    if not found:
        raise UserError(f"{root}: is neither a deployment nor a run with a certificate")
    return sorted(found, key=lambda path: (path / MANIFEST).stat().st_mtime, reverse=True)


def _parents(artifact: Artifact) -> dict[str, str]:
    """Return stage -> key of the artifacts that an artifact was made from.

    :raises DamagedError: if a name could lead out of the run's folder.
    """
    found = artifact.manifest["facts"].get("parents")
    names = found.items() if isinstance(found, dict) else [("", "")]
    if not all(re.fullmatch(r"[a-z-]+", n) and re.fullmatch(r"[0-9a-f]{64}", k) for n, k in names):
        raise DamagedError(f"{artifact.path / MANIFEST}: facts: parents: expected stages and keys")
    return dict(names)


def certify_again(root: Path, scratch: Path) -> tuple[list[Artifact], Certificate]:
    """Recompute all digests and re-run every check of a finished run from its files.

    :param root: folder of a run, such as ``runs/tiny``.
    :param scratch: folder for inflated files.
    :return: the checked artifacts, and the certificate.
    :raises DamagedError: naming the file that has changed since it was sealed.
    """
    verified = check_artifact(certified_artifacts(root)[0])
    store = Store(root)
    chain = {
        name: check_artifact(store.path_of(name, key), key)
        for name, key in _parents(verified).items()
    }
    exports = {n.removeprefix("export-"): a.path for n, a in chain.items() if n[:7] == "export-"}
    subject = Subject(
        Asked.read(verified.path),
        {n: chain[n].path / "model" for n in MASKED_PASSES if n in chain},
        chain["sparsify"].path if "sparsify" in chain else None,
        chain["search"].path if "search" in chain else verified.path,
        chain["merge"].path,
        exports,
        bool(verified.manifest["facts"]["options"]["dense_update"]),
        scratch,
    )
    return [*chain.values(), verified], certify(subject, lambda: None)
