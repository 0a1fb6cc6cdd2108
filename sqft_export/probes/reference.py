"""KL divergence of deployments from the reference, by the short prompts of their self-test."""

from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.measure.deployments import names_of
from sqft_export.measure.results import ReferenceDivergence
from sqft_export.probes.document import PROBE, read_probe
from sqft_export.probes.running import compare_session
from sqft_export.probes.setup import Setup


def measure_divergences(
    folders: list[Path], device: str, threads: int | None
) -> dict[str, ReferenceDivergence]:
    """Compare the default mode of every deployment with its ``probe.json``.

    :raises UserError: if a deployment has none.
    """
    found = {}
    for name, folder in zip(names_of(folders), folders, strict=True):
        probe = read_probe(folder)
        if probe is None:
            raise UserError(
                f"{folder}: has no {PROBE}, which --reference needs; export the deployment again"
            )
        short = [one for one in probe.prompts if one.beyond is None]
        compared = compare_session(Setup(device, threads).open(folder, exact=False), short)
        found[name] = ReferenceDivergence(
            positions=len(compared.positions),
            same_top=compared.same_top,
            kl_nats=compared.mean_kl,
            largest_kl_nats=compared.largest_kl,
        )
    return found
