"""Shadow prefill: what receivers decoded enters vLLM's prefix cache while vLLM has nothing to do.

vLLM computes no KV of tokens that came back from a receiver, so the next turn of a conversation,
or a fallback in the middle of a response, would have to prefill them while somebody waits. Here
vLLM is asked for them before that: requests of nobody's, whose prompts are the conversation up to
a full block and a token. One at a time, each for one chunk of tokens, and only while the engine is
idle: who comes meanwhile waits for a step with one chunk in it at most.

What a shadow may take is what vLLM would hold had it decoded the response itself: the same blocks,
which push others out of the cache in the same order, least recently used first. A conversation
whose own beginning has left the cache is not shadowed: somebody needed the room more. Nor is
anything while less than a quarter of the blocks would be free of requests.

Pure rules: no vLLM here. Every method wants the relay's lock to be held, and ``work`` the engine's
thread.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request

    from vllm_mac_decode.scheduler.handoff import Counts
    from vllm_mac_decode.scheduler.port import EnginePort, PrefixCache

logger = logging.getLogger("vllm.mac_decode.shadow")

#: Responses that have ended and wait for their turn; the oldest one goes when there are more.
MOST_ENDED: Final = 64

#: Tokens of those responses together: their lists are kept.
MOST_TOKENS: Final = 1 << 20

#: The share of vLLM's blocks that stays free of requests while a shadow runs.
FREE_SHARE: Final = 0.25

#: Seconds that vLLM may leave a shadow in its queue. An engine with a waiting request does not
#: rest, so one that it cannot run must not stay there.
_QUEUE_SECONDS: Final = 1.0


@dataclass(eq=False)
class _Conversation:
    prompt: list[int]
    output: list[int]  # grows while the receiver decodes
    salt: str | None
    hashes: list[Any]  # of its first blocks, as vLLM hashes them
    upto: int  # tokens that vLLM has computed
    due: int = 0  # tokens below which no other chunk is full
    ended: bool = False

    @property
    def tokens(self) -> int:
        """All that there are."""
        return len(self.prompt) + len(self.output)

    def full(self, prefixes: PrefixCache) -> int:
        """Its tokens in full blocks, as far as a prompt may have them. vLLM alone would have no KV
        of the last one either."""
        return min(self.tokens - 1, prefixes.longest) // prefixes.block * prefixes.block

    def beginning(self, tokens: int) -> list[int]:
        """Its first so many tokens."""
        return [*self.prompt[:tokens], *self.output[: max(0, tokens - len(self.prompt))]]


@dataclass
class _Asked:
    """The one shadow that vLLM has."""

    conversation: _Conversation
    request_id: str
    tokens: int
    since: float
    added: bool = False  # vLLM's scheduler has it
    scheduled: bool = False


@dataclass
class _Lookups:
    """What shadows have added to vLLM's prefix cache statistics."""

    requests: int = 0
    queries: int = 0
    hits: int = 0


@dataclass
class _Tally:
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class Shadow:
    """The conversations that are to be shadowed, and the one request that does it."""

    def __init__(self, enabled: bool, chunk: int) -> None:
        """``chunk``: tokens that one request computes, at the most; at least a block's."""
        self._on = enabled
        self._chunk = chunk
        self._conversations: dict[int, _Conversation] = {}
        self._asked: _Asked | None = None
        # Nobody outside this process can name a request so.
        self._prefix = f"mac-decode-shadow-{secrets.token_hex(8)}-"
        self._number = 0
        self._lookups = _Lookups()
        self._tally = _Tally()

    # --- conversations ----------------------------------------------------------------------

    def begin(self, key: int, request: Request, output: list[int], engine: EnginePort) -> None:
        """A receiver decodes this response from now on; ``output`` is the list that grows."""
        if not self._on or engine.prefixes is None:
            return
        prompt = request.prompt_token_ids or []
        block = engine.prefixes.block
        hashes = list(request.block_hashes)
        self._conversations[key] = _Conversation(
            prompt, output, request.cache_salt, hashes, len(prompt) // block * block
        )

    def grown(self, key: int, engine: EnginePort) -> None:
        """Tokens have come back: an idle engine is woken for a full chunk."""
        conversation = self._conversations.get(key)
        if conversation is None or self._asked is not None or engine.prefixes is None:
            return
        if conversation.tokens < conversation.due:
            return
        if self._ready(conversation, engine.prefixes):
            engine.wake()
        else:
            conversation.due = conversation.upto + self._step(engine.prefixes) + 1

    def ended(self, key: int, engine: EnginePort | None) -> None:
        """The response is over, however it ended: what is left may be done when there is time."""
        conversation = self._conversations.pop(key, None)
        if conversation is None or conversation.ended:
            return
        conversation.ended = True
        self._conversations[key] = conversation  # behind those that ended before
        waiting = {key: other.tokens for key, other in self._conversations.items() if other.ended}
        for oldest in list(waiting)[:-1]:
            if len(waiting) <= MOST_ENDED and sum(waiting.values()) <= MOST_TOKENS:
                break
            del waiting[oldest]
            self._skip(oldest, "too_many")
        if self._asked is None and engine is not None:
            engine.wake()

    def drop(self, key: int) -> None:
        """vLLM computes the rest of the conversation by itself."""
        self._conversations.pop(key, None)

    def clear(self) -> None:
        """Nothing of what was to be done is worth anything."""
        self._conversations.clear()

    # --- the engine -------------------------------------------------------------------------

    def work(self, engine: EnginePort, now: float) -> None:
        """Give an idle engine the next chunk, if there is one. For the engine's thread."""
        if not self._on or self._asked is not None or not self._conversations:
            return
        prefixes = engine.prefixes
        if prefixes is None or engine.weights_changed:
            self.clear()
            return
        if not engine.idle:
            return
        try:
            if self._ask(prefixes, now):
                engine.wake()  # for the others: nothing here may take long
        except Exception:
            # vLLM's prefix cache is not what this was written for: responses do not need it.
            logger.exception("shadow prefill is off from now on")
            self._on = False
            self.clear()

    def _ask(self, prefixes: PrefixCache, now: float) -> bool:
        """Look at one conversation that is ready; whether another one may be."""
        ended = [item for item in self._conversations.items() if item[1].ended]
        alive = [item for item in self._conversations.items() if not item[1].ended]
        for key, conversation in ended + alive:
            if self._ready(conversation, prefixes):
                cause = self._try(conversation, prefixes, now)
                if cause:
                    self._skip(key, cause)
                return self._asked is None
            if conversation.ended:
                del self._conversations[key]
        return False

    def _try(self, conversation: _Conversation, prefixes: PrefixCache, now: float) -> str:
        """Ask for the conversation's next chunk, if vLLM lacks it; or why it is given up."""
        full = conversation.full(prefixes)
        cached, _ = prefixes.find(self._draft(conversation, full, prefixes))
        if cached + prefixes.slack < conversation.upto:
            return "evicted"
        conversation.upto = max(conversation.upto, cached // prefixes.block * prefixes.block)
        if not self._ready(conversation, prefixes):
            return ""
        tokens = min(conversation.upto + self._step(prefixes), full)
        request = self._draft(conversation, tokens, prefixes)
        if prefixes.find(request)[1] < FREE_SHARE:
            return "no_room"
        self._asked = _Asked(conversation, request.request_id, tokens, now)
        self._number += 1
        prefixes.queue(request)
        return ""

    def _draft(self, conversation: _Conversation, tokens: int, prefixes: PrefixCache) -> Request:
        """A request for its first so many tokens, and the one behind them: layers with a window
        keep what a prompt needs that goes on from the last full block before its last token."""
        prompt = conversation.beginning(tokens + 1)
        request = prefixes.draft(
            f"{self._prefix}{self._number}", prompt, conversation.salt, conversation.hashes
        )
        # vLLM adds the token that it samples, which is not the conversation's.
        conversation.hashes = list(request.block_hashes)
        return request

    def _step(self, prefixes: PrefixCache) -> int:
        most = min(self._chunk, prefixes.most_tokens - 1) // prefixes.block * prefixes.block
        return max(most, prefixes.block)

    def _ready(self, conversation: _Conversation, prefixes: PrefixCache) -> bool:
        left = conversation.full(prefixes) - conversation.upto
        return left >= (1 if conversation.ended else self._step(prefixes))

    def _skip(self, key: int, cause: str) -> None:
        del self._conversations[key]
        self._tally.skipped[cause] += 1

    # --- its request in vLLM's scheduler ----------------------------------------------------

    def owns(self, request_id: str) -> bool:
        """Whether it is a shadow's: nobody waits for what it brings."""
        return request_id.startswith(self._prefix)

    @property
    def used(self) -> bool:
        """Whether vLLM ever saw a shadow."""
        return self._number > 0

    @property
    def resting(self) -> bool:
        """Whether vLLM has none."""
        return self._asked is None

    def added(self, request_id: str) -> None:
        """vLLM's scheduler has taken it."""
        if self._asked is not None and self._asked.request_id == request_id:
            self._asked.added = True

    def give_way(self, engine: EnginePort | None) -> None:
        """Another request came: a shadow that has not begun is taken back, and tried again when
        there is time."""
        asked = self._asked
        if asked is not None and not asked.scheduled:
            self._withdraw(asked, engine, "busy")

    def scheduled(self, request_id: str, cached: int) -> None:
        """vLLM computes it in this step, from its token ``cached`` on."""
        asked = self._asked
        if asked is None or asked.request_id != request_id:
            return
        asked.scheduled = True
        self._tally.tokens += asked.tokens - cached
        self._lookups.requests += 1
        self._lookups.queries += asked.tokens + 1
        self._lookups.hits += cached

    def preempted(self, request_id: str, engine: EnginePort | None) -> None:
        """vLLM took its blocks away for somebody else."""
        if self._asked is not None and self._asked.request_id == request_id:
            self._withdraw(self._asked, engine, "busy")

    def finished(self, request_id: str) -> None:
        """vLLM has computed it."""
        asked = self._asked
        if asked is not None and asked.request_id == request_id:
            asked.conversation.upto = max(asked.tokens, asked.conversation.upto)
            self._asked = None

    def gone(self, request_id: str) -> None:
        """vLLM ended it, or never began it."""
        if self._asked is not None and self._asked.request_id == request_id:
            self._asked = None

    def reset(self, engine: EnginePort | None) -> str | None:
        """vLLM's prefix cache is about to be emptied. The shadow that vLLM's scheduler has, and is
        to end before that, if there is one."""
        self.clear()
        asked = self._asked
        if asked is not None and not asked.added:
            self._withdraw(asked, engine, "busy")
            return None
        return asked.request_id if asked is not None else None

    def look(self, engine: EnginePort | None, now: float) -> None:
        """Take back what vLLM leaves in its queue."""
        asked = self._asked
        if asked is None or asked.scheduled or now - asked.since < _QUEUE_SECONDS:
            return
        if not asked.added:
            self._withdraw(asked, engine, "busy")
            return
        for key, conversation in list(self._conversations.items()):
            if conversation is asked.conversation:
                del self._conversations[key]
        self._withdraw(asked, engine, "no_room")

    def _withdraw(self, asked: _Asked, engine: EnginePort | None, cause: str) -> None:
        self._asked = None
        self._tally.skipped[cause] += 1
        if engine is not None and engine.prefixes is not None:
            engine.prefixes.withdraw(asked.request_id)

    # --- statistics -------------------------------------------------------------------------

    def discount(self, engine: EnginePort, stats: SchedulerStats | None) -> None:
        """Take shadows out of what a step says of the scheduler."""
        lookups, self._lookups = self._lookups, _Lookups()
        if stats is None:
            return
        asked = self._asked
        if asked is not None and asked.scheduled:
            stats.num_running_reqs = max(0, stats.num_running_reqs - 1)
        elif asked is not None and asked.added:
            # vLLM counts those that it puts off apart.
            stats.num_waiting_reqs = max(0, stats.num_waiting_reqs - 1)
        if lookups.requests and engine.prefixes is not None:
            engine.prefixes.discount(stats, lookups.requests, lookups.queries, lookups.hits)

    def settle(self, counts: Counts) -> None:
        """Add what happened since the last call."""
        tally, self._tally = self._tally, _Tally()
        if tally.tokens:
            counts.events["shadow_tokens"] += tally.tokens
        counts.skipped.update(tally.skipped)
