"""Runs the tests in two processes; what is given is passed to pytest in both.

    python -m tests -k wire -x

The second one has the tests that leave a core free most of the time (see ``tests.conftest``), and
both share some that come last (see ``tests.sharing``). What it prints is shown at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from tests import sharing, warm

#: Two vLLMs whose OpenMP threads wait for each other on the same cores would crawl.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", warm.VARIABLE: "1",
}  # fmt: skip


def main() -> int:
    """The worst of the exit statuses; a part without tests is fine if another has some."""

    def start(half: str, shared: str, output: int | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pytest", "-p", sharing.__name__, "tests", *sys.argv[1:]]
        environment = ENVIRONMENT | {sharing.VARIABLE: shared, sharing.HALF: half}
        return subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )

    with tempfile.TemporaryFile() as beside, tempfile.TemporaryDirectory() as shared:
        halves = [start("first", shared), start("second", shared, beside.fileno())]
        try:
            statuses = [half.wait() for half in halves]
        except KeyboardInterrupt:  # both have heard it, too, and stop their servers
            return max(abs(half.wait()) for half in halves)
        finally:
            beside.seek(0)
            sys.stdout.buffer.write(beside.read())
            sys.stdout.flush()
    empty = int(pytest.ExitCode.NO_TESTS_COLLECTED)
    # One that a signal ended has a negative status.
    return max((abs(status) for status in statuses if status != empty), default=empty)


if __name__ == "__main__":
    sys.exit(main())
