"""The cost model: when a request's tokens are there, for each way to share its work.

Everything is arithmetic on two profiles, a link and a request: deciding takes less than a
millisecond, and `mac-decode plan` shows the same numbers that decide. ``docs/planning.md`` has the
formulas.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from mlx_receiver.wire.profile import Profile


class Strategy(enum.StrEnum):
    """Who does what."""

    #: vLLM prefills and decodes.
    VLLM = "vllm"
    #: vLLM prefills and streams its KV, the receiver decodes.
    SPLIT = "split"
    #: The receiver prefills and decodes.
    MAC = "mac"
    #: vLLM prefills and streams its KV from the end, while the receiver computes from the front;
    #: once they meet it decodes.
    MEET = "meet"


@dataclass(frozen=True, slots=True)
class Link:
    """From vLLM's machine to the receiver's: bytes a second, seconds for a word and its answer."""

    rate: float
    round_trip: float = 0.0

    def seconds(self, nbytes: float) -> float:
        """For so many bytes. A link that carries nothing is taken for one of a byte a second: what
        is predicted for it is finite, and never the fastest."""
        return nbytes / max(self.rate, 1.0)


@dataclass(frozen=True, slots=True)
class Work:
    """One request: tokens of its prompt, how many of them each side has a cache of already, and
    the tokens that are expected to follow."""

    prompt: int
    output: int
    cached: int = 0  # by vLLM
    held: int = 0  # by the receiver

    @property
    def decoded(self) -> int:
        """Steps of decoding: the first token comes of the prefill."""
        return max(0, self.output - 1)


@dataclass(frozen=True, slots=True)
class Load:
    """What each side does besides: seconds until it can begin, and texts that it decodes. Those are
    taken to be as long as this one."""

    vllm_seconds: float = 0.0
    vllm_rows: int = 0
    mac_seconds: float = 0.0
    mac_rows: int = 0
    link_bytes: float = 0.0  # of others, that go first


@dataclass(frozen=True, slots=True)
class Codec:
    """How KV travels: bytes for each raw one, bytes of raw KV that each side can encode and decode
    in a second."""

    name: str = "raw"
    ratio: float = 1.0
    encode: float = float("inf")
    decode: float = float("inf")

    def seconds(self, nbytes: float, link: Link) -> float:
        """For so many bytes of raw KV to pass: of the stages, which overlap, the slowest."""
        coding = max(1.0, min(self.encode, self.decode))
        return max(link.seconds(nbytes * self.ratio), nbytes / coding)


RAW: Final = Codec()

#: Bytes of KV that travel for a prompt's tokens ``[start, end)``.
KvBytes = Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time, in seconds from the request's arrival, in one lane of the picture."""

    lane: str  # "vllm", "link" or "mac"
    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """One strategy: seconds from the request's arrival to the first, second and last token.

    ``shown`` is what of the transfer nothing else hides; ``met`` the tokens that the receiver
    computes of a ``MEET``.
    """

    strategy: Strategy
    first_token: float
    second_token: float
    total: float
    codec: Codec = RAW
    kv_bytes: float = 0.0
    shown: float = 0.0
    met: int = 0
    spans: tuple[Span, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two machines with one model, and how they are connected."""

    vllm: Profile
    mac: Profile
    link: Link
    layers: int
    kv_bytes: KvBytes

    def predict(
        self, strategy: Strategy, work: Work, load: Load = Load(), codec: Codec = RAW
    ) -> Prediction:
        """When the request's tokens are there."""
        match strategy:
            case Strategy.VLLM:
                return self._on_vllm(work, load)
            case Strategy.MAC:
                return self._on_mac(work, load)
            case Strategy.SPLIT:
                return self._split(work, load, codec)
            case Strategy.MEET:
                return self._meet(work, load, codec)

    # --- one side -----------------------------------------------------------------------------

    def _on_vllm(self, work: Work, load: Load) -> Prediction:
        began, first = self._prefilled(work, load)
        last = first + self._decoded(self.vllm, work, load.vllm_rows)
        return Prediction(
            Strategy.VLLM,
            first,
            _second(first, first, last, work),
            last,
            spans=(Span("vllm", "prefill", began, first), Span("vllm", "decode", first, last)),
        )

    def _on_mac(self, work: Work, load: Load) -> Prediction:
        back = self.link.round_trip / 2
        began = back + load.mac_seconds
        held = _held(work.held, work.prompt - 1)
        ready = began + self.mac.prefill.seconds(work.prompt - held, held)
        last = ready + self._decoded(self.mac, work, load.mac_rows)
        return Prediction(
            Strategy.MAC,
            ready + back,
            _second(ready, ready, last, work) + back,
            last + back,
            spans=(Span("mac", "prefill", began, ready), Span("mac", "decode", ready, last)),
        )

    # --- both ---------------------------------------------------------------------------------

    def _split(self, work: Work, load: Load, codec: Codec) -> Prediction:
        return self._decoding(
            Strategy.SPLIT,
            work,
            load,
            codec,
            _held(work.held, work.prompt),
            self._stream(work, load, codec),
        )

    def _meet(self, work: Work, load: Load, codec: Codec) -> Prediction:
        stream = self._stream(work, load, codec)
        held = _held(work.held, work.prompt)
        front = self.link.round_trip / 2 + load.mac_seconds

        def computed(token: int) -> float:
            if token == held:
                return 0.0
            return front + self.mac.prefill.seconds(token - held, held)

        # The later they meet, the longer the one takes and the shorter the other.
        low, high = held, work.prompt
        while low < high:
            middle = (low + high) // 2
            if computed(middle) < stream(middle)[1]:
                low = middle + 1
            else:
                high = middle
        met = min(
            (token for token in (low - 1, low) if token >= held),
            key=lambda token: max(computed(token), stream(token)[1]),
        )
        return self._decoding(Strategy.MEET, work, load, codec, met, stream, front, computed(met))

    def _decoding(
        self,
        strategy: Strategy,
        work: Work,
        load: Load,
        codec: Codec,
        token: int,
        stream: Callable[[int], tuple[float, float]],
        front: float = 0.0,
        computed: float = 0.0,
    ) -> Prediction:
        """The KV from ``token`` on travels, and the receiver decodes once the cache is complete.
        The first token is vLLM's, which it has to be told of."""
        back = self.link.round_trip / 2
        began, first = self._prefilled(work, load)
        sending, arrived = stream(token)
        complete = max(computed, arrived)
        start = max(complete, first + back, load.mac_seconds)
        last = start + self._decoded(self.mac, work, load.mac_rows)
        kv = self.kv_bytes(token, work.prompt)
        spans = [Span("vllm", "prefill", began, first)]
        if kv:
            spans.append(Span("link", "KV", sending, arrived))
        if computed:
            spans.append(Span("mac", "prefill", front, computed))
        spans.append(Span("mac", "decode", start, last))
        return Prediction(
            strategy,
            first,
            _second(first, start + back, last + back, work),
            last + back if work.decoded else first,
            codec,
            kv * codec.ratio,
            max(0.0, complete - (first + back)),
            token - _held(work.held, work.prompt),
            tuple(spans),
        )

    def _prefilled(self, work: Work, load: Load) -> tuple[float, float]:
        """When vLLM's prefill begins and ends. Its last token is computed in any case."""
        cached = _held(work.cached, work.prompt - 1)
        seconds = self.vllm.prefill.seconds(work.prompt - cached, cached)
        return load.vllm_seconds, load.vllm_seconds + seconds

    def _stream(self, work: Work, load: Load, codec: Codec) -> Callable[[int], tuple[float, float]]:
        """For a token: when the first of the KV from there on can leave, and when the last of it
        has arrived.

        Each layer's KV leaves once it is computed, so that after the prefill only one layer of the
        last chunk is to come, unless the link is slower than the prefill. What vLLM has cached
        leaves at once, and what others send leaves before.
        """
        began, first = self._prefilled(work, load)
        cached, held = _held(work.cached, work.prompt - 1), _held(work.held, work.prompt)
        prefill, new = self.vllm.prefill, work.prompt - cached
        chunk = min(new, prefill.chunk)
        each = prefill.token + prefill.step / prefill.chunk
        lead = prefill.seconds(chunk, cached) / self.layers if held >= cached else 0.0
        busy = self.link.seconds(load.link_bytes)

        def stream(token: int) -> tuple[float, float]:
            ahead = max(0, token - cached)
            pairs = ahead * cached + ahead * ahead / 2
            seconds = ahead * each + pairs * prefill.pair + lead
            begin = max(min(began + seconds, first), busy)
            kv = self.kv_bytes(token, work.prompt)
            if not kv:
                return first, first
            piece = min(kv, self.kv_bytes(work.prompt - chunk, work.prompt) / self.layers)
            end = max(begin + codec.seconds(kv, self.link), first + codec.seconds(piece, self.link))
            return begin, end + self.link.round_trip / 2

        return stream

    def _decoded(self, side: Profile, work: Work, rows: int) -> float:
        return side.decode.text(work.prompt, work.decoded, rows + 1)


def _held(tokens: int, most: int) -> int:
    """What of a cache counts, of a prompt of which ``most`` tokens can be had of it."""
    return max(0, min(tokens, most))


def _second(first: float, start: float, last: float, work: Work) -> float:
    """When the second token is there; the first one's time where there is no other."""
    return start + (last - start) / work.decoded if work.decoded else first


def fastest(predictions: list[Prediction]) -> Prediction:
    """The one whose last token comes first; of equal ones, the first in the list."""
    return min(predictions, key=lambda prediction: prediction.total)
