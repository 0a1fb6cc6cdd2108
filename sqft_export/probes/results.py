"""The result of a self-test as a typed document."""

from typing import Literal, Self

from sqft_export.documents import Document, MayBeMissing

Mode = Literal["exact", "default"]


class TokenDifference(Document):
    """The first generated token that differs.

    step: number of the generated token.
    margin: log-probability by which the reference prefers ``expected`` to its second token.
    """

    prompt: int
    step: int
    expected: int
    found: int
    margin: float


class ModeResult(Document):
    """A runtime in one mode, compared with the reference.

    positions: number of compared positions.
    same_top: number of those with the same argmax token.
    mean_kl, largest_kl: KL divergence from the reference, in nats per token.
    allowed: of ``largest_kl`` in exact mode, of ``mean_kl`` in default mode.
    skipped: reason why the mode was not run.
    placement: parts of the model that an accelerator computes, see ``targets.Session``.
    error: message of a runtime that failed.
    """

    mode: Mode
    positions: int
    same_top: int
    mean_kl: float
    largest_kl: float
    allowed: float
    passed: bool
    first_difference: MayBeMissing[TokenDifference] = None
    skipped: MayBeMissing[str] = None
    error: MayBeMissing[str] = None
    placement: MayBeMissing[str] = None

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"{self.mode} mode: not run: {self.skipped}"
        if self.error is not None:
            return f"{self.mode} mode: {self.error}"
        kind, value = "mean", self.mean_kl
        if self.mode == "exact":
            kind, value = "largest", self.largest_kl
        text = (
            f"{self.mode} mode: {kind} KL divergence {value:.2g} nats per token (allowed "
            f"{self.allowed:g}), same top token at {self.same_top} of {self.positions} positions"
        )
        if first := self.first_difference:
            text += (
                f", first differing token: prompt {first.prompt}, generated token {first.step}: "
                f"{first.found} where {first.expected} is expected (margin {first.margin:.2g} nats)"
            )
        return f"{text}; {self.placement}" if self.placement else text


class TextResult(Document):
    """Texts or messages whose token ids were compared with those of training.

    unit: texts or tokens.
    where: the first text or token that differs.
    cause: the likely cause of a difference.
    """

    name: str
    unit: str
    compared: int
    differing: int
    where: list[str]
    cause: str

    @classmethod
    def of(
        cls, name: str, unit: str, compared: int, differing: int, where: list[str], cause: str
    ) -> Self:
        """Return a result; the cause is kept only if something differs."""
        return cls(
            name=name,
            unit=unit,
            compared=compared,
            differing=differing,
            where=where,
            cause=cause if differing else "",
        )

    @property
    def passed(self) -> bool:
        return not self.differing

    def __str__(self) -> str:
        where = f" ({', '.join(self.where)})" if self.where else ""
        return f"{self.name}: {self.differing} of {self.compared} {self.unit} differ{where}"


class SelfTest(Document):
    """The result of ``verify <deployment>``.

    files: number of files that match their seal; 0 without a seal.
    kernels: stock, or the requested kernels; for GGUF, the name of llama.cpp's.
    threads: CPU threads; missing for the runtime's choice.
    texts: tokenizers and chat templates.
    causes: likely causes of failures, with the setting that was changed to find each.
    """

    folder: str
    runtime: str
    device: str
    kernels: str
    threads: MayBeMissing[int] = None
    files: int
    modes: list[ModeResult]
    texts: list[TextResult]
    causes: list[str]
    passed: bool

    def lines(self) -> list[str]:
        """Return the lines for the terminal."""
        sealed = f"{self.files} files match their seal" if self.files else "no seal to compare with"
        ours = "" if self.kernels in ("stock", "llama.cpp") else f" ({self.kernels})"
        found = [f"{self.folder}{ours}: {sealed}"]
        found += [f"  {'passed' if one.passed else 'FAILED'}  {one}" for one in self.texts]
        for mode in self.modes:
            state = "passed" if mode.passed else "FAILED"
            found.append(f"  {state if mode.skipped is None else 'skipped'}  {mode}")
        return [*found, *(f"  likely cause: {cause}" for cause in self.causes)]

    def failures(self) -> list[str]:
        """Return the failed lines and their likely causes."""
        failed = [str(one) for one in self.texts if not one.passed]
        failed += [str(one) for one in self.modes if not one.passed]
        return [*failed, *(f"likely cause: {cause}" for cause in self.causes)]
