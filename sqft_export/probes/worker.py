"""Measure the KL divergence of prompts in a separate process, whose environment differs.

python -m sqft_export.probes.worker < job.json
"""

import json
import sys
from pathlib import Path

from sqft_export.probes.causes import measure_kl
from sqft_export.probes.document import ProbePrompt
from sqft_export.probes.setup import OPENVINO_ROUNDING, Change, Setup
from sqft_export.telemetry import disable_telemetry

if __name__ == "__main__":
    disable_telemetry()
    job = json.load(sys.stdin)
    prompts = [ProbePrompt.model_validate(one) for one in job["prompts"]]
    # A processor with bfloat16 uses it by default, and fails if oneDNN may not.
    properties = {} if job["exact"] else OPENVINO_ROUNDING["inference precision"]
    change = Change("", "", Setup(threads=job["threads"], properties=properties), job["exact"])
    print(measure_kl(change, Path(job["folder"]), prompts, job["exact"]))
