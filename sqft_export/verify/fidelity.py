"""Compare the merged model with the unmerged model, by operands captured in its forward."""

import numpy as np
import torch
from torch import Tensor

from sqft_export.adapters.evidence import CapturedForward, row_digests
from sqft_export.adapters.files import AdapterFiles, read_low_rank
from sqft_export.data.items import load_tokenizer
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import Edit, Reference
from sqft_export.model.storage import load_grids, read_quantized
from sqft_export.numerics.affine import dequantize, quantize, widen_to_4_bits
from sqft_export.numerics.codes import Grid, QuantizedWeight
from sqft_export.verify.certificate import Certificate, Check, count_in_parallel
from sqft_export.verify.subject import Subject

# Allowed logit difference, in standard deviations, if weights are merged into 16-bit floats: these
# are rounded once. INT4 codes are not rounded again.
MERGE_TOLERANCE = {"float16": 1e-2, "bfloat16": 1e-1}


@torch.no_grad()
def check_fidelity(certificate: Certificate, subject: Subject, reference: Reference) -> None:
    """Check zeros, weights, codes, logits and token ids of the merged model."""
    evidence = CapturedForward.read(subject.captured)
    _check_zeros(certificate, subject, evidence)
    forward = f"the {subject.origin} forward"
    weights = certificate.start("fidelity", f"weights of {forward}, merged", "rows")
    others = certificate.start("fidelity", "embeddings, norms, biases, merged", "rows")

    def count(name: str, weights: Check, others: Check) -> None:
        rows, found = evidence.rows[name], _merged_rows(subject, name, evidence.dtypes[name])
        check = weights if name in subject.merged.linears or ".lora_" in name else others
        differs = np.ones(rows.shape, bool)
        if found is not None and found.shape == rows.shape:
            differs = found != rows
        check.count(differs, name)

    count_in_parallel(count, evidence.rows, weights, others)
    for name in subject.merged.linears.keys() - evidence.rows.keys():
        weights.count(np.ones(1, bool), f"{name} was not seen in {forward}")
    if subject.origin == "compressed":
        _check_codes(certificate, subject)
    _check_logits(certificate, subject, evidence, reference)
    _check_tokens(certificate, subject)


def _check_codes(certificate: Certificate, subject: Subject) -> None:
    """Check that the merged codes are those of the quantizer, if nothing was trained."""
    if "quantize" not in subject.passes:
        return
    quantized, folder = Checkpoint(subject.passes["quantize"]), subject.passes["quantize"].parent
    title = "codes, scales, zero points: quantize and merged"
    check = certificate.start("fidelity", title, "numbers")

    def count(found: tuple[str, Grid], check: Check) -> None:
        name, grid = found
        codes = quantize(quantized.tensor(f"{name}.weight").float(), grid)
        merged = read_quantized(subject.merged, subject.merged.stored_name(name)).numpy()
        expected = widen_to_4_bits(QuantizedWeight(codes, grid)).numpy()
        check.compare(expected, merged, name)

    count_in_parallel(count, load_grids(folder).items(), check)


def _merged_rows(subject: Subject, name: str, dtype: str) -> np.ndarray | None:
    """Return the row digests of a merged weight or parameter, or None if the model has none.

    :param dtype: of the forward before merging; the weight is cast to it first.
    """
    merged = subject.merged
    module, _, part = name.rpartition(".")
    if part in ("lora_A", "lora_B"):
        assert subject.adapter is not None
        lora_a, lora_b, _ = AdapterFiles(subject.adapter).update(module)
        return row_digests((lora_a if part == "lora_A" else lora_b).to(getattr(torch, dtype)))
    weight = _weight(merged, name, set(subject.quantized))
    return None if weight is None else row_digests(weight.to(getattr(torch, dtype)))


def _weight(merged: Checkpoint, name: str, quantized: set[str]) -> Tensor | None:
    """Return a weight or parameter as floats, or None if the checkpoint has none."""
    module = name if name in merged.linears else name.rpartition(".")[0]
    stored = merged.stored_name(module)
    if stored in quantized and (name == module or name.endswith(".weight")):
        return dequantize(*read_quantized(merged, stored))
    part = "weight" if name == module else name.rpartition(".")[2]
    key = f"{stored if part == 'weight' else module}.{part}"  # a tied head has its own bias
    return merged.tensor(key) if key in merged.headers else None


def _zeros(certificate: Certificate, name: str) -> Check:
    return certificate.start("fidelity", f"pruned positions zero in {name}", "positions")


def _check_zeros(certificate: Certificate, subject: Subject, evidence: CapturedForward) -> None:
    """Check that pruned positions are zero after every pass and in every layer."""
    if not subject.pruned:
        return
    passes = {name: Checkpoint(folder) for name, folder in subject.passes.items()}
    pass_checks = [_zeros(certificate, name) for name in passes]
    after: list[Check] = []
    if not subject.dense_update:  # a dense update makes pruned positions nonzero
        names = f"the {subject.origin} forward", "the merged model"
        after = [_zeros(certificate, name) for name in names]
    quantized = set(subject.quantized)

    def count(linear: str, *checks: Check) -> None:
        dropped = subject.dropped(linear, subject.merged.linears[linear])
        for checkpoint, check in zip(passes.values(), checks, strict=False):
            weight = checkpoint.tensor(f"{linear}.weight")
            check.count_zeros(dropped, (weight != 0).numpy(), linear)
        if not after:
            return
        in_forward, merged = checks[len(passes) :]
        positions, kept = evidence.pruned.get(linear, (0, 0))
        in_forward.compared += positions
        in_forward.blame(linear, kept)
        found = _weight(subject.merged, linear, quantized)
        assert found is not None
        merged.count_zeros(dropped, (found != 0).numpy(), linear)

    count_in_parallel(count, sorted(subject.pruned), *pass_checks, *after)


def _check_logits(
    certificate: Certificate, subject: Subject, evidence: CapturedForward, reference: Reference
) -> None:
    rounding = max(MERGE_TOLERANCE.get(dtype, 0) for dtype in evidence.dtypes.values())
    check = certificate.start(
        "fidelity",
        f"logits of the {subject.origin} model and merged",
        "standard deviations",
        max(subject.asked.tolerance, rounding),
    )
    row = 0
    both = zip(evidence.sequences, reference.logits(evidence.sequences), strict=True)
    for number, (sequence, found) in enumerate(both):
        before = evidence.logits[row : row + len(sequence)]
        row += len(sequence)
        worst = np.abs(before - found).max() / before.std()
        check.record_largest(float(worst), found.size, f"sequence {number}")


def _check_tokens(certificate: Certificate, subject: Subject) -> None:
    check = certificate.start("fidelity", "token ids: base and merged", "texts")
    tokenizer = load_tokenizer(subject.merged.folder)
    for text, ids in subject.asked.texts:
        found = tokenizer(text)["input_ids"]
        check.count(np.array([found != ids]), repr(text[:40]))


def load_reference(subject: Subject, device: torch.device, edit: Edit | None = None) -> Reference:
    """Return the merged model in torch, with the adapter if it was not merged.

    :param edit: changes every float weight, as for :class:`Reference`.
    """
    updates = read_low_rank(subject.adapter) if subject.adapter else None
    return Reference(subject.merge / "model", updates, device, edit=edit)
