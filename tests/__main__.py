"""Runs the tests in two processes; what is given is passed to pytest in both.

    python -m tests -k wire -x

The second one has the tests that leave a core free most of the time (see ``tests.conftest``). What
it prints is shown at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

#: Two vLLMs whose OpenMP threads wait for each other on the same cores would crawl.
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def main() -> int:
    """The worse of the two exit statuses; a half without tests is fine if the other has some."""

    def start(which: str, output: int | None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pytest", "tests", "-m", which, *sys.argv[1:]]
        return subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
        )

    with tempfile.TemporaryFile() as beside:
        halves = [start("not beside", None), start("beside", beside.fileno())]
        try:
            statuses = [half.wait() for half in halves]
        except KeyboardInterrupt:  # both have heard it, too, and stop their servers
            statuses = [half.wait() for half in halves]
        beside.seek(0)
        sys.stdout.buffer.write(beside.read())
    empty = int(pytest.ExitCode.NO_TESTS_COLLECTED)
    return max((status for status in statuses if status != empty), default=empty)


if __name__ == "__main__":
    sys.exit(main())
