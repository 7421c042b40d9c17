"""The one place that touches vLLM's engine core: what is hooked, and what is put in.

vLLM has no public way for a connector to add tokens to a response, so some methods are wrapped,
once per process and only acting where the connector is ours:

- ``EngineCoreProc.run_busy_loop``: gives the connector's scheduler half its engine (the
  constructor is already running when the connector is made);
- ``Scheduler.update_from_output``: the relay sees each step's outputs before the clients do, and
  adds the responses that it knows of to the number that runs;
- ``EngineCore.abort_requests``: the relay hears of clients that went away;
- ``Scheduler.finish_requests`` and ``set_pause_state``: vLLM ends or holds every request, when it
  stops, sleeps or is paused, and the receiver's are among them;
- ``EngineCoreProc._reject_add_in_shutdown`` and, from vLLM 0.33, ``_reject_add_while_paused``: the
  local continuation of a response is no new request.

Everything else uses what the engine offers to its own input and output threads: its queues.
Checked against vLLM 0.26 to 0.33; fields that differ are read with ``getattr``.
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
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
from vllm_mac_decode.scheduler.port import EngineListener, EngineRules

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.mac_decode.engine")

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
_INSTALLED = "_mac_decode_installed"


def install() -> None:
    """Wrap the methods. Safe to call more than once."""
    if getattr(EngineCore, _INSTALLED, False):
        return
    setattr(EngineCore, _INSTALLED, True)
    for engine in (EngineCoreProc, DPEngineCoreProc):
        engine.run_busy_loop = _attaching(engine.run_busy_loop)
    Scheduler.update_from_output = _rewriting(Scheduler.update_from_output)
    EngineCore.abort_requests = _aborting(EngineCore.abort_requests)
    Scheduler.finish_requests = _finishing(Scheduler.finish_requests)
    Scheduler.set_pause_state = _pausing(Scheduler.set_pause_state)
    for name in ("_reject_add_in_shutdown", "_reject_add_while_paused"):
        if hasattr(EngineCoreProc, name):
            setattr(EngineCoreProc, name, _continuing(getattr(EngineCoreProc, name)))


def _attaching(run_busy_loop: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(run_busy_loop)
    def run(self: Any) -> None:
        attach = getattr(self.scheduler.get_kv_connector(), "attach_engine", None)
        if attach is not None:
            attach(self)
        run_busy_loop(self)

    return run


def _rewriting(update_from_output: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(update_from_output)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = update_from_output(self, *args, **kwargs)
        _ask(self, "rewrite", lambda relay: relay.rewrite(outputs))
        return outputs

    return update


def _aborting(abort_requests: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(abort_requests)
    def abort(self: Any, request_ids: list[str]) -> Any:
        ids = _ask(self.scheduler, "abort", lambda relay: relay.abort(request_ids))
        return abort_requests(self, request_ids if ids is None else ids)

    return abort


def _finishing(finish_requests: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(finish_requests)
    def finish(self: Any, request_ids: Any, finished_status: Any) -> Any:
        finished = finish_requests(self, request_ids, finished_status)
        if request_ids is None:
            _ask(self, "abort_all", lambda relay: relay.abort_all())
        return finished

    return finish


def _pausing(set_pause_state: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(set_pause_state)
    def pause(self: Any, pause_state: PauseState) -> None:
        set_pause_state(self, pause_state)
        if pause_state == PauseState.PAUSED_ALL:
            _ask(self, "freeze", lambda relay: relay.freeze())

    return pause


def _continuing(reject: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(reject)
    def rejected(self: Any, request: Request) -> bool:
        stops = not self.is_running() and self.vllm_config.shutdown_timeout == 0
        ours = _ask(
            self.scheduler, "rejects", lambda relay: relay.rejects(request.request_id, not stops)
        )
        if ours is not None:
            return bool(ours)
        rejects = reject(self, request)
        if rejects:  # its end is told nobody else
            _ask(self.scheduler, "aborted", lambda relay: relay.aborted(request.request_id))
        return rejects

    return rejected


def _ask(scheduler: Any, what: str, question: Callable[[EngineListener], Any]) -> Any:
    """The relay's answer; None where there is none, or where it failed."""
    relay = getattr(getattr(scheduler, "connector", None), "relay", None)
    if relay is None:
        return None
    try:
        return question(relay)
    except Exception:
        scheduler.connector.fault(what)
        return None


def engine_rules(config: VllmConfig) -> EngineRules:
    """What vLLM's configuration and the installed plugins ask of the engine."""
    everything = None
    if getattr(config.model_config, "runner_type", "generate") != "generate":
        everything = "pooling"
    elif config.model_config.logits_processors or entry_points(group="vllm.logits_processors"):
        everything = "logits_processors"
    elif getattr(config, "watermark_config", None) is not None:
        everything = "watermark"
    return EngineRules(everything, config.model_config.logprobs_mode == "raw_logprobs")


class EngineAdapter:
    """One engine core as the scheduler half's ``EnginePort``."""

    def __init__(self, core: Any) -> None:
        if not hasattr(core, "output_queue") or not hasattr(core, "input_queue"):
            raise RuntimeError(
                "the engine runs inside the caller's process (VLLM_ENABLE_V1_MULTIPROCESSING=0)"
            )
        self._core = core
        self._input: queue.Queue[Any] = core.input_queue
        self._output: queue.Queue[Any] = core.output_queue
        self.max_model_len: int = core.vllm_config.model_config.max_model_len
        self.rules = engine_rules(core.vllm_config)
        self._first_weights = self._weight_version()

    @property
    def draining(self) -> bool:
        """Whether vLLM waits for its requests to end: it stops, or is paused."""
        return not self._core.is_running() or (
            self._core.scheduler.pause_state != PauseState.UNPAUSED
        )

    @property
    def weights_changed(self) -> bool:
        """Whether the weights were replaced after the start (known from vLLM 0.27 on)."""
        return self._weight_version() != self._first_weights

    @property
    def idle(self) -> bool:
        """Whether vLLM has nothing to do, and waits for requests."""
        return (
            not self.draining
            and not self._core.is_sleeping()
            and self._input.empty()
            and not self._core.scheduler.has_unfinished_requests()
        )

    def wake(self) -> None:
        """Make an idle engine look whether there is something to do."""
        self._input.put_nowait((EngineCoreRequestType.WAKEUP, None))

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
        if hasattr(message, "weight_version"):  # vLLM 0.32 on
            message.weight_version = self._weight_version()
        self._output.put_nowait((client, message))

    def emit_aborted(self, request: Request) -> None:
        """Tell the request's client that vLLM gave it up."""
        output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ABORT)
        self.emit(request.client_index, [output])

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

    def resume(self, request: Request, as_id: str, tokens: list[int], max_tokens: int) -> bool:
        """Queue a local continuation of a request that has produced ``tokens``.

        False when those have used up its limit or the context: its client is told that it has
        ended, and the engine, which would die of such a request, does not hear of it.

        Its prompt is the request's prompt and those tokens, so presence and frequency penalties
        no longer see them as output; everything else means the same.
        """
        assert request.sampling_params is not None and request.prompt_token_ids is not None
        room = self.max_model_len - len(request.prompt_token_ids)
        if len(tokens) >= min(max_tokens, room):
            output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.LENGTH)
            self.emit(request.client_index, [output])
            return False
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
        return True

    def prefill(self, as_id: str, tokens: list[int]) -> Request:
        """Queue a request of nobody's for one token behind these, which its output will bring."""
        request = Request(
            request_id=as_id,
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
            pooling_params=None,
            block_hasher=self._core.request_block_hasher,
        )
        # Of no wave that there is: where there are several engines, the others are woken, too.
        self._input.put_nowait((EngineCoreRequestType.ADD, (request, -1)))
        return request

    def continue_output(self, output: EngineCoreOutput, request_id: str) -> None:
        """Turn a continuation's output into one of the first request's."""
        output.request_id = request_id
        # The prefill that the client's usage counts was the first request's.
        output.prefill_stats = None
        output.events = None

    def _weight_version(self) -> str | None:
        return getattr(self._core, "_weight_version", None)

    def _reports_finished(self) -> bool:
        return getattr(self._core.scheduler, "finished_req_ids_dict", None) is not None


def _logprobs(rows: list[Logprobs]) -> LogprobsLists:
    """``[tokens, 1 + n]`` arrays: the sampled token, then the likeliest ones."""
    return LogprobsLists(
        np.array([row.token_ids for row in rows], dtype=np.int64),
        np.array([row.values for row in rows], dtype=np.float32),
        np.array([row.rank for row in rows], dtype=np.int64),
    )
