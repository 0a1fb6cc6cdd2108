"""The certificate as a typed document."""

from typing import Literal

from sqft_export.documents import Document

Part = Literal["fidelity", "storage", "compute"]


class CheckResult(Document):
    """One line of a certificate.

    unit: of ``differing`` and ``allowed``.
    compared: number of compared things.
    differing: number of different things, or the largest difference.
    where: the first modules, files or texts that differ.
    """

    part: Part
    name: str
    unit: str
    allowed: int | float
    compared: int
    differing: int | float
    where: list[str]
    passed: bool


class CertificateDocument(Document):
    """``verify.json``: the checks, grouped by part."""

    fidelity: list[CheckResult]
    storage: list[CheckResult]
    compute: list[CheckResult]
