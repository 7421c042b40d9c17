"""Models for the tests, made once and kept in the user's cache."""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import httpx
import platformdirs
import pytest

from mlx_receiver.decode.blas import use_fast_blas
from mlx_receiver.interfaces import interfaces
from mlx_receiver.pairing.keystore import STATE_VARIABLE
from mlx_receiver.planning.cached import CACHE_VARIABLE
from tests import families
from tests.callers import calling_llama
from tests.models import GENERATOR_VERSION, tiny_llama, tiny_qwen3
from tests.sharing import SHARED
from vllm_mac_decode.tools.demo.model import fetch_smollm2
from vllm_mac_decode.tools.demo.services import free_ports

# Pairings of the tests are theirs alone, also in the processes that they start.
os.environ[STATE_VARIABLE] = tempfile.mkdtemp(prefix="mac-decode-state-")
atexit.register(shutil.rmtree, os.environ[STATE_VARIABLE], ignore_errors=True)
# So are the profiles. Nothing is measured where no test asks for it: it would be in the way.
os.environ[CACHE_VARIABLE] = str(Path(os.environ[STATE_VARIABLE]) / "cache")
os.environ.setdefault("MLX_RECEIVER_PROFILE", "false")
os.environ.setdefault("MAC_DECODE_PROFILE", "false")
# What the tests are about must happen, whatever would be faster on this machine.
os.environ.setdefault("MAC_DECODE_OFFLOAD", "always")

# How vLLM waits is changed in the processes that the tests start, see there.
patience = str(Path(__file__).parent / "patience")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (patience, os.environ.get("PYTHONPATH"))))

use_fast_blas()  # before any test imports MLX

# By default these wait for five seconds, which a busy machine may need for a cold first answer.
for function in (httpx.get, httpx.post, httpx.put):
    function.__kwdefaults__["timeout"] = 60.0

#: What the second process of ``python -m tests`` runs: it is not the one to load the machine.
BESIDE = ("discovery", "fuzz", "mlx_receiver", "pairing", "vllm_mac_decode", "wire", "test_codecs",
          "test_demo", "test_link", "test_meet", "test_packaging", "test_profile",
          "test_warm")  # fmt: skip


def pytest_itemcollected(item: pytest.Item) -> None:
    """Divide the tests."""
    inside = item.path.relative_to(Path(__file__).parent)
    if inside.parts[0] == "e2e" and inside.stem in SHARED:
        item.add_marker("shared")
    elif {inside.stem, *inside.parts} & set(BESIDE):
        item.add_marker("beside")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the servers said last that ran during a test that failed."""
    report = yield
    if report.failed:
        servers = sys.modules.get("tests.servers")
        for server in servers.Server.started if servers else ():
            if server.log.exists() and server.log.stat().st_mtime >= time.time() - call.duration:
                report.sections.append((f"end of {server.log}", server.tail(2000)))
    return report


def free_port() -> int:
    """A TCP port on this machine that nothing listens on, given once."""
    return free_ports(1)[0]


def own_address() -> str:
    """An address of this machine's that is no loopback one: who uses it is taken for another."""
    for interface in interfaces():
        for address in interface.addresses:
            if ":" not in address:
                return address
    pytest.skip("this machine has no address but loopback")


def cached_model(name: str, write: Callable[[Path], Path]) -> Path:
    """The folder that `write` made for this generator version, in this run or an earlier one."""
    models = platformdirs.user_cache_path("vllm-mac-decode") / "test-models"
    folder = models / f"{name}-v{GENERATOR_VERSION}"
    if not folder.is_dir():
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models) as scratch:
            made = write(Path(scratch) / name)
            # Another run may have put the same folder there first.
            with contextlib.suppress(OSError):
                made.rename(folder)
    return folder


def cached_family(family: str) -> Path:
    """A model of `tests.families`."""
    name = f"{family}-{families.GENERATOR_VERSION}"
    return cached_model(name, lambda path: families.write(family, path))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bf16."""
    return fetch_smollm2()


@pytest.fixture(scope="session")
def tiny_llama_path() -> Path:
    """A random fp32 Llama, see `tests.models.tiny_llama`."""
    return cached_model("tiny-llama", tiny_llama)


@pytest.fixture(scope="session")
def calling_llama_path() -> Path:
    """A Llama that calls tools, see `tests.callers`."""
    return cached_model("calling-llama", calling_llama)


@pytest.fixture(scope="session")
def tiny_qwen3_path() -> Path:
    """A random fp32 Qwen3, see `tests.models.tiny_qwen3`."""
    return cached_model("tiny-qwen3", tiny_qwen3)
