"""Format results as plain text and as Markdown. Needs no library."""

from textwrap import indent
from typing import TYPE_CHECKING

from sqft_export.machine.host import size_text
from sqft_export.machine.processors import busy_text
from sqft_export.machine.progress import duration

if TYPE_CHECKING:
    from sqft_export.measure.results import Accuracy, DeploymentResults, FolderAccuracy
    from sqft_export.plan.document import GpuNeed, Need, PlanDocument, PlannedPass
    from sqft_export.plan.speeds import Speeds

# How plan estimates lengths without the model's tokenizer or the data.
LENGTH_ESTIMATES = {
    "words": "lengths are estimated from words, digits and punctuation: the model's tokenizer is "
    "not on this machine",
    "longest": "lengths are assumed to be the longest allowed: the data is not on this machine",
}


def accuracy_text(row: "Accuracy") -> str:
    """Return the accuracy in percent, with its 95 % interval if it has one."""
    share = f"{100 * row.accuracy:.1f} %"
    if row.interval is None:
        return share
    low, high = row.interval
    return f"{share} ({100 * low:.1f} to {100 * high:.1f})"


def _gpu_line(need: "GpuNeed") -> str:
    """Return the smallest number of GPUs of one size, and what does not fit on them."""
    size, needed = size_text(need.gpu_bytes), size_text(need.needed_bytes)
    if need.count is None:
        return f"  GPUs of {size}: too small; each needs {needed}, however many there are"
    word = "GPU" if need.count == 1 else "GPUs"
    training = " with FSDP2" if need.count > 1 else ""
    text = f"  {need.count} {word} of {size}{training}: {needed} on each"
    if need.too_large:
        names, most = ", ".join(need.too_large), size_text(max(need.too_large.values()))
        text += f"; {names} hold the whole model ({most}): device=cpu, or a larger GPU"
    return text


def plan_text(plan: "PlanDocument") -> str:
    """Return a plan as text."""
    lines = [f"{plan.recipe}: {plan.model}, {plan.weights:,} weights"]
    for step in plan.passes:
        lines.append(
            f"  {step.name:16} {'cached' if step.cached else 'to run'} "
            f"{size_text(step.predicted_bytes):>12} on disk"
            f"{size_text(step.predicted_memory_bytes):>12} of memory"
            f"  {_duration_text(step)}"
        )
    needs = {"disk": plan.disk, "memory": plan.memory, "device memory": plan.device_memory}
    lines += [_need_line(name, need) for name, need in needs.items() if need]
    if any(need.count != 1 for need in plan.gpus):  # else a single GPU is enough
        lines += map(_gpu_line, plan.gpus)
    lines += _speed_lines(plan.machine)
    if counted := LENGTH_ESTIMATES.get(plan.lengths_counted):
        lines.append(f"  {counted}")
    lines.append(f"  total time on this machine: {range_text(*plan.seconds_range)}")
    if plan.within_a_day:
        lines.append(f"  within a day: {plan.within_a_day}")
    if plan.expectation:
        lines.append(f"  expectation: {plan.expectation}")
    if plan.gguf:
        lines.append(f"  gguf: {plan.gguf}")
    if plan.sparse_execution:
        lines.append(f"  sparse execution {plan.sparse_execution}")
    lines += [f"  {device}: {verdict}" for device, verdict in plan.accepted_by.items()]
    for name, size in plan.group_size_fallback.items():
        lines.append(
            f"  {name}: group_size {plan.group_size} does not divide its number of inputs; "
            f"{size} is used"
        )
    lines += [f"  warning: {warning}" for warning in plan.warnings]
    if plan.first_example:
        lines += ["  first training example:", indent(plan.first_example, "    ")]
    return "\n".join(lines)


def _need_line(name: str, need: "Need") -> str:
    enough = need.free_bytes >= need.needed_bytes
    short = "" if enough else ": too little, `run` will refuse to start"
    needed, free = size_text(need.needed_bytes), size_text(need.free_bytes)
    return f"  {name} {needed} needed, {free} free{short}"


def _speed_lines(machine: "Speeds") -> list[str]:
    """Return the measured speeds of this machine, and whether it was busy at that time."""
    device = machine.device
    float32, bfloat16 = (device.products[name] / 1e9 for name in ("float32", "bfloat16"))
    lines = [
        f"  speed of {device.name}: {float32:.0f} GFLOP/s in float32, {bfloat16:.0f} in "
        f"bfloat16; {machine.disk / 1e6:.0f} MB/s disk"
    ]
    if busy := busy_text(machine.others):
        lines.append(f"  measured on a busy machine: {busy}; an idle machine takes less time")
    return lines


def _duration_text(step: "PlannedPass") -> str:
    """Return the predicted duration of a pass, and the measured one if it is cached."""
    taken = step.taken_seconds
    predicted = "time depends on data that is not on this machine"
    if step.seconds_range is not None:
        predicted = range_text(*step.seconds_range)
    if step.seconds_from == "earlier run" and taken is None:
        predicted += ", as an earlier run took"
    return predicted if taken is None else f"{predicted}, took {duration(taken)}"


def range_text(low: float, high: float) -> str:
    """Format a range of seconds: ``8 to 16 min``, ``50 s to 2 min``, ``1 s``."""
    least, most = duration(low), duration(high)
    if least == most:
        return most
    same_unit = least.split()[1] == most.split()[1]
    return f"{least.split()[0] if same_unit else least} to {most}"


def deployments_text(document: "DeploymentResults") -> str:
    """Return the measurements of deployments as text for a terminal."""
    lines = _latency_table(document)
    lines += [f"{name}: {note}" for name, row in document.folders.items() for note in row.notes]
    for ratio in document.ratios:
        note = f"  ({ratio.warning})" if ratio.warning else ""
        lines.append(
            f"{ratio.figure}: {ratio.folder} / {ratio.over} = {ratio.ratio:.2f} "
            f"({ratio.low:.2f} to {ratio.high:.2f}){note}"
        )
    lines += map(_accuracy_line, document.accuracy)
    for row in document.agreement:
        lines.append(
            f"agreement: {row.folder} {row.agreement:.1%} ({row.low:.1%} to {row.high:.1%}) of "
            f"{row.tokens} tokens, KL {row.kl_nats:.2g} nats per token"
        )
    for folder, found in document.reference.items():
        lines.append(
            f"reference: {folder} KL {found.kl_nats:.2g} nats per token (largest "
            f"{found.largest_kl_nats:.2g}), same top token at {found.same_top} of "
            f"{found.positions} positions"
        )
    for folder, tasks in document.lm_eval.items():
        for task, figures in tasks.items():
            listed = ", ".join(f"{k.removesuffix(',none')} {v:.4g}" for k, v in figures.items())
            lines.append(f"lm-eval: {folder} {task}: {listed}")
    machine = document.machine
    versions = ", ".join(f"{k} {v}" for k, v in document.versions.items())
    lines.append(f"{machine.processor}, {machine.cores} cores, {versions}")
    return "\n".join(lines)


def _accuracy_line(row: "FolderAccuracy") -> str:
    interval = test = ""
    if row.interval is not None:
        interval = f" ({row.interval[0]:.1%} to {row.interval[1]:.1%})"
        test = f", compared with the first: McNemar p = {row.p_same_as_first:.2g}"
    perplexity = f"perplexity {row.perplexity:.3f}"
    if row.perplexity_interval is not None:
        perplexity += " ({:.3f} to {:.3f})".format(*row.perplexity_interval)
    return f"accuracy: {row.folder} {row.accuracy:.1%}{interval}, {perplexity}{test}"


def _latency_table(document: "DeploymentResults") -> list[str]:
    first = next(iter(document.folders.values()))
    lengths, batches = list(first.ttft_ms), list(first.tokens_per_second)
    header = ["deployment", "files MB", "load s", *(f"TTFT ms ({n})" for n in lengths)]
    header += ["TPOT ms", "p90", "p99", *(f"tokens/s x{b}" for b in batches)]
    header += [f"prompt tokens/s x{b}" for b in batches]
    on_cpu = document.settings.device == "cpu"
    header += ["peak MiB", *([] if on_cpu else ["device MiB"]), "J/token", "W"]
    rows = [header]
    for name, row in document.folders.items():
        tpot, used = row.tpot_ms, row.device_memory_bytes
        cells = [name, f"{row.file_bytes / 1e6:.2f}", f"{row.load_seconds.median:.2f}"]
        cells += [f"{row.ttft_ms[n].median:.2f}" for n in lengths]
        cells += [f"{value:.2f}" for value in (tpot.median, tpot.p90, tpot.p99)]
        cells += [f"{row.tokens_per_second[b]:.0f}" for b in batches]
        cells += [f"{row.prompt_tokens_per_second[b]:.0f}" for b in batches]
        cells += [f"{row.peak_memory_bytes / 2**20:.0f}"]
        cells += [] if on_cpu else [_reading(None if used is None else used / 2**20, 0)]
        cells += [_reading(row.joules_per_token, 2), _reading(row.watts, 1)]
        rows.append(cells)
    return align_columns(rows)


def _reading(value: float | None, digits: int) -> str:
    """Return the value of a counter as text."""
    return "not readable" if value is None else f"{value:.{digits}f}"


def align_columns(rows: list[list[str]]) -> list[str]:
    """Return rows as lines of text: the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]


def markdown(table: list[list[str]], first: str | None) -> str:
    """Return a Markdown table; its first row is the header.

    :param first: a line before the table, or None.
    """
    lines = ["| " + " | ".join(row) + " |" for row in table]
    before = [first, ""] if first else []
    return "\n".join([*before, lines[0], "|" + " --- |" * len(table[0]), *lines[1:]]) + "\n"


def skipped_lines(skipped: dict[str, str]) -> str:
    """Return one Markdown line per skipped target, or an empty text.

    :param skipped: target -> reason.
    """
    lines = [f"- {target} is skipped: {reason}" for target, reason in skipped.items()]
    return "\n".join(["", *lines, ""]) if lines else ""
