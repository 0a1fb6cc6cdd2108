"""Memory that is freed goes back to the system."""

import ctypes
import platform


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps what lies below a piece still in use: where small tensors stay and large ones come
    and go, as in an export, that grows to as much again as what stays.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
