"""The pytest plugin that runs inside the process of vLLM's own tests.

It replaces what those tests start or download by what is there: each server of theirs becomes the
one at UPSTREAM_URL, a LoRA adapter becomes a name that no server knows. It sends what happened to
each test, one JSON line each, to the file descriptor UPSTREAM_REPORT. Nothing else of a test is
changed. It stands in a folder of its own, because "tests" is vLLM's package in that process.
"""

import json
import os
from typing import Any
from urllib.parse import urlsplit

import pytest

_report = os.fdopen(int(os.environ["UPSTREAM_REPORT"]), "w", buffering=1)
_url = urlsplit(os.environ["UPSTREAM_URL"])
_outcomes: dict[str, dict[str, Any]] = {}


def pytest_configure() -> None:
    """Put the running server in the place of those that the tests would start."""
    import vllm.transformers_utils.repo_utils as repositories

    from tests.utils import RemoteVLLMServer

    def connect(self: Any, _model: str, arguments: list[str], **_options: Any) -> None:
        self.uds, self.host, self.port = None, _url.hostname, _url.port
        self.show_hidden_metrics = any("--show-hidden-metrics" in each for each in arguments)

    class NoDownloads:
        def snapshot_download(self, repo_id: str) -> str:
            return repo_id

    RemoteVLLMServer.__init__ = connect
    RemoteVLLMServer._shutdown = lambda self: None
    repositories.hf_api = NoDownloads


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that does not import is an error of the gate, not a failed test."""
    if report.failed:
        _send({"broken": report.nodeid, "message": _reason(report)})


def pytest_itemcollected(item: pytest.Item) -> None:
    """No engine runs in this process, so there is nothing to clean up after a test."""
    item.add_marker("skip_global_cleanup")


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many tests there will be."""
    _send({"total": len(session.items)})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Join what the phases of a test say, and send it after the last."""
    entry = _outcomes.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
    entry["seconds"] = round(entry["seconds"] + report.duration, 2)
    if report.outcome != "passed" and entry["outcome"] != "failed":
        entry |= {"outcome": report.outcome, "message": _reason(report)}
    if report.when == "teardown":
        _send({"test": report.nodeid, **_outcomes.pop(report.nodeid)})


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """What went wrong, without the traceback and without this machine's paths."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        text = str(crash.message)
    elif isinstance(report.longrepr, tuple):
        text = str(report.longrepr[2])
    else:
        text = str(report.longrepr)[-400:]
    return " ".join(text.replace(os.getcwd(), ".").split())[:400]


def _send(message: dict[str, Any]) -> None:
    _report.write(json.dumps(message) + "\n")
