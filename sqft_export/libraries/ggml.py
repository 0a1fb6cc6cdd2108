"""List llama.cpp's GPUs as JSON: ``python -P -m sqft_export.libraries.ggml Vulkan``.

cyllama returns the names of devices. Their free memory and a test of the driver need ggml's C
functions, which its wheel holds under file names with a hash. ggml ends the process if a driver
lacks a feature. Therefore this runs in a separate process (``targets/offload.py``).
"""

import ctypes
import json
import sys
from pathlib import Path

DISTRIBUTION = "cyllama"
PRIVATE = (
    "cyllama.llama.llama_cpp:ggml_backend_load_all",
    "cyllama.llama.llama_cpp:ggml_backend_dev_info",
    "cyllama.llama.llama_cpp:disable_logging",
)
LIBRARY_FOLDERS = ("cyllama*.libs", "cyllama/.dylibs")  # next to the package, by wheel tool


def wheel_libraries() -> list[Path]:
    """Return ggml's libraries in the wheel of cyllama, without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("cyllama")
    if spec is None or spec.origin is None:
        return []
    site = Path(spec.origin).parent.parent
    folders = [folder for pattern in LIBRARY_FOLDERS for folder in site.glob(pattern)]
    return sorted(file for folder in folders for file in folder.glob("*ggml*"))


def has_backend(backend: str) -> bool:
    """Return whether the wheel has a backend, such as ``Vulkan``."""
    return any(f"ggml-{backend.lower()}" in file.name for file in wheel_libraries())


def list_gpus(backend: str) -> list[dict[str, object]]:
    """Return number, name, description and free bytes of every GPU of a backend.

    The number is the place among the GPUs of all backends. The process ends if ggml cannot use one.
    """
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()
    gpus = [one for one in llama_cpp.ggml_backend_dev_info() if one["type"] in ("GPU", "iGPU")]
    return [
        {"number": number, "name": one["name"], "description": one["description"]}
        | {"free_bytes": _start_device(one["name"])}
        for number, one in enumerate(gpus)
        if one["name"].startswith(backend)
    ]


def _start_device(name: str) -> int:
    """Start a device, as a loaded model would; return its free memory in bytes."""
    libraries = [
        ctypes.CDLL(str(file)) for file in wheel_libraries() if "ggml-cpu" not in file.name
    ]
    find, memory, start = (
        next(getattr(one, function) for one in libraries if hasattr(one, function))
        for function in (
            "ggml_backend_dev_by_name",
            "ggml_backend_dev_memory",
            "ggml_backend_dev_init",
        )
    )
    find.restype = start.restype = ctypes.c_void_p
    find.argtypes = [ctypes.c_char_p]
    memory.argtypes = [ctypes.c_void_p] * 3
    start.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    device, free, total = find(name.encode()), ctypes.c_size_t(), ctypes.c_size_t()
    memory(device, ctypes.byref(free), ctypes.byref(total))
    start(device, None)
    return free.value


if __name__ == "__main__":
    print(json.dumps(list_gpus(sys.argv[1])))
