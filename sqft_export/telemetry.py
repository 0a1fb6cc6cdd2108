"""Switch off the usage reports of libraries in the processes of this package.

OpenVINO's converter and NNCF report their use through the package ``openvino_telemetry``. ONNX
Runtime, ONNX Runtime GenAI, the Hugging Face libraries and loggers read environment variables. The
command line and its worker processes call :func:`disable_telemetry`. ``import sqft_export`` does
not call it: in the user's own process, the user's settings apply.
"""

import os
import sys

TELEMETRY_VARIABLES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime 1.32 and GenAI 0.18
    "ORT_TELEMETRY_DISABLED": "1",  # other releases
    "ORT_GENAI_TELEMETRY_DISABLED": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",  # trackio's dashboard
    "RAY_USAGE_STATS_ENABLED": "0",
}


def disable_telemetry() -> None:
    """Switch off usage reports in this process and its children.

    Call it before the libraries are imported, because they decide at import.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its import then fails
    os.environ.update(TELEMETRY_VARIABLES)
