"""What becomes of the outputs of one step of vLLM's engine, before its clients get them.

The first token of a handed-off request ends it for vLLM; for its client it goes on. Requests of
nobody's are left out: shadows, trials, and prompts whose caches are compared.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mlx_receiver.wire import messages as m
from vllm_mac_decode.scheduler.answers import Answers
from vllm_mac_decode.scheduler.handoff import Handoff, Phase

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

#: Our key in the ``kv_transfer_params`` that routers carry to the receiver.
ROUTER_KEY = "mac_decode"

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class StepOutputs(Answers):
    """See the module's text. What has no underscore takes the lock, the rest wants it."""

    def rewrite(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Adjust what one engine step is about to send to the clients, and to the metrics."""
        with self._lock:
            now = time.monotonic()
            self._observe([one for group in outputs.values() for one in group.outputs], now)
            if not (
                self._by_request
                or self._shadow.used
                or self.profiling.used
                or self._planning.watching
            ):
                return
            for client, group in outputs.items():
                kept = []
                # Asked first: what ends is forgotten.
                finished = {r: self._reported(r) for r in group.finished_requests or ()}
                for output in group.outputs:
                    if self._shadow.owns(output.request_id):
                        if output.finish_reason is not None:
                            self._shadow.finished(output.request_id)
                        continue
                    if self.profiling.owns(output.request_id):
                        continue
                    self._watch(output, now)
                    session = self._by_request.get(output.request_id)
                    if session is None or self._keep(client, session, output):
                        kept.append(output)
                group.outputs = kept
                if finished:
                    group.finished_requests = {
                        name for r, name in finished.items() if not self._hidden(r)
                    }
            # A response begins to be the receiver's in a step, and its end causes one.
            elsewhere = self._elsewhere()
            for group in outputs.values():
                if group.scheduler_stats is not None:
                    group.scheduler_stats.num_running_reqs += elsewhere
            if self.engine is not None:
                told = (group.scheduler_stats for group in outputs.values())
                stats = next(filter(None, told), None)
                if self._shadow.used:
                    self._shadow.discount(self.engine, stats)
                if self.profiling.used:
                    self.profiling.discount(self.engine, stats)

    def _observe(self, outputs: list[EngineCoreOutput], now: float) -> None:
        """What a step's outputs tell of vLLM's speed."""
        told = [
            (output.request_id, len(output.new_token_ids), output.finish_reason is not None)
            for output in outputs
        ]
        self.profiling.stepped(told, now)
        self._observing.stepped(told, now)

    def _watch(self, output: EngineCoreOutput, now: float) -> None:
        """See what becomes of what was left to vLLM."""
        if self._planning.watching:
            tokens, ended = len(output.new_token_ids), output.finish_reason is not None
            self._note(self._planning.output(output.request_id, tokens, ended, now))

    def _elsewhere(self) -> int:
        """Responses that run, although vLLM's scheduler does not know them."""
        return sum(s.phase is Phase.DECODING for s in self._sessions.values()) + sum(
            s.phase is Phase.CONTINUING
            for name, s in self._by_request.items()
            if name == s.continued_as
        )

    def _keep(self, client: int, session: Handoff, output: EngineCoreOutput) -> bool:
        """Whether the step's output goes out with the step. False: it was sent from here."""
        assert self.engine is not None
        if session.proof:
            self._keep_proof(session, output)
            return False
        if session.routed:
            self._keep_prefilled(session, output)
            return True
        if session.continued_as:
            if output.request_id != session.continued_as:
                return True
            self.engine.continue_output(output, session.request_id)
            if output.finish_reason is not None:
                self._forget(session)
            return True
        session.tokens += output.new_token_ids
        if output.finish_reason is None:
            return True
        limit = self.engine.is_length(output) and len(session.tokens) < session.max_tokens
        room = self.engine.max_model_len - session.request.num_prompt_tokens
        if not limit or len(session.tokens) >= room:
            # Finished by itself: a stop token, an error, or the client's own limit.
            if session.pending:
                self._part(session, "finished at the first token")
            self._forget(session)
            return True
        output.finish_reason = None
        session.first_token_at = time.monotonic()
        if session.receiver is not None:
            session.receiver.throughput.computed(session.session, session.first_token_at)
        # Sent from here, so that it is in the queue before the receiver can answer.
        self.engine.emit(client, [output])
        if not session.pending:
            self._continue_locally(session)
        else:
            session.enter(Phase.DECODING)
            assert session.promise is not None
            session.promise.start(session.first_token_at)
            self._shadow.begin(session.session, session.request, session.tokens, self.engine)
            self._send(session, m.Start(session.session, session.tokens[-1]))
        return False

    def _keep_prefilled(self, session: Handoff, output: EngineCoreOutput) -> None:
        if output.finish_reason is None:
            return
        self._by_request.pop(session.request_id, None)
        if session.phase in (Phase.DECIDED, Phase.OPEN):
            self._part(session, "the prefill failed")
            session.enter(Phase.OVER)
        if output.kv_transfer_params and output.new_logprobs is not None:
            # The router throws the first token's own response away.
            ids, values, ranks, *_ = output.new_logprobs
            output.kv_transfer_params[ROUTER_KEY]["logprobs"] = {
                "token_ids": [int(token) for token in ids[0]],
                "values": [max(float(value), _LOWEST_LOGPROB) for value in values[0]],
                "rank": int(ranks[0]),
            }

    def _keep_proof(self, session: Handoff, output: EngineCoreOutput) -> None:
        """Nobody waits for the output; the receiver compares once it has all."""
        if output.finish_reason is None:
            return
        if session.phase is Phase.OPEN and output.new_token_ids:
            session.enter(Phase.PREFILLED)
            assert session.promise is not None
            session.promise.start(time.monotonic())
            self._send(session, m.Start(session.session, output.new_token_ids[-1]))
            return
        self._fall_back(session, "vLLM did not compute it")
        self._forget(session)

    def _hidden(self, request_id: str) -> bool:
        if self._shadow.owns(request_id) or self.profiling.owns(request_id):
            return True
        session = self._by_request.get(request_id)
        return session is not None and request_id != session.continued_as

    def _reported(self, request_id: str) -> str:
        session = self._by_request.get(request_id)
        return session.request_id if session is not None else request_id
