"""How the process gets the memory of tensors on CPUs."""

import ctypes
import os
import platform

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # names of parameters in malloc.h
SETTINGS = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "GLIBC_TUNABLES",
)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensors.

    glibc gives large blocks back to the system and takes them anew, page by page, each filled with
    zeros first: a tenth of a segmenter's training where it was last measured. Kept, they leave the
    process as large as it ever was. Settings of the user (`SETTINGS`) stand, other C libraries stay
    as they are.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTINGS):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)  # never
