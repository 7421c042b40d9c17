"""The one place that touches vLLM's engine core: what is hooked, and what is put in.

vLLM has no public way for a connector to add tokens to a response, so some methods are wrapped,
once per process and only acting where the connector is ours:

- ``EngineCoreProc.run_busy_loop``: gives the connector's scheduler half its engine (the
  constructor is already running when the connector is made);
- ``Scheduler.update_from_output``: the relay sees each step's outputs before the clients do, and
  adds the responses that it knows of to the number that runs;
- ``Scheduler.add_request``: the relay sees each request before vLLM's scheduler does, which is not
  given those that a receiver does all of; ``DPEngineCoreProc.add_request``: it steps with the
  others all the same, which wait for it;
- ``EngineCore.abort_requests``: the relay hears of clients that went away;
- ``Scheduler.finish_requests`` and ``set_pause_state``: vLLM ends or holds every request, when it
  stops, sleeps or is paused, and the receiver's are among them;
- ``Scheduler.reset_prefix_cache``: a shadow's blocks do not keep vLLM from it;
- ``EngineCoreProc._reject_add_in_shutdown`` and, from vLLM 0.33, ``_reject_add_while_paused``: the
  local continuation of a response is no new request.

Everything else uses what the engine offers to its own input and output threads: its queues.
Checked against vLLM 0.26 to 0.33; fields that differ are read with ``getattr``.
"""

from __future__ import annotations

import functools
import itertools
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
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request, RequestStatus

from mlx_receiver.wire.messages import Decoded, Logprobs
from vllm_mac_decode.engine import grammars, reasoning
from vllm_mac_decode.engine.machine import machine
from vllm_mac_decode.engine.prefix_cache import LAST, prefix_cache
from vllm_mac_decode.scheduler.port import (
    EngineListener,
    EngineLoad,
    EngineRules,
    Machine,
    PrefixCache,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.mac_decode.engine")

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
#: Requests of each queue that are looked at for what the engine has to do.
_LOOKED_AT = 128
_INSTALLED = "_mac_decode_installed"


def install() -> None:
    """Wrap the methods. Safe to call more than once."""
    if getattr(EngineCore, _INSTALLED, False):
        return
    setattr(EngineCore, _INSTALLED, True)
    for engine in (EngineCoreProc, DPEngineCoreProc):
        engine.run_busy_loop = _attaching(engine.run_busy_loop)
    Scheduler.add_request = _deciding(Scheduler.add_request)
    DPEngineCoreProc.add_request = _joining(DPEngineCoreProc.add_request)
    Scheduler.update_from_output = _rewriting(Scheduler.update_from_output)
    EngineCore.abort_requests = _aborting(EngineCore.abort_requests)
    Scheduler.finish_requests = _finishing(Scheduler.finish_requests)
    Scheduler.set_pause_state = _pausing(Scheduler.set_pause_state)
    Scheduler.reset_prefix_cache = _resetting(Scheduler.reset_prefix_cache)
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


def _deciding(add_request: Callable[[Any, Request], None]) -> Callable[[Any, Request], None]:
    @functools.wraps(add_request)
    def add(self: Any, request: Request) -> None:
        # More input for a request that vLLM has is no new one.
        if request.request_id not in self.requests and _ask(
            self, "on_new_request", lambda relay: relay.on_new_request(request)
        ):
            return
        add_request(self, request)

    return add


def _joining(add_request: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(add_request)
    def add(self: Any, request: Request, *args: Any, **kwargs: Any) -> None:
        add_request(self, request, *args, **kwargs)
        # The request has started the other engines, whose steps need one of this engine, too.
        if _ask(self.scheduler, "given_away", lambda relay: relay.given_away(request.request_id)):
            self.engines_running = True

    return add


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


def _resetting(reset_prefix_cache: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(reset_prefix_cache)
    def reset(self: Any, *args: Any, **kwargs: Any) -> bool:
        nobodys = _ask(self, "cache_reset", lambda relay: relay.cache_reset()) or []
        if known := [request_id for request_id in nobodys if request_id in self.requests]:
            # Blocks of a request that nobody knows must not keep vLLM from it.
            self.finish_requests(known, RequestStatus.FINISHED_ABORTED)
        return reset_prefix_cache(self, *args, **kwargs)

    return reset


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
    structured = config.structured_outputs_config
    return EngineRules(
        everything,
        raw_logprobs=config.model_config.logprobs_mode == "raw_logprobs",
        compact_json=structured.disable_any_whitespace,
        closed_json=structured.disable_additional_properties,
        reasons=bool(structured.reasoning_parser)
        and not getattr(structured, "enable_in_reasoning", False),
        thinking=reasoning.thinking(config),
    )


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
        self.prefixes: PrefixCache | None = prefix_cache(core)
        self.machine: Machine | None = machine(core)

    @property
    def draining(self) -> bool:
        return not self._core.is_running() or (
            self._core.scheduler.pause_state != PauseState.UNPAUSED
        )

    @property
    def weights_changed(self) -> bool:
        # Known from vLLM 0.27 on.
        return self._weight_version() != self._first_weights

    @property
    def idle(self) -> bool:
        return (
            not self.draining
            and not self._core.is_sleeping()
            and self._input.empty()
            and not self._core.scheduler.has_unfinished_requests()
        )

    def load(self, besides: str) -> EngineLoad:
        scheduler = self._core.scheduler
        pending, rows = [], 0
        for request in itertools.chain(
            itertools.islice(scheduler.running, _LOOKED_AT),
            itertools.islice(scheduler.waiting, _LOOKED_AT),
        ):
            left = request.num_prompt_tokens - request.num_computed_tokens
            if left <= 0:
                rows += 1
            elif request.request_id != besides:
                pending.append((request.request_id, left))
        unseen = max(0, len(scheduler.waiting) - _LOOKED_AT)
        return EngineLoad(len(pending) + unseen, tuple(pending), rows)

    def wake(self) -> None:
        self._input.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def is_length(self, output: EngineCoreOutput) -> bool:
        return output.finish_reason == FinishReason.LENGTH

    def emit(self, client: int, outputs: list[EngineCoreOutput]) -> None:
        message = EngineCoreOutputs(
            engine_index=getattr(self._core, "engine_index", 0), outputs=outputs
        )
        if getattr(self._core.scheduler, "finished_req_ids_dict", None) is not None:
            finished = {o.request_id for o in outputs if o.finish_reason is not None}
            message.finished_requests = finished or None
        if hasattr(message, "weight_version"):  # vLLM 0.32 on
            message.weight_version = self._weight_version()
        self._output.put_nowait((client, message))

    def emit_aborted(self, request: Request) -> None:
        output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ABORT)
        self.emit(request.client_index, [output])

    def emit_decoded(self, decoded: list[tuple[Request, Decoded]]) -> None:
        clients: dict[int, list[EngineCoreOutput]] = {}
        for request, tokens in decoded:
            clients.setdefault(request.client_index, []).append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=tokens.token_ids,
                    new_logprobs=_logprobs(tokens.logprobs) if tokens.logprobs else None,
                    finish_reason=_FINISH[tokens.finish] if tokens.finish else None,
                    stop_reason=tokens.stop_reason,
                    events=request.take_events(),
                    prefill_stats=request.take_prefill_stats(),
                    trace_headers=request.trace_headers,
                )
            )
        for client, outputs in clients.items():
            self.emit(client, outputs)

    def prefilled_elsewhere(
        self, request: Request, cached: int, arrived: float, begun: float
    ) -> None:
        if request.prefill_stats is not None:
            request.prefill_stats.set(request.num_prompt_tokens, 0, cached)
        if self._core.scheduler.log_stats:
            request.record_event(EngineCoreEventType.QUEUED, arrived)
            request.record_event(EngineCoreEventType.SCHEDULED, begun)

    def requeue(self, request: Request) -> None:
        self._input.put_nowait((EngineCoreRequestType.ADD, (request, 0)))

    def resume(self, request: Request, as_id: str, tokens: list[int], max_tokens: int) -> bool:
        """Its prompt is the request's prompt and those tokens, so presence and frequency penalties
        no longer see them as output; everything else means the same.
        """
        assert request.sampling_params is not None and request.prompt_token_ids is not None
        room = self.max_model_len - len(request.prompt_token_ids)
        if len(tokens) >= min(max_tokens, room):  # the engine would die of such a request
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
        # With the grammar where it is: another one would begin anew, and nobody would compile it.
        continuation.structured_output_request = request.structured_output_request
        self._input.put_nowait((EngineCoreRequestType.ADD, (continuation, 0)))
        return True

    def reasoning_end(self, request: Request) -> int | None:
        try:
            return grammars.reasoning_end(self._core.structured_output_manager, request)
        except (AttributeError, ImportError) as error:  # a release that does it in another way
            raise LookupError(f"this vLLM does not tell where reasoning ends: {error}") from error

    def grammar_ready(self, request: Request) -> bool:
        return grammars.ready(request)

    def accept(self, request: Request, tokens: list[int], after: int | None) -> int:
        return grammars.accept(request, tokens, after)

    def prefill(self, as_id: str, tokens: list[int]) -> Request:
        return self._nobodys(as_id, tokens, 1)

    def trial(self, as_id: str, tokens: list[int], output: int) -> None:
        self._nobodys(as_id, tokens, output, priority=LAST)

    def _nobodys(self, as_id: str, tokens: list[int], output: int, priority: int = 0) -> Request:
        request = Request(
            request_id=as_id,
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True),
            pooling_params=None,
            priority=priority,
            block_hasher=self._core.request_block_hasher,
        )
        # Of no wave that there is: where there are several engines, the others are woken, too.
        self._input.put_nowait((EngineCoreRequestType.ADD, (request, -1)))
        return request

    def withdraw(self, request_id: str) -> None:
        self._input.put_nowait((EngineCoreRequestType.ABORT, [request_id]))

    def continue_output(self, output: EngineCoreOutput, request_id: str) -> None:
        output.request_id = request_id
        # The prefill that the client's usage counts was the first request's.
        output.prefill_stats = None
        output.events = None

    def _weight_version(self) -> str | None:
        return getattr(self._core, "_weight_version", None)


def _logprobs(rows: list[Logprobs]) -> LogprobsLists:
    """``[tokens, 1 + n]`` arrays: the sampled token, then the likeliest ones."""
    return LogprobsLists(
        np.array([row.token_ids for row in rows], dtype=np.int64),
        np.array([row.values for row in rows], dtype=np.float32),
        np.array([row.rank for row in rows], dtype=np.int64),
    )
