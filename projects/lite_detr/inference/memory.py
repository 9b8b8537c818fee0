"""How the C library hands memory back to the system."""

import ctypes
import logging

logger = logging.getLogger("lite_detr")

# Numbers of mallopt's parameters, of malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, for what it allocates next.

    glibc gives blocks of many MiB back at every free, and the kernel then fills each new one with
    zeros, page by page. What the process once took at its peak is then its own until it ends. Call
    this before the first image; it holds for all of the process.

    Returns:
        Whether the C library takes it; others than glibc go on as they do.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        logger.info("memory that is freed goes back to the system: this is no glibc")
        return False
    # No block is mapped on its own, and the heap's end is never given back.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
