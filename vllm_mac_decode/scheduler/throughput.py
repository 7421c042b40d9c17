"""How fast the way to one receiver is at present, as hand-offs show it, and when to measure it.

Blocks leave while vLLM computes them, so that most transfers say only that the link is not slower
than that. One that goes on for long after the first token had a backlog all the time: that one
measures the link, or how fast both sides quantise, whichever was thought to be slower: no transfer
can be faster than either. Where the link was found too slow nothing is sent any more that could
tell of its recovery: then it is measured by itself, seldom, with few bytes, and while nothing else
is on it.

Everything here is called with the relay's lock held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mlx_receiver.planning.coding import ASSUMED
from mlx_receiver.planning.cost import RAW, Codec, Link
from mlx_receiver.planning.live import LinkEstimate

#: Before anything was measured: 10 Gbit/s, and a word's way there and back in a local network.
_RATE: Final = 1.25e9
_ROUND_TRIP: Final = 5e-4

#: The share of a transfer's time behind the first token from which on the link held it up.
_HELD_UP: Final = 0.2
#: Bytes and seconds that tell something.
_LEAST_BYTES: Final = 1 << 18
_LEAST_SECONDS: Final = 0.1

#: How soon after the last figure the link is measured by itself: after that share of the time in
#: which it has been as it is, but so many seconds at least and at most. So of the time for which
#: it stays another one little is lost, and the second request sees a short fault's end.
_MEASURE_SHARE: Final = 1 / 30
_MEASURE_SECONDS: Final = (1.0, 10.0)
#: Of a transport that only transfers tell of: seconds without one after which what they told is
#: forgotten.
_FORGET_SECONDS: Final = 300.0
#: What is another rate.
_SAME: Final = 1.25


def same(rate: float, before: float) -> bool:
    """Whether a link is taken to be as fast as before."""
    return before > 0 and 1 / _SAME < rate / before < _SAME


class Throughput:
    """One receiver's."""

    def __init__(self) -> None:
        self._estimate = LinkEstimate(_RATE, _ROUND_TRIP)
        #: By codec, in bytes of raw KV: how fast both sides quantise as they say, and as it is.
        self._stated = dict(ASSUMED)
        self._coding = {codec: LinkEstimate(rate, 0.0) for codec, rate in ASSUMED.items()}
        #: Sessions whose blocks are under way: when the first could leave, and, once all of them
        #: are computed, since when.
        self._open: dict[int, float] = {}
        self._computed: dict[int, float] = {}
        #: How their KV travels; receivers tell of raw bytes.
        self._codecs: dict[int, Codec] = {}
        #: Those of whose bytes the receiver computes some, and does not tell which.
        self._mixed: set[int] = set()
        #: The one that has had the link for itself since it began.
        self._alone: int | None = None
        #: What the last Status said: its time, and bytes of each session; of those the ones that
        #: were all computed.
        self._told: tuple[float, dict[int, int], set[int]] | None = None
        self._known_at = self._planned_at = float("-inf")
        #: Since when it is as it is.
        self._since = float("-inf")

    @property
    def link(self) -> Link:
        """What is known."""
        return self._estimate.link

    def codec(self, name: str, ratio: float) -> Codec:
        """How KV travels in the codec of that name, which makes it so much smaller."""
        if name not in self._coding:
            return Codec(name, ratio)
        coding = self._coding[name].link.rate
        return Codec(name, ratio, coding, coding)

    def stated(self, codec: Codec) -> Codec:
        """The same, by what both sides say of it at present. What transfers have told goes before
        that until they say something else."""
        rate = min(codec.encode, codec.decode)
        if codec.name in self._coding and not same(rate, self._stated[codec.name]):
            self._stated[codec.name] = rate
            self._coding[codec.name] = LinkEstimate(rate, 0.0)
        return self.codec(codec.name, codec.ratio)

    def measured(self, rate: float, round_trip: float, now: float) -> None:
        """The link was measured by itself."""
        if rate <= 0:
            return
        before = self.link.rate
        self._estimate = LinkEstimate(rate, round_trip)
        self._see(before, now)
        self._known_at = now

    def forget(self, now: float) -> None:
        """It cannot be measured by itself: after a while it is as in the beginning, so that
        requests try it."""
        if now - self._known_at > _FORGET_SECONDS:
            self.measured(_RATE, _ROUND_TRIP, now)

    def _see(self, before: float, now: float) -> None:
        """It is the rate that it was before, or another one."""
        if self._since == float("-inf") or not same(self.link.rate, before):
            self._since = now

    # --- hand-offs ----------------------------------------------------------------------------

    def began(self, session: int, now: float, mixed: bool = False, codec: Codec = RAW) -> None:
        """Its blocks leave from now on, in that codec; ``mixed``: until they meet what the receiver
        computes."""
        self._codecs[session] = codec
        if mixed:
            self._mixed.add(session)
        self._alone = session if not self._open else None
        self._open[session] = now

    def computed(self, session: int, now: float) -> None:
        """All of its blocks are computed."""
        if session in self._open:
            self._computed.setdefault(session, now)

    def complete(self, session: int, nbytes: int, now: float) -> None:
        """All of them are there."""
        began, computed = self._open.get(session), self._computed.get(session, now)
        alone, codec = self._alone == session, self._codecs.get(session, RAW)
        self.ended(session)
        if began is None or not alone or nbytes < _LEAST_BYTES:
            return
        seconds = now - began
        if seconds > 0:
            self._observe(codec, nbytes, seconds, now - computed > _HELD_UP * seconds, now)

    def ended(self, session: int) -> None:
        """Nothing more is sent."""
        self._open.pop(session, None)
        self._computed.pop(session, None)
        self._mixed.discard(session)
        if self._alone == session:
            self._alone = None

    def told(self, clock: float, arrived: Mapping[int, int], now: float) -> None:
        """The bytes of each session that have arrived, at ``clock`` seconds of the receiver's."""
        late = {s for s in arrived if s in self._computed}
        # A session that is complete goes on being told of.
        codecs = {s: c for s, c in self._codecs.items() if s in arrived or s in self._open}
        self._codecs = codecs
        before, self._told = self._told, (clock, dict(arrived), late)
        if before is None or not late & before[2] or self._mixed:
            return
        if before[1].keys() - arrived.keys():  # what those got at last is not known
            return
        # One that was all computed before is still under way: the link was never without work.
        seconds = clock - before[0]
        came = {s: n - before[1].get(s, 0) for s, n in arrived.items() if n > before[1].get(s, 0)}
        used = {codec.name: codec for codec in (codecs.get(s, RAW) for s in came)}
        if seconds >= _LEAST_SECONDS and sum(came.values()) >= _LEAST_BYTES and len(used) == 1:
            (codec,) = used.values()
            self._observe(codec, sum(came.values()), seconds, True, now)

    def _observe(
        self, sent_in: Codec, nbytes: int, seconds: float, held_up: bool, now: float
    ) -> None:
        """So many bytes of raw KV took so long, and were ``held_up`` by what is slowest."""
        codec = self.codec(sent_in.name, sent_in.ratio)
        sent, rate = nbytes * codec.ratio, self.link.rate
        by_coding = held_up and codec.encode * codec.ratio < rate
        if nbytes / seconds > codec.encode or by_coding:
            self._coding[codec.name].observe(nbytes, seconds, now)
        if sent / seconds > rate or (held_up and not by_coding):
            self._estimate.observe(sent, seconds, now)
            self._see(rate, now)
        if codec.name == RAW.name:  # a link that became faster would not show otherwise
            self._known_at = now

    # --- measuring ----------------------------------------------------------------------------

    def planned(self, now: float) -> None:
        """A request was planned for which a faster link would have been better."""
        self._planned_at = now

    def unsure(self, now: float) -> bool:
        """Whether the link should be measured by itself: it has been used for a decision, nothing
        has been sent for a while, and nothing is under way."""
        if self._open or self._planned_at <= self._known_at:
            return False
        least, most = _MEASURE_SECONDS
        pause = min(max(least, _MEASURE_SHARE * (now - self._since)), most)
        return now - self._known_at > pause
