"""Plans of one engine's requests: what is known, what follows from it, and how it turned out.

Everything here is called with the relay's lock held, and nothing waits. Where neither ``offload``
nor ``codec`` is "auto" nothing is estimated.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mlx_receiver.planning.coding import codec
from mlx_receiver.planning.cost import RAW, Codec, KvBytes, Load, Pair, Strategy, Work
from mlx_receiver.planning.live import Estimate
from mlx_receiver.planning.shapes import kv_bytes
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.quantised import ratio
from vllm_mac_decode.scheduler import codecs, order
from vllm_mac_decode.scheduler.eligibility import is_routed
from vllm_mac_decode.scheduler.handoff import Handoff, Phase
from vllm_mac_decode.scheduler.homes import Homes
from vllm_mac_decode.scheduler.planner import Outputs, Plan, Planner, Question
from vllm_mac_decode.scheduler.telling import Telling
from vllm_mac_decode.scheduler.throughput import same
from vllm_mac_decode.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_mac_decode.scheduler.port import EnginePort
    from vllm_mac_decode.scheduler.remote import Remote

logger = logging.getLogger("vllm.mac_decode.relay")

#: Requests of vLLM's own whose course is watched.
_MOST_WATCHED: Final = 4096

#: Requests in vLLM's queue that are looked at one by one.
_MOST_QUEUED: Final = 64


@dataclass(frozen=True, slots=True)
class Case:
    """A request that ``remote`` can take a part of, and what is there when it comes."""

    request: Request
    remote: Remote
    allowed: Collection[Strategy]  # see ``strategy.possible``
    engine: EnginePort
    layout: CacheLayout
    sessions: Iterable[Handoff]
    now: float


class Planning:
    """See the module's text."""

    def __init__(self, settings: Settings, vllm: Estimate) -> None:
        """``vllm`` is how fast that is."""
        self._planner = Planner(settings.offload, settings.offload_threshold)
        self._codec = settings.codec
        self._streams = settings.slow_streams
        self._estimates = "auto" in (settings.offload, settings.codec)
        self._looks = self._estimates or settings.offload_threshold > 0
        self._outputs = Outputs()
        self._telling = Telling()
        self.homes = Homes()
        self._vllm = vllm
        self._sizes: tuple[CacheLayout, KvBytes] | None = None
        #: By request: those that vLLM is to prefill, and those that it does all of.
        self._waiting: dict[str, Plan] = {}
        self._local: dict[str, Plan] = {}
        self._blind = False

    # --- before -------------------------------------------------------------------------------

    def decide(self, case: Case) -> Plan:
        """Who does what of it."""
        try:
            plan = self._plan(case)
        except Exception:
            if not self._estimates:
                raise
            # Nothing depends on it but how fast it is: from now on as with nothing known.
            logger.exception("requests are not planned any more; they are handed off")
            self._estimates = self._looks = False
            plan = self._plan(case)
        if self._estimates:
            self._telling.decided(plan)
            if plan.decision.strategy is not Strategy.MAC:
                self._watch(self._waiting, case.request, plan)
            if plan.decision.strategy is Strategy.VLLM:
                self._watch(self._local, case.request, plan)
        return plan

    def _plan(self, case: Case) -> Plan:
        request, remote, engine, now = case.request, case.remote, case.engine, case.now
        expected, held_in = 0, RAW.name
        if self._estimates:
            expected, held_in = self.homes.find(request, remote)
        limit = engine.max_model_len - request.num_prompt_tokens
        if not is_routed(request):  # of that, others ask the receiver for the rest
            limit = min(request.max_tokens, limit)
        work = Work(
            request.num_prompt_tokens,
            self._outputs.expected(limit),
            self._cached(request, engine) if self._looks else 0,
            round(expected * remote.keeps),
        )
        load, pair = Load(), None
        ways: tuple[Codec, ...] = (RAW,)
        if self._estimates and (pair := self._pair(case)) is not None:
            load = self._load(case, pair)
            ways = self._ways(remote, case.layout, pair)
        ordered, corrections = order.ordered(request), remote.corrections
        asked = Question(work, load, pair, case.allowed, ways, held_in, corrections, ordered)
        decision = self._planner.decide(asked, now)
        if pair is not None and asked.waits(decision):
            remote.throughput.planned(now)
        as_sent = decision.codec if decision.strategy is Strategy.SPLIT else RAW
        return Plan(
            decision,
            asked.in_codec(as_sent),
            now,
            remote.corrections,
            expected if as_sent.name == held_in else 0,
            remote.throughput.link.rate,
            bool(request.sampling_params is not None and request.sampling_params.stop),
        )

    def _watch(self, where: dict[str, Plan], request: Request, plan: Plan) -> None:
        where[request.request_id] = plan
        while len(where) > _MOST_WATCHED:
            del where[next(iter(where))]

    def _pair(self, case: Case) -> Pair | None:
        remote, layout = case.remote, case.layout
        vllm, mac = self._vllm.at(case.now), remote.speed.at(case.now)
        if vllm is None or mac is None:
            return None
        if self._sizes is None or self._sizes[0] is not layout:
            self._sizes = layout, kv_bytes(layout)
        return Pair(vllm, mac, remote.throughput.link, len(layout.layers), self._sizes[1])

    def _ways(self, remote: Remote, layout: CacheLayout, pair: Pair) -> tuple[Codec, ...]:
        """How a prompt's KV may be sent, if all of it is."""
        offered = remote.welcome.codecs if remote.welcome is not None else ()
        return tuple(
            remote.throughput.stated(
                codec(name, ratio(layout, name), pair.vllm.coding, pair.mac.coding, self._streams)
            )
            for name in codecs.allowed(self._codec, offered, layout)
        )

    def _cached(self, request: Request, engine: EnginePort) -> int:
        """Tokens of the prompt that vLLM has cached."""
        if engine.prefixes is None or self._blind or not request.block_hashes:
            return 0
        try:
            return engine.prefixes.find(request)[0]
        except Exception:
            # It is not what this was written for: plans do without.
            logger.exception("vLLM's prefix cache is not looked into for plans any more")
            self._blind = True
            return 0

    def _load(self, case: Case, pair: Pair) -> Load:
        remote, now = case.remote, case.now
        queue = case.engine.load(case.request.request_id)
        seconds = 0.0
        looked = queue.pending[:_MOST_QUEUED]
        for name, tokens in looked:
            plan = self._waiting.get(name)
            context = plan.work.cached if plan is not None else 0
            seconds += pair.vllm.prefill.seconds(max(1, tokens - context), context)
        if looked:
            seconds *= queue.waiting / len(looked)
        rows, computing, under_way = remote.others, 0.0, 0.0
        for session in case.sessions:
            if session.proof or session.receiver not in (None, remote):
                continue
            rows += 1
            promise = session.promise
            if session.whole:
                if not session.tokens:
                    held = session.plan.work.held if session.plan is not None else 0
                    new = max(1, session.request.num_prompt_tokens - held)
                    whole = pair.mac.prefill.seconds(new, held)
                    computing += max(0.0, whole - (now - session.begun_at))
                continue
            if promise is not None and session.phase in (Phase.OPEN, Phase.DECODING):
                under_way += promise.missing * session.ratio
        # Until vLLM can begin, some of what is under way has arrived.
        under_way = max(0.0, under_way - seconds * pair.link.rate)
        return Load(seconds, queue.rows, computing, rows, under_way)

    # --- meanwhile ----------------------------------------------------------------------------

    def scheduled(self, request_id: str) -> None:
        """vLLM begins to prefill the request."""
        self._waiting.pop(request_id, None)

    @property
    def watching(self) -> bool:
        """Whether ``output`` wants to be told."""
        return bool(self._local)

    def output(self, request_id: str, tokens: int, ended: bool, now: float) -> float | None:
        """vLLM's own output of a request; at its end, the plan's error."""
        plan = self._local.get(request_id)
        if plan is None:
            return None
        plan.tokens += tokens
        if not ended:
            return None
        self.forget(request_id)
        self._outputs.ended(plan.tokens)
        return self._error(plan, plan.tokens, now)

    def given_up(self, plan: Plan | None, tokens: int) -> None:
        """A text was given up after so many tokens: where it has stop strings, by one of those. A
        client that left cannot be told apart."""
        if plan is not None and plan.stops and tokens:
            self._outputs.ended(tokens)

    def gone(self, request_id: str) -> None:
        """vLLM was told to give the request up."""
        if (plan := self._local.get(request_id)) is not None:
            self.given_up(plan, plan.tokens)
        self.forget(request_id)

    def forget(self, request_id: str) -> None:
        """The request is gone, or goes on in another way than planned."""
        self._waiting.pop(request_id, None)
        self._local.pop(request_id, None)

    def finished(self, plan: Plan, tokens: int, rate: float, now: float) -> float | None:
        """The receiver has finished the text, and the link is taken to carry ``rate`` by now; the
        plan's error."""
        self._outputs.ended(tokens)
        return self._error(plan, tokens, now, same(rate, plan.rate))

    def waited(self, plan: Plan | None, now: float) -> None:
        """The receiver had no room in its batch for the request until vLLM took it over: it would
        have taken that long at least, whoever computes its prompt."""
        prediction = plan.decision.prediction if plan is not None else None
        if plan is None or prediction is None or not 0 < prediction.total < now - plan.at:
            return
        for strategy in (Strategy.SPLIT, Strategy.MEET, Strategy.MAC):
            plan.corrections.observe(strategy, (now - plan.at) / prediction.total, now)

    def _error(self, plan: Plan, tokens: int, now: float, told: bool = True) -> float | None:
        """``told``: it tells of the strategy. Another link does not, and is known of by now."""
        error = plan.error(tokens, now)
        if error is not None and told:
            self._planner.turned_out(plan, error, now)
        return error
