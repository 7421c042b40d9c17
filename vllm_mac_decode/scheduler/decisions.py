"""Whether a request is handed off, to which receiver, and who does what of it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import msgspec

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire import trust
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.sampling import Sampling
from vllm_mac_decode.scheduler import eligibility, strategy
from vllm_mac_decode.scheduler.handoffs import Handoffs
from vllm_mac_decode.scheduler.planning import Case
from vllm_mac_decode.scheduler.remote import Remote

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_mac_decode.scheduler.planner import Plan

logger = logging.getLogger("vllm.mac_decode.relay")

#: Why plans keep a request local, as metric labels.
PLANNED_LOCAL: Final = {
    "setting": "offload_never",
    "request": "offload_never",
    "threshold": "offload_threshold",
}


class Decisions(Handoffs):
    """Every method wants the lock to be held."""

    def _decide(self, request: Request) -> tuple[Remote, Sampling, Plan] | str:
        """Which receiver decodes, how it is to sample and what else it does, or why the request
        decodes locally."""
        chosen = self._chosen(request)
        if isinstance(chosen, str):
            return chosen
        assert self.engine is not None
        reason = eligibility.local_reason(request, self._settings, self.engine.rules)
        if reason is not None:
            return reason
        sampling = self._sampling(request)
        if isinstance(sampling, str):
            return sampling
        plan = self._plan(request, chosen)
        if plan.decision.strategy is Strategy.VLLM:
            return PLANNED_LOCAL.get(plan.decision.reason, "planned")
        return chosen, sampling, plan

    def _sampling(self, request: Request) -> Sampling | str:
        """How the receiver is to sample, or why the request decodes locally."""
        assert self.engine is not None
        if eligibility.is_routed(request):
            return Sampling(max_tokens=1)  # whoever decodes tells the rest
        room = self.engine.max_model_len - request.num_prompt_tokens
        rules = self.engine.rules
        sampling = eligibility.sampling(request, min(request.max_tokens, room), rules)
        try:
            if sampling.grammar is not None and rules.reasons:
                end = self.engine.reasoning_end(request)
                grammar = msgspec.structs.replace(sampling.grammar, after=end)
                sampling = msgspec.structs.replace(sampling, grammar=grammar)
        except LookupError as error:
            logger.debug("request %s: %s", request.request_id, error)
            return "reasoning"
        try:
            # The receiver hangs up on a client whose messages are out of range.
            trust.validated(sampling, self.vocab_size)
        except WireError as error:
            logger.debug("request %s: %s", request.request_id, error)
            return "out_of_range"
        return sampling

    def _plan(self, request: Request, remote: Remote) -> Plan:
        """Who does what of a request that this receiver can decode."""
        assert self.engine is not None and self.layout is not None
        plan = self._planning.decide(
            Case(
                request,
                remote,
                strategy.possible(request, self.layout, self.engine.draining),
                self.engine,
                self.layout,
                self._sessions.values(),
                time.monotonic(),
            )
        )
        self._counts.plans[f"{plan.decision.strategy}:{plan.decision.reason}"] += 1
        return plan
