"""What a receiver tells over HTTP of the hand-offs that it remembers: ``/handoffs``.

Times are nanoseconds of a monotonic clock, 0 where the hand-off did not get that far.
"""

from __future__ import annotations

import msgspec


class BlockTimes(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of one layer's part, and when it was where: computed, gathered and sent by the
    sender's clock, then by the receiver's."""

    layer: int
    part: str
    head_start: int = 0
    heads: int = 1
    token_start: int
    tokens: int
    computed_ns: int
    gathered_ns: int
    sent_ns: int
    arrived_ns: int
    committed_ns: int


class HandoffSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One hand-off in the list."""

    request_id: str
    #: Who does what: see ``planning.cost.Strategy``.
    strategy: str = "split"
    #: Why vLLM's side chose to hand it off like this, for people.
    plan: str = ""
    state: str = ""
    prompt_tokens: int
    held_tokens: int = 0
    output_tokens: int = 0
    kv_bytes: int
    opened_ns: int
    allocated_ns: int = 0
    complete_ns: int = 0
    started_ns: int = 0
    first_decoded_ns: int = 0
    ended_ns: int = 0
    outcome: str = ""
    blocks_received: int = 0
    duplicate_blocks: int = 0


class HandoffTimes(HandoffSummary, frozen=True, kw_only=True):
    """``/handoffs/{request_id}``: the same, and its blocks (of very many, the first)."""

    blocks: list[BlockTimes]
