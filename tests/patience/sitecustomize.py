"""Python runs this first in every process that the tests start (see ``tests.conftest``).

vLLM's processes call ``sched_yield`` in a loop for a second after each step. Linux 6.18's scheduler
loses track by such loops (mended in commit 1319ea57529e, "Fix zero_vruntime tracking fix"): on two
cores, threads of other processes then waited over 20 s for a core, more than any time limit here.

Where ``tests.vision`` asks for it, there is torchvision, in the build for CUDA that a package index
has. Its kernels do not load beside a CPU torch, and it is not imported where they have no names;
what vLLM imports of it, to resize images, needs none.
"""

import os
import sys
import time


def _wait_a_moment() -> None:
    time.sleep(0.0001)


if hasattr(os, "sched_yield"):
    os.sched_yield = _wait_a_moment


class _NamesFirst:
    """Names the kernels, once torchvision is looked for; finds nothing itself."""

    def __init__(self) -> None:
        #: What it named; the names last as long as this does.
        self.declared: object = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision" and self.declared is None:
            from torch import library

            self.declared = kernels = library.Library("torchvision", "DEF")
            for kernel in ("nms", "qnms"):
                kernels.define(f"{kernel}(Tensor dets, Tensor scores, float least) -> Tensor")


if folder := os.environ.get("TESTS_VISION"):
    sys.path.append(folder)
    sys.meta_path.insert(0, _NamesFirst())
