"""``verify <deployment>``: the digests of its files, then its self-test."""

import json
import os
from pathlib import Path

from sqft_export.errors import CertificateError, UserError
from sqft_export.packed.seal import PROVENANCE, require_seal
from sqft_export.probes.document import PROBE, read_probe
from sqft_export.probes.selftest import test_deployment
from sqft_export.probes.setup import Setup
from sqft_export.targets.devices import DEVICE_KINDS
from sqft_export.targets.execution import usable_execution
from sqft_export.targets.folder import check_files, is_deployment


def is_testable(folder: Path) -> bool:
    """Return whether a folder is a deployment, or a merged model with a self-test."""
    return is_deployment(folder) or (folder / PROBE).is_file()


def verify_deployment(
    folder: Path,
    device: str,
    threads: int | None,
    execution: str,
    long: bool,
    json_only: bool,
) -> None:
    """Check digests, run the self-test and print the result.

    A deployment of an older version has no self-test; only its digests are checked.

    :param execution: auto, sparse or dense: our kernels, if they can run; stock: the runtime's.
    :raises UserError: if the folder has no seal and no self-test.
    :raises DamagedError: if a file is missing, added or changed; the self-test is not run then.
    :raises CertificateError: if the self-test fails.
    """
    if device not in DEVICE_KINDS:
        raise UserError(f"--device: found {device!r}; allowed are {', '.join(DEVICE_KINDS)}")
    files = _count_sealed(folder)
    probe = read_probe(folder)
    if probe is None:
        print(
            json.dumps({"folder": str(folder), "files": files})
            if json_only
            else f"{folder}: {files} files match their seal; it has no {PROBE}, so nothing was run"
        )
        return
    kernels = usable_execution(folder, execution, device)
    found = test_deployment(folder, probe, files, Setup(device, threads, kernels), long)
    if json_only:
        print(json.dumps(found.to_json()))
    else:
        print("\n".join(found.lines()))
        if not long and any(one.beyond for one in probe.prompts):
            print("  long prompts were not run; --long runs them")
    if not found.passed:
        raise CertificateError("\n".join([f"{folder}: verify failed:", *found.failures()]))


def _count_sealed(folder: Path) -> int:
    """Check the seal of a deployment and return the number of its files; 0 without a seal."""
    if not os.path.lexists(folder / PROVENANCE) and (folder / PROBE).is_file():
        check_files(folder)
        return 0
    return len(require_seal(folder)["files"])
