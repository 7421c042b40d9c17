"""The one place that touches vLLM's engine core: what is hooked, and what is put in.

vLLM has no public way for a connector to add tokens to a response, so three methods are
wrapped, once per process and only acting where the connector is ours:

- ``EngineCoreProc.run_busy_loop``: gives the connector's scheduler half its engine (the
  constructor is already running when the connector is made);
- ``Scheduler.update_from_output``: the relay sees each step's outputs before the clients do;
- ``EngineCore.abort_requests``: the relay hears of clients that went away.

Everything else uses what the engine offers to its own input and output threads: its queues.
Checked against vLLM 0.26 and 0.32; fields that differ are read with ``getattr``.
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from mlx_receiver.wire.messages import Decoded, Logprobs
from vllm_mac_decode import policy

if TYPE_CHECKING:
    from vllm_mac_decode.relay import Relay

logger = init_logger("vllm.mac_decode.engine")

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
_INSTALLED = "_mac_decode_installed"


def install() -> None:
    """Wrap the three methods. Safe to call more than once."""
    if getattr(EngineCore, _INSTALLED, False):
        return
    setattr(EngineCore, _INSTALLED, True)

    update_from_output = Scheduler.update_from_output
    abort_requests = EngineCore.abort_requests

    @functools.wraps(update_from_output)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = update_from_output(self, *args, **kwargs)
        relay = _relay(self)
        if relay is not None:
            try:
                relay.rewrite(outputs)
            except Exception:
                self.connector.fault("rewrite")
        return outputs

    @functools.wraps(abort_requests)
    def abort(self: Any, request_ids: list[str]) -> Any:
        relay = _relay(self.scheduler)
        if relay is not None:
            try:
                request_ids = relay.abort(request_ids)
            except Exception:
                self.scheduler.connector.fault("abort")
        return abort_requests(self, request_ids)

    for engine in (EngineCoreProc, DPEngineCoreProc):
        engine.run_busy_loop = _attaching(engine.run_busy_loop)
    Scheduler.update_from_output = update
    EngineCore.abort_requests = abort


def _attaching(run_busy_loop: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(run_busy_loop)
    def run(self: Any) -> None:
        attach = getattr(self.scheduler.get_kv_connector(), "attach_engine", None)
        if attach is not None:
            attach(self)
        run_busy_loop(self)

    return run


def _relay(scheduler: Any) -> Relay | None:
    return getattr(getattr(scheduler, "connector", None), "relay", None)


class EngineSeam:
    """One engine core, as the relay uses it. Every method may be called from any thread."""

    def __init__(self, core: Any) -> None:
        if not hasattr(core, "output_queue") or not hasattr(core, "input_queue"):
            raise RuntimeError(
                "the engine runs inside the caller's process (VLLM_ENABLE_V1_MULTIPROCESSING=0)"
            )
        self._core = core
        self._input: queue.Queue[Any] = core.input_queue
        self._output: queue.Queue[Any] = core.output_queue
        self.max_model_len: int = core.vllm_config.model_config.max_model_len
        self.rules = policy.engine_rules(core.vllm_config)

    def is_length(self, output: EngineCoreOutput) -> bool:
        """Whether the output ends its request because of a length limit."""
        return output.finish_reason == FinishReason.LENGTH

    def emit(self, client: int, outputs: list[EngineCoreOutput]) -> None:
        """Send outputs to a client, in one message, behind everything that was sent before."""
        message = EngineCoreOutputs(
            engine_index=getattr(self._core, "engine_index", 0), outputs=outputs
        )
        if self._reports_finished():
            finished = {o.request_id for o in outputs if o.finish_reason is not None}
            message.finished_requests = finished or None
        self._output.put_nowait((client, message))

    def emit_decoded(self, decoded: list[tuple[Request, Decoded]]) -> None:
        """Send tokens that the receiver produced in one step, as an engine step of ours."""
        clients: dict[int, list[EngineCoreOutput]] = {}
        for request, tokens in decoded:
            clients.setdefault(request.client_index, []).append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=tokens.token_ids,
                    new_logprobs=_logprobs(tokens.logprobs) if tokens.logprobs else None,
                    finish_reason=_FINISH[tokens.finish] if tokens.finish else None,
                    stop_reason=tokens.stop_reason,
                    trace_headers=request.trace_headers,
                )
            )
        for client, outputs in clients.items():
            self.emit(client, outputs)

    def resume(self, request: Request, as_id: str, tokens: list[int], max_tokens: int) -> None:
        """Queue a local continuation of a request that has produced ``tokens``.

        Its prompt is the request's prompt and those tokens, so presence and frequency penalties
        no longer see them as output; everything else means the same.
        """
        assert request.sampling_params is not None and request.prompt_token_ids is not None
        params = request.sampling_params.clone()
        params.max_tokens = max_tokens - len(tokens)
        params.min_tokens = max(0, params.min_tokens - len(tokens))
        params.prompt_logprobs = None
        continuation = Request(
            request_id=as_id,
            prompt_token_ids=[*request.prompt_token_ids, *tokens],
            sampling_params=params,
            pooling_params=None,
            client_index=request.client_index,
            arrival_time=request.arrival_time,
            cache_salt=request.cache_salt,
            priority=request.priority,
            trace_headers=request.trace_headers,
            block_hasher=self._core.request_block_hasher,
        )
        self._input.put_nowait((EngineCoreRequestType.ADD, (continuation, 0)))

    def continue_output(self, output: EngineCoreOutput, request_id: str) -> None:
        """Turn a continuation's output into one of the first request's."""
        output.request_id = request_id
        # The prefill that the client's usage counts was the first request's.
        output.prefill_stats = None
        output.events = None

    def _reports_finished(self) -> bool:
        return getattr(self._core.scheduler, "finished_req_ids_dict", None) is not None


def _logprobs(rows: list[Logprobs]) -> LogprobsLists:
    """``[tokens, 1 + n]`` arrays: the sampled token, then the likeliest ones."""
    return LogprobsLists(
        np.array([row.token_ids for row in rows], dtype=np.int64),
        np.array([row.values for row in rows], dtype=np.float32),
        np.array([row.rank for row in rows], dtype=np.int64),
    )
