"""When each block of a hand-off was computed, gathered, sent and resident.

The receiver keeps the times of its latest hand-offs and shows them as JSON under
``/handoffs/{request_id}``. Here they become typed rows, the few figures that tell what of the
transfer was hidden behind the prefill, and a trace for https://ui.perfetto.dev. ``timeline_plot``
and ``timeline_text`` draw them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import msgspec

from mlx_receiver.wire.handoffs import BlockTimes, HandoffTimes
from mlx_receiver.wire.seldom import printable

#: A block that seems to arrive before it was sent, or later than this, was timed by two clocks.
_ONE_CLOCK_NS = 10_000_000_000


class TimelineError(ValueError):
    """The receiver's answer is no hand-off that can be drawn."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A stretch of work on one layer, in nanoseconds from the hand-off's beginning."""

    layer: int
    start: int
    end: int
    label: str = ""


@dataclass(frozen=True)
class Figures:
    """What a hand-off cost, in milliseconds; None where it did not get that far.

    ``prefill_ms`` runs from the session's opening to the first token. ``exposed_ms`` is how long
    KV was still under way after the first token: what the overlap did not hide.
    ``handoff_gap_ms`` is the pause between vLLM's token and the first one of the receiver.
    ``hidden_share`` is the part of the KV, from 0 to 1, that was resident at the first token.
    """

    prefill_ms: float | None
    exposed_ms: float | None
    handoff_gap_ms: float | None
    hidden_share: float | None


@dataclass(frozen=True)
class Handoff:
    """One request's hand-off. All times are nanoseconds from ``Handoff.opened_ns``, which is 0."""

    request_id: str
    prompt_tokens: int
    kv_bytes: int
    outcome: str
    first_token_ns: int | None
    complete_ns: int | None
    first_decoded_ns: int | None
    ended_ns: int | None
    blocks: tuple[BlockTimes, ...]
    #: How far the sender's clock was moved onto the receiver's; 0 where both read the same one.
    clock_shift_ns: int = 0
    #: Why it was shared like this, as vLLM's side said.
    plan: str = ""

    @cached_property
    def layers(self) -> list[int]:
        """The model's layers that sent anything, in order."""
        return sorted({block.layer for block in self.blocks})

    @cached_property
    def computed(self) -> list[Interval]:
        """vLLM's forward pass: each interval ends when the layer's K and V of a chunk exist.

        It begins where the previous one ended, so it holds the rest of the layer before (its
        attention and feed-forward part) as well.
        """
        marks = sorted({(block.computed_ns, block.layer) for block in self.blocks})
        chunk = {(b.computed_ns, b.layer): (b.token_start, b.tokens) for b in self.blocks}
        intervals = []
        before = min(0, marks[0][0])
        for mark, layer in marks:
            start, tokens = chunk[mark, layer]
            label = f"layer {layer}: K, V of tokens {start}..{start + tokens - 1}"
            intervals.append(Interval(layer, before, mark, label))
            before = mark
        return intervals

    @property
    def gathered(self) -> list[Interval]:
        """From the layer's K and V being there to their being copied out of the paged cache."""
        return _merged(self._intervals("computed_ns", "gathered_ns"))

    @property
    def sent(self) -> list[Interval]:
        """From the hand-over to the network to the block's header reaching the receiver."""
        return self._intervals("sent_ns", "arrived_ns")

    @property
    def arrived(self) -> list[Interval]:
        """From the block's header to its last byte being in the receiver's cache."""
        return self._intervals("arrived_ns", "committed_ns")

    @cached_property
    def resident(self) -> dict[int, int]:
        """When the last block of each layer was in the receiver's cache."""
        latest: dict[int, int] = {}
        for block in self.blocks:
            latest[block.layer] = max(latest.get(block.layer, 0), block.committed_ns)
        return latest

    @property
    def last_computed_ns(self) -> int:
        """When the last K and V existed; what comes after is attention, MLP, head, sampling."""
        return max(block.computed_ns for block in self.blocks)

    @property
    def last_committed_ns(self) -> int:
        """When the last block was in the receiver's cache."""
        return max(block.committed_ns for block in self.blocks)

    @cached_property
    def figures(self) -> Figures:
        """The hand-off in four numbers."""
        first, decoded = self.first_token_ns, self.first_decoded_ns
        if first is None:
            return Figures(None, None, None, None)
        cells = sum(block.heads * block.tokens for block in self.blocks)
        there = sum(b.heads * b.tokens for b in self.blocks if b.committed_ns <= first)
        return Figures(
            prefill_ms=first / 1e6,
            exposed_ms=max(0, self.last_committed_ns - first) / 1e6,
            handoff_gap_ms=None if decoded is None else (decoded - first) / 1e6,
            hidden_share=there / cells,
        )

    def _intervals(self, start: str, end: str) -> list[Interval]:
        found = [
            Interval(block.layer, begin, max(begin, getattr(block, end)), _describe(block))
            for block in self.blocks
            for begin in [getattr(block, start)]
        ]
        return sorted(found, key=lambda interval: (interval.layer, interval.start, -interval.end))


def parse(answer: bytes | str) -> Handoff:
    """The hand-off that the receiver's ``/handoffs/{request_id}`` describes.

    Raises TimelineError when it is something else or holds no blocks yet.
    """
    try:
        said = msgspec.json.decode(answer, type=HandoffTimes)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TimelineError(f"not a hand-off of a receiver: {error}") from None
    if not said.blocks:
        why = ": the receiver held all of it" if said.held_tokens else ""
        if said.strategy == "mac":
            why = ": the receiver computed it itself"
        raise TimelineError(f"no KV has arrived for request {said.request_id}{why}")
    blocks, shift = _on_one_clock(said.blocks)
    zero = said.opened_ns
    return Handoff(
        request_id=said.request_id,
        prompt_tokens=said.prompt_tokens,
        kv_bytes=said.kv_bytes,
        outcome=said.outcome,
        first_token_ns=_since(zero, said.started_ns),
        complete_ns=_since(zero, said.complete_ns),
        first_decoded_ns=_since(zero, said.first_decoded_ns),
        ended_ns=_since(zero, said.ended_ns),
        blocks=tuple(_moved(block, -zero, -zero) for block in blocks),
        clock_shift_ns=shift,
        plan=printable(said.plan),
    )


def trace_events(handoff: Handoff) -> dict[str, Any]:
    """The hand-off in Chrome's trace event format: a process per stage, a track per layer."""
    stages = [
        ("vLLM: compute", handoff.computed),
        ("vLLM: gather from the paged cache", handoff.gathered),
        ("network: send", handoff.sent),
        ("receiver: arrive", handoff.arrived),
    ]
    events: list[dict[str, Any]] = []
    for process, (title, intervals) in enumerate(stages, 1):
        events.append(_meta("process_name", process, 0, title))
        events.append(
            {
                "ph": "M",
                "name": "process_sort_index",
                "pid": process,
                "args": {"sort_index": process},
            }
        )
        for track, name, interval in _tracks(intervals):
            if name:
                events.append(_meta("thread_name", process, track, name))
            events.append(
                {
                    "ph": "X",
                    "name": interval.label,
                    "cat": title.partition(":")[0],
                    "pid": process,
                    "tid": track,
                    "ts": interval.start / 1000,
                    "dur": (interval.end - interval.start) / 1000,
                }
            )
    for name, at in milestones(handoff):
        events.append(
            {
                "ph": "i",
                "s": "g",
                "name": name,
                "cat": "request",
                "pid": 1,
                "tid": 0,
                "ts": at / 1000,
            }
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "request_id": handoff.request_id,
            "prompt_tokens": handoff.prompt_tokens,
            "kv_bytes": handoff.kv_bytes,
            "outcome": handoff.outcome,
            "plan": handoff.plan,
            "clock_shift_ns": handoff.clock_shift_ns,
        },
    }


def milestones(handoff: Handoff) -> list[tuple[str, int]]:
    """What happened to the request as a whole, and when; only what did happen."""
    named = [
        ("last layer's K and V computed", handoff.last_computed_ns),
        ("first token (vLLM)", handoff.first_token_ns),
        ("cache complete", handoff.complete_ns),
        ("first remote token (MLX)", handoff.first_decoded_ns),
    ]
    return [(name, at) for name, at in named if at is not None]


def _tracks(intervals: Iterable[Interval]) -> Iterable[tuple[int, str, Interval]]:
    """Each interval's track number, and the track's name when it is its first.

    Slices on one of Perfetto's tracks must not overlap in part, as two workers' blocks of a layer
    do: a layer has as many tracks as it needs.
    """
    busy_until: dict[tuple[int, int], int] = {}
    for interval in sorted(intervals, key=lambda i: (i.layer, i.start)):
        lane = 0
        while busy_until.get((interval.layer, lane), interval.start) > interval.start:
            lane += 1
        first = (interval.layer, lane) not in busy_until
        busy_until[interval.layer, lane] = interval.end
        name = f"layer {interval.layer}" + (f" ({lane + 1})" if lane else "")
        yield interval.layer * 256 + lane + 1, name if first else "", interval


def _meta(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": {"name": name}}


def _merged(intervals: list[Interval]) -> list[Interval]:
    """One interval where keys and values went the same way at the same time."""
    seen: dict[tuple[int, int, int], Interval] = {}
    for interval in intervals:
        key = interval.layer, interval.start, interval.end
        if key in seen:
            interval = replace(interval, label=f"{seen[key].label}; {interval.label}")
        seen[key] = interval
    return list(seen.values())


def _describe(block: BlockTimes) -> str:
    last = block.token_start + block.tokens - 1
    heads = f", heads {block.head_start}..{block.head_start + block.heads - 1}"
    return f"{block.part} of tokens {block.token_start}..{last}{heads if block.head_start else ''}"


def _on_one_clock(blocks: list[BlockTimes]) -> tuple[list[BlockTimes], int]:
    """Blocks with the sender's times on the receiver's clock, and how far they were moved.

    Two machines count from different beginnings. Their difference is taken to be what makes the
    fastest block take no time at all, which flatters the network by that block's real time.
    """
    fastest = min(block.arrived_ns - block.sent_ns for block in blocks)
    if 0 <= fastest < _ONE_CLOCK_NS:
        return blocks, 0
    return [_moved(block, fastest, 0) for block in blocks], fastest


def _moved(block: BlockTimes, sender: int, receiver: int) -> BlockTimes:
    return msgspec.structs.replace(
        block,
        computed_ns=block.computed_ns + sender,
        gathered_ns=block.gathered_ns + sender,
        sent_ns=block.sent_ns + sender,
        arrived_ns=block.arrived_ns + receiver,
        committed_ns=block.committed_ns + receiver,
    )


def _since(zero: int, moment: int) -> int | None:
    return moment - zero if moment else None
