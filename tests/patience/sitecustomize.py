"""Python runs this first in every process that the tests start (see ``tests.conftest``).

vLLM's processes call ``sched_yield`` in a loop for a second after each step. Linux 6.18's scheduler
loses track by such loops (mended in commit 1319ea57529e, "Fix zero_vruntime tracking fix"): on two
cores, threads of other processes then waited over 20 s for a core, more than any time limit here.
"""

import os
import time


def _wait_a_moment() -> None:
    time.sleep(0.0001)


if hasattr(os, "sched_yield"):
    os.sched_yield = _wait_a_moment
