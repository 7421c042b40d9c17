"""vLLM's scheduler, which writes down when requests came to its engine and what each step computed.

    vllm serve MODEL --scheduler-cls bench.step_log.LoggingScheduler    # and BENCH_STEP_LOG=FILE

A line of JSON for each event, with seconds of one clock.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine.core import EngineCoreProc

_preprocess = EngineCoreProc.preprocess_add_request
_FILE = os.open(os.environ["BENCH_STEP_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _write(**event: Any) -> None:
    os.write(_FILE, (json.dumps({"at": time.monotonic(), **event}) + "\n").encode())


def _came(self: Any, request: Any) -> Any:
    """Of the thread that reads requests, before the engine's own thread sees them."""
    _write(came=request.request_id)
    return _preprocess(self, request)


EngineCoreProc.preprocess_add_request = _came


class LoggingScheduler(AsyncScheduler):
    """vLLM's own, otherwise."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        if output.num_scheduled_tokens:
            _write(scheduled=id(output), tokens=output.num_scheduled_tokens)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.num_scheduled_tokens:
            _write(done=id(scheduler_output))
        return super().update_from_output(scheduler_output, *args, **kwargs)
