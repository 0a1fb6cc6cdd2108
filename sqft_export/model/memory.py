"""Return freed memory to the operating system."""

import ctypes
import platform


def release_memory() -> None:
    """Return freed memory to the operating system, with glibc.

    glibc keeps freed memory that lies below a block still in use. An export keeps small tensors and
    frees large ones, so the kept free memory would grow as large as the memory in use.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
