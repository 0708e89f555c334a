"""Memory that stays with the process: glibc's malloc otherwise gives it back after every step of a CPU."""

from __future__ import annotations

import ctypes
import os

_TRIM, _MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
# What says otherwise. LD_PRELOAD may bring another malloc, which has no use for these.
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_heap() -> bool:
    """Let freed tensors of up to 256 MiB be used again without faulting their pages in anew; True if malloc agreed.

    By default malloc maps what is larger than 32 MiB anew each time and gives the top of its heap back, so a step
    faults in its activations again. Not where there is no glibc, nor where the environment says how malloc is to be;
    an older glibc takes no more than 32 MiB.
    """
    if any(name in os.environ for name in _OWN):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    mapped = set_option(_MAP, 2**28) or set_option(_MAP, 2**25)
    return bool(set_option(_TRIM, 2**31 - 1) and mapped)
