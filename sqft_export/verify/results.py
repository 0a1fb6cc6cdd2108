"""The certificate as a typed document."""

from typing import Literal

from sqft_export.documents import Document

Part = Literal["fidelity", "storage", "compute"]


class CheckResult(Document):
    """The result of one check.

    unit: of ``differing`` and ``allowed``.
    compared: number of compared weights, tokens, files or texts.
    differing: number of those that differ, or the largest difference.
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
