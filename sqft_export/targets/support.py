"""State of each target: run in the tests, run by us, or from its documentation only.

``list targets`` and docs/reference/targets.md show this table.
"""

from dataclasses import dataclass

from sqft_export.targets.grids import OPENVINO_GPU_SOURCE, OPENVINO_NPU_SOURCE

TESTS, DOCUMENTATION = "run in the tests", "from documentation only"
ORT_CUDA_GUIDE = "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html"
LLAMA_BUILD_GUIDE = "https://github.com/ggml-org/llama.cpp/blob/master/docs/build.md"


@dataclass(frozen=True)
class Support:
    """The state of one device of a runtime.

    device: a kind of device, as ``--device`` takes it; for web, the browser's device.
    evidence: ``TESTS``, ``DOCUMENTATION``, or ``run by us on <hardware> on <date>``.
    about: the tested machine, or the requirements in the documentation.
    source: the test file or the address of the documentation.
    """

    runtime: str
    device: str
    evidence: str
    about: str
    source: str


SUPPORT = (
    Support("openvino", "cpu", TESTS, "x86 with AVX2 or AVX-512", "tests/targets"),
    Support("openvino", "kernels", TESTS, "our kernels, on AVX2 or AVX-512", "tests/kernels"),
    Support(
        "openvino",
        "gpu",
        DOCUMENTATION,
        "Intel GPU; groups of a multiple of 32, or one per row",
        OPENVINO_GPU_SOURCE,
    ),
    Support(
        "openvino",
        "npu",
        DOCUMENTATION,
        "INT4 symmetric, groups of 128 or one per row; OpenVINO GenAI makes its shapes static",
        OPENVINO_NPU_SOURCE,
    ),
    Support("onnx", "cpu", TESTS, "x86 with AVX2 or AVX-512", "tests/targets"),
    Support("onnx", "gpu", DOCUMENTATION, "CUDA, or DirectML on Windows", ORT_CUDA_GUIDE),
    Support(
        "onnx",
        "webgpu",
        TESTS,
        "on SwiftShader, a Vulkan driver that computes on the CPU",
        "tests/targets/test_webgpu.py",
    ),
    Support("gguf", "cpu", TESTS, "x86 with AVX2", "tests/targets/test_gguf.py"),
    Support(
        "gguf",
        "vulkan",
        TESTS,
        "on lavapipe, a Vulkan driver that computes on the CPU",
        "tests/targets/test_vulkan.py",
    ),
    Support("gguf", "cuda", DOCUMENTATION, "CUDA 12", LLAMA_BUILD_GUIDE),
    Support("web", "cpu", TESTS, "the page's file in ONNX Runtime", "tests/web"),
    Support("web", "wasm", TESTS, "headless Chromium", "tests/web"),
    Support(
        "web",
        "webgpu",
        TESTS,
        "headless Chromium on SwiftShader, a driver that computes on the CPU",
        "tests/web",
    ),
    Support("torch", "cpu", TESTS, "all passes", "tests"),
    Support(
        "torch",
        "gpu",
        "run by us on an NVIDIA H200 on 2026-11-27",
        "pruning, quantizing and training; not a deployment",
        "docs/tutorials/gpu.md",
    ),
)


def evidence_of(runtime: str, device: str) -> str:
    """Return the state of a device of a runtime; empty if the table has no line."""
    found = (one.evidence for one in SUPPORT if (one.runtime, one.device) == (runtime, device))
    return next(found, "")


def support_summary() -> str:
    """Return a short table in Markdown: state -> targets."""
    states: dict[str, list[str]] = {}
    for one in SUPPORT:
        states.setdefault(one.evidence, []).append(f"{one.runtime} {one.device}")
    lines = ["| state | targets and devices |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {state} | {', '.join(n)} |" for state, n in states.items())])


def support_table() -> str:
    """Return the complete table in Markdown."""
    lines = ["| runtime | device | state | about | source |", "| --- | --- | --- | --- | --- |"]
    for one in SUPPORT:
        source = f"<{one.source}>" if one.source.startswith("http") else f"`{one.source}`"
        cells = (one.runtime, one.device, one.evidence, one.about, source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
