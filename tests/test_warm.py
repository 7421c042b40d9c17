"""What runs the tests: processes that are forked, and files that two runs share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import sharing, warm
from tests.servers import Server
from tests.waiting import eventually
from tests.warm import Forked, Forker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")

SCRIPT = """
import multiprocessing, os, sys, time

def child():
    print("child", os.getpgid(0), flush=True)

if __name__ == "__main__":
    print(*sys.argv[1:], os.environ["GREETING"], os.getcwd(), flush=True)
    started = multiprocessing.get_context("spawn").Process(target=child)
    started.start()
    started.join()
    print("waiting", "json" in sys.modules, flush=True)
    while os.environ["GREETING"] == "wait":
        time.sleep(0.01)
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    made = Forker(("no.such.module", "this", "json"))  # the second one prints
    yield made
    made.close()


def forked(forker: Forker, folder: Path, greeting: str, *what: str) -> tuple[Forked, Path]:
    script, log = folder / "script.py", folder / "log"
    script.write_text(SCRIPT)
    command = [sys.executable, *(what or [str(script)]), "a", "b"]
    return forker.start(command, log, os.environ | {"GREETING": greeting}), log


@pytest.mark.parametrize("what", [(), ("-m", "script")])
def test_it_runs_as_if_it_had_been_started(
    what: tuple[str, ...], forker: Forker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process, log = forked(forker, tmp_path, "hello", *what)
    assert process.wait(20) == process.poll() == process.returncode == 3
    said = log.read_text().splitlines()
    assert said == [f"a b hello {tmp_path}", f"child {process.pid}", "waiting True"]


def test_a_signal_ends_it_and_the_next_one_starts(forker: Forker, tmp_path: Path) -> None:
    process, log = forked(forker, tmp_path, "wait")
    assert eventually(lambda: "waiting" in log.read_text())
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    process.send_signal(signal.SIGTERM)  # to nobody
    again, _ = forked(forker, tmp_path, "hello")
    assert again.wait(20) == 3


def test_a_signal_reaches_one_that_has_just_been_started(forker: Forker, tmp_path: Path) -> None:
    """Its process group is there, and its log."""
    for _ in range(20):
        process, log = forked(forker, tmp_path, "wait")
        os.killpg(process.pid, signal.SIGKILL)
        assert log.exists()
        assert process.wait(20) == -signal.SIGKILL


def test_a_log_that_cannot_be_written_is_said_at_once(forker: Forker, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        forker.start([str(tmp_path / "none.py")], tmp_path / "none" / "log", dict(os.environ))
    process, _ = forked(forker, tmp_path, "hello")
    assert process.wait(20) == 3


def test_one_that_forks_and_has_ended_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has forked goes on, and can be ended; how it ended, nobody knows."""
    monkeypatch.setattr(warm, "_forkers", {})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # what a test sets is for its servers alone
    (tmp_path / "json.py").write_text("raise SystemExit('another one')")
    first = warm.forker(("json",))
    assert warm.forker(("json",)) is first
    process, log = forked(first, tmp_path, "wait")
    assert eventually(lambda: "waiting" in log.read_text())
    os.kill(first._process.pid, signal.SIGKILL)
    first._process.wait(20)
    assert process.poll() is None
    with pytest.raises(AssertionError, match="whoever forks servers ended: -9"):
        forked(first, tmp_path, "hello")
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(20) == warm.LOST
    second = warm.forker(("json",))
    again, _ = forked(second, tmp_path, "hello")
    assert again.wait(20) == 3
    first.close()
    second.close()


def test_a_script_that_cannot_be_run_ends(forker: Forker, tmp_path: Path) -> None:
    process = forker.start([str(tmp_path / "none.py")], tmp_path / "log", dict(os.environ))
    assert process.wait(20) == 1
    assert "No such file" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("value", "there"), [("", False), ("1", True)])
def test_servers_are_forked_for_python_m_tests_alone(
    value: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text("import sys\nprint('wave' in sys.modules)\n")
    monkeypatch.setenv(warm.VARIABLE, value)
    command = [sys.executable, str(tmp_path / "script.py")]
    server = Server(command, tmp_path / "log", imported=("wave",))
    assert server.process.wait(20) == 0
    assert server.tail() == f"{there}\n"
    server.stop()


INI = "[pytest]\nmarkers =\n    shared: is shared\n    beside: is beside\n    some: is wanted\n"


@pytest.mark.parametrize("wanted", [[], ["-m", "some"]])
def test_two_runs_at_once_run_each_test_once(wanted: list[str], tmp_path: Path) -> None:
    marks = {name: "shared" for name in sharing.SHARED} | {"test_mine": "", "test_other": "beside"}
    for name, mark in marks.items():
        head = f"import pytest\npytestmark = [{mark and f'pytest.mark.{mark}'}]\n"
        tests = "@pytest.mark.some\ndef test_a(): ...\ndef test_b(): ...\n"
        (tmp_path / f"{name}.py").write_text(head + tests)
    (tmp_path / "pytest.ini").write_text(INI)
    (tmp_path / "claimed").mkdir()
    command = [sys.executable, "-m", "pytest", "-p", sharing.__name__, "-v", str(tmp_path), *wanted]
    runs = [
        subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True,
            env=os.environ | {sharing.VARIABLE: str(tmp_path / "claimed"), sharing.HALF: half},
        )
        for half in ("first", "second")
    ]  # fmt: skip
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    ran = [[line.split()[0].split("/")[-1] for line in one.splitlines() if "::" in line]
           for one in said]  # fmt: skip
    names = ["test_a"] if wanted else ["test_a", "test_b"]
    assert sorted(ran[0] + ran[1]) == sorted(f"{name}.py::{one}" for name in marks for one in names)
    assert "test_mine.py::test_a" in ran[0] and "test_other.py::test_a" in ran[1]


def test_a_file_that_is_shared_is_run_once(tmp_path: Path) -> None:
    one = "import pytest\npytestmark = pytest.mark.shared\ndef test_a(): ...\ndef test_b(): ...\n"
    for name in sharing.SHARED[:2]:
        (tmp_path / f"{name}.py").write_text(one)
    (tmp_path / "test_mine.py").write_text("def test_c(): ...\n")
    (tmp_path / "pytest.ini").write_text(INI)
    (tmp_path / "claimed").mkdir()
    (tmp_path / "claimed" / sharing.SHARED[0]).touch()
    command = [sys.executable, "-m", "pytest", "-p", sharing.__name__, "-v", str(tmp_path)]
    for others in (["test_a", "test_b"], []):  # the second run finds everything claimed
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
            env=os.environ | {sharing.VARIABLE: str(tmp_path / "claimed"), sharing.HALF: "first"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        ran = [line.split()[0].split("::")[1] for line in done.stdout.splitlines() if "::" in line]
        assert ran == ["test_c", *others]
