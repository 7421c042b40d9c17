"""A faster BLAS under MLX on Linux CPUs.

MLX's Linux wheels bundle Netlib's reference BLAS, whose matrix product is some 20 times slower
than OpenBLAS's. Both have the same symbols; the one that the process loads first, globally, is
used. On macOS MLX uses Accelerate, and there is nothing to do.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

#: A library's path, or "none" for MLX's own.
VARIABLE = "MLX_RECEIVER_BLAS"

_THREADS = "OPENBLAS_NUM_THREADS"


def use_fast_blas() -> str | None:
    """Load the first OpenBLAS there is; its path or name. To be called before MLX is imported.

    The system's comes first, then those that other packages' wheels (OpenCV's, say) bring along.
    It gets half of the cores, unless OPENBLAS_NUM_THREADS says otherwise: its threads wait for each
    other by spinning, and on cores that vLLM uses too that costs many times what they gain.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    for candidate in _candidates():
        try:
            # NumPy's and SciPy's have other symbols.
            if hasattr(ctypes.CDLL(candidate), "cblas_sgemm"):
                library = ctypes.CDLL(candidate, ctypes.RTLD_GLOBAL)
                if _THREADS not in os.environ and hasattr(library, "openblas_set_num_threads"):
                    library.openblas_set_num_threads(max(1, (os.cpu_count() or 1) // 2))
                logger.debug("MLX's CPU backend uses %s", candidate)
                return candidate
        except OSError as error:
            logger.debug("%s cannot be loaded: %s", candidate, error)
    return None


def _candidates() -> Iterator[str]:
    chosen = os.environ.get(VARIABLE, "")
    if chosen == "none":
        return
    if chosen:
        yield chosen
    system = ctypes.util.find_library("openblas")
    if system:
        yield system
    for folder in {sysconfig.get_path("platlib"), sysconfig.get_path("purelib")}:
        yield from map(str, sorted(Path(folder).glob("*.libs/libopenblas*.so*")))
