"""What decodes here, for people, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from importlib import metadata


def engine_name() -> str:
    """The decoding engine and its version, e.g. "mlx 0.32.4"."""
    return f"mlx {metadata.version('mlx')}"


def machine_name() -> str:
    """What decodes, and its memory, e.g. "Apple M3 Ultra, 96 GiB"."""
    import mlx.core as mx

    info = mx.device_info()
    name = str(info.get("device_name") or platform.machine())
    memory = int(
        info.get("memory_size") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    return f"{name}, {memory / 2**30:.0f} GiB"


def release_memory() -> None:
    """Give freed buffers back to the system; MLX and glibc would keep them."""
    import mlx.core as mx

    mx.clear_cache()
    if sys.platform == "linux":
        # On a Mac, and on a GPU, MLX does not use malloc for its arrays.
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
