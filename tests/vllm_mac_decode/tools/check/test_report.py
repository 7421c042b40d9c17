"""The report as a whole, and the command at its end."""

from __future__ import annotations

from pathlib import Path

from mlx_receiver.receiver import Receiver
from tests.conftest import free_port
from tests.vllm_mac_decode.tools.check.test_engine import GIB, SPARK
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check import Report, run_checks
from vllm_mac_decode.tools.check.engine import EngineFacts


def test_the_report_ends_with_the_command(real: Receiver, tiny_llama_path: Path) -> None:
    seen: list[str] = []

    def started(model: str) -> EngineFacts:
        seen.append(model)
        return EngineFacts(**SPARK, free=115 * GIB, backend="FLASH_ATTN", kv_dtype="bfloat16")

    settings = Settings(receiver=f"127.0.0.1:{real.port}", token="secret")
    *findings, report = run_checks(settings, str(tiny_llama_path), started)
    assert isinstance(report, Report)
    assert report.ready
    assert report.findings == findings
    assert seen == [str(tiny_llama_path)]
    assert report.command == (
        f"MAC_DECODE_TOKEN=... vllm serve {tiny_llama_path} --kv-connector mac_decode "
        f"--mac-decode-receiver 127.0.0.1:{real.port} --gpu-memory-utilization 0.85"
    )
    assert "secret" not in repr(report)


def test_no_command_where_it_would_not_work() -> None:
    settings = Settings(receiver=f"127.0.0.1:{free_port()}")
    *_, report = run_checks(settings, "", lambda model: EngineFacts(**SPARK))
    assert isinstance(report, Report)
    assert (report.ready, report.command) == (False, "")
