"""The whole certificate of a run, and of a run that is there again."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from sqft_export.errors import DamagedError, UserError
from sqft_export.run.artifact import MANIFEST, Artifact, Store, check_artifact, read_artifact
from sqft_export.run.device import CPU
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.compute import check_compute
from sqft_export.verify.fidelity import check_fidelity, reference_of
from sqft_export.verify.lengths import check_lengths
from sqft_export.verify.storage import check_storage
from sqft_export.verify.subject import BEFORE, Asked, Subject


def certify(
    subject: Subject, advance: Callable[[], None], device: torch.device = CPU
) -> Certificate:
    """:param advance: called after fidelity, and after every deployment.
    :param device: where torch computes.
    """
    certificate = Certificate()
    reference = reference_of(subject, device)
    check_fidelity(certificate, subject, reference)
    advance()
    for name in subject.exports:
        check_storage(certificate, subject, name)
        check_compute(certificate, subject, name, reference)
        check_lengths(certificate, subject, name, reference)
        advance()
    return certificate


def certified_artifacts(root: Path) -> list[Path]:
    """Artifacts of ``verify`` in a run's folder, the newest first.

    :raises UserError: if there is none.
    """
    found = [file.parent for file in root.glob(f"verify-*/{MANIFEST}")]
    if not found:
        raise UserError(f"{root}: neither a deployment nor a run with a certificate in it")
    return sorted(found, key=lambda path: (path / MANIFEST).stat().st_mtime, reverse=True)


def _parents(artifact: Artifact) -> dict[str, str]:
    """Stage and key of every artifact that one was made from.

    :raises DamagedError: if a name could lead out of the run's folder.
    """
    found = artifact.manifest["facts"].get("parents")
    names = found.items() if isinstance(found, dict) else [("", "")]
    if not all(re.fullmatch(r"[a-z-]+", n) and re.fullmatch(r"[0-9a-f]{64}", k) for n, k in names):
        raise DamagedError(f"{artifact.path / MANIFEST}: facts: parents: expected stages and keys")
    return dict(names)


def certify_again(root: Path, scratch: Path) -> tuple[list[Artifact], Certificate]:
    """Every digest and line of a finished run, derived from its files alone.

    :param root: folder of a run, such as ``runs/tiny``.
    :param scratch: for what is inflated on the way.
    :return: the artifacts that the certificate is about, and the certificate.
    :raises DamagedError: naming the file that is not as it was sealed.
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
        {n: chain[n].path / "model" for n in BEFORE if n in chain},
        chain["sparsify"].path if "sparsify" in chain else None,
        chain["search"].path if "search" in chain else verified.path,
        chain["merge"].path,
        exports,
        read_artifact(verified.path).manifest["facts"]["options"]["dense_update"],
        scratch,
    )
    return [*chain.values(), verified], certify(subject, lambda: None)
