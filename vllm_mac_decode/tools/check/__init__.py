"""``mac-decode check``: is this machine ready to hand requests off, and what is to be done?"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator

import msgspec

from vllm_mac_decode import __version__
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check import engine
from vllm_mac_decode.tools.check.finding import Finding, warning, wrong
from vllm_mac_decode.tools.check.planned import check_plan
from vllm_mac_decode.tools.check.receiver import (
    OtherCache,
    ReceiverChecks,
    check_model,
    read_model,
)
from vllm_mac_decode.tools.check.software import check_plugin, check_vllm


class Report(msgspec.Struct, kw_only=True):
    """Everything that was found: what ``--json`` prints. Holds no token."""

    version: str = __version__
    ready: bool = True
    findings: list[Finding] = []
    #: How to start vLLM; "" when that would be of no use.
    command: str = ""


def run_checks(
    settings: Settings,
    model: str = "",
    start_engine: Callable[[str], engine.EngineFacts] = engine.ask_child,
) -> Iterator[Finding | Report]:
    """Every finding, in the order in which to repair them, and then the report.

    ``model`` is a folder or a Hugging Face id. ``start_engine`` tells what vLLM does here.
    """
    report = Report()
    for finding in _findings(settings, model, start_engine, report):
        report.findings.append(finding)
        report.ready = report.ready and finding.state != "wrong"
        yield finding
    if not report.ready:
        report.command = ""
    yield report


def _findings(
    settings: Settings,
    model: str,
    start_engine: Callable[[str], engine.EngineFacts],
    report: Report,
) -> Iterator[Finding]:
    vllm, plugin = check_vllm(), check_plugin()
    yield vllm
    yield plugin
    known, readable = None, bool(model)
    if model:
        try:
            known = read_model(model)
        except OtherCache as error:
            yield warning(
                "model",
                f"{error}: what, only the engines know",
                "vLLM compares when it is connected, and logs what that gave",
            )
        except (OSError, ValueError) as error:
            readable = False
            yield wrong("model", f"The model {model} cannot be read: {error}", "Check --model")
        else:
            yield check_model(model, known)
    receivers = ReceiverChecks(settings, known)
    yield from receivers.findings()
    if known is not None and receivers.taken:
        welcome, transfer = max(receivers.taken, key=lambda taken: taken[1].rate)
        yield check_plan(settings, model, known.layout, welcome, transfer)
    utilization = None
    if vllm.state != "wrong":
        found, utilization = engine.judge(start_engine(model if readable else ""), model)
        yield from found
    report.command = serve_command(settings, model, settings.receiver, utilization)


def serve_command(settings: Settings, model: str, receiver: str, utilization: float | None) -> str:
    """How to start vLLM."""
    token = "MAC_DECODE_TOKEN=... " if settings.token else ""
    transport = f"MAC_DECODE_TRANSPORT={settings.transport} " if settings.transport != "tcp" else ""
    memory = f" --gpu-memory-utilization {utilization:.2f}" if utilization is not None else ""
    where = f" --mac-decode-receiver {receiver}" if receiver else ""
    return (
        f"{token}{transport}vllm serve {shlex.quote(model or 'MODEL')} --kv-connector mac_decode"
        f"{where}{memory}"
    )


__all__ = ["Finding", "Report", "run_checks", "serve_command"]
