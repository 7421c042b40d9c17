"""Scheduler half: which tokens of which request are new in the cache after this step.

vLLM announces a request's blocks once (``scheduled_new_reqs``) and then only additions; the
plan keeps the whole block list of each exported request and turns every step into spans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_receiver.wire.quantised import RAW
from vllm_mac_decode.export import ExportSpan

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


@dataclass
class _Exported:
    session: int
    prompt_tokens: int
    codec: str
    from_end: bool
    blocks: list[list[int]] = field(default_factory=list)  # of each KV cache group
    upto: int = 0


class ExportPlan:
    """Spans per step, for requests that have a session. Used by the engine's thread alone."""

    def __init__(self, block_sizes: Sequence[int]) -> None:
        """``block_sizes``: tokens in a block of each KV cache group."""
        self._block_sizes = block_sizes
        self._requests: dict[str, _Exported] = {}
        self._announced: set[str] = set()
        self._kept: set[str] = set()  # finished requests that vLLM keeps until workers report them

    def add(
        self,
        request_id: str,
        session: int,
        prompt_tokens: int,
        codec: str = RAW,
        from_end: bool = False,
    ) -> None:
        """From now on the request's prompt is exported to the session, in that codec."""
        self._requests[request_id] = _Exported(session, prompt_tokens, codec, from_end)

    def drop(self, request_id: str) -> None:
        """No more spans for the request (its session ended)."""
        self._requests.pop(request_id, None)

    def forget(self, request_id: str) -> bool:
        """The request finished. True when workers have seen spans of it: only they know when
        its blocks have been read."""
        self._requests.pop(request_id, None)
        seen = request_id in self._announced
        self._announced.discard(request_id)
        if seen:
            self._kept.add(request_id)
        return seen

    def released(self, request_ids: set[str]) -> set[str]:
        """Those of the requests that vLLM keeps for us: workers have read their blocks."""
        released = self._kept & request_ids
        self._kept -= released
        return released

    def preempted(self, output: SchedulerOutput) -> list[str]:
        """Exported requests whose blocks this step took away or gave back anew."""
        lost = set(output.preempted_req_ids or ()) | set(
            output.scheduled_cached_reqs.resumed_req_ids
        )
        lost |= {
            new.req_id
            for new in output.scheduled_new_reqs
            if new.req_id in self._requests and self._requests[new.req_id].upto
        }
        return [request_id for request_id in lost if request_id in self._requests]

    def step(
        self, output: SchedulerOutput, alive: Callable[[str], bool] = lambda _: True
    ) -> list[ExportSpan]:
        """The spans that this step completes: what it computes, and before a request's first
        chunk the cached prefix that was never exported. None of requests that are not ``alive``.
        """
        spans = []
        for new in output.scheduled_new_reqs:
            if new.req_id in self._requests and alive(new.req_id):
                exported = self._requests[new.req_id]
                exported.blocks = [list(group) for group in new.block_ids]
                spans += self._span(new.req_id, exported, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in self._requests and alive(request_id):
                exported = self._requests[request_id]
                for held, more in zip(exported.blocks, blocks or (), strict=False):
                    held += more
                spans += self._span(request_id, exported, computed, output)
        return spans

    def _span(
        self, request_id: str, exported: _Exported, computed: int, output: SchedulerOutput
    ) -> list[ExportSpan]:
        end = min(computed + output.num_scheduled_tokens[request_id], exported.prompt_tokens)
        start, exported.upto = exported.upto, max(end, exported.upto)
        if end <= start:
            return []
        self._announced.add(request_id)
        blocks = [
            held[start // size : -(-end // size)]
            for held, size in zip(exported.blocks, self._block_sizes, strict=True)
        ]
        prompt, codec, from_end = exported.prompt_tokens, exported.codec, exported.from_end
        return [
            ExportSpan(exported.session, request_id, start, end, prompt, blocks, codec, from_end)
        ]
