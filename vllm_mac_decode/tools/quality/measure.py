"""Which positions of which texts are asked for, in which order, and for how long."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from vllm_mac_decode import __version__
from vllm_mac_decode.tools.bench import record
from vllm_mac_decode.tools.bench.servers import Server
from vllm_mac_decode.tools.check.finding import Finding
from vllm_mac_decode.tools.quality.engines import (
    Continued,
    Engines,
    NotHandedOff,
    QualityError,
)
from vllm_mac_decode.tools.quality.figures import Figures, Row, Spot, figures, verdict
from vllm_mac_decode.tools.quality.texts import SHIPPED

#: Tokens of a passage at most; passages of a text; tokens before the first position.
PASSAGE_TOKENS: Final = 192
PASSAGES: Final = 8
_BEFORE: Final = 12
#: Characters of a token, seldom more.
_CHARACTERS: Final = 6

#: Positions of all texts together, and fewer than which say nothing.
POSITIONS: Final = 120
_FEWEST: Final = 8

#: Handed-off responses, and the tokens of each that are the Mac's.
RESPONSES: Final = 5
RESPONSE_TOKENS: Final = 8

#: Requests at once: two engines, each with one to do while the other has.
_AT_ONCE: Final = 4
#: How often a hand-off that broke, or was not made, is tried.
_ATTEMPTS: Final = 3


@dataclass(frozen=True)
class Options:
    """What the command line says. ``seconds`` bounds the measuring, not what comes before."""

    vllm: str
    receiver_http: str
    vllm_api_key: str = ""
    receiver_api_key: str = ""
    texts: dict[str, str] = field(default_factory=lambda: dict(SHIPPED))
    positions: int = POSITIONS
    responses: int = RESPONSES
    seconds: float = 300.0


class Quality(msgspec.Struct, kw_only=True):
    """What ``check --quality --json`` prints. Holds no addresses, keys or texts."""

    version: str = __version__
    #: What vLLM and the receiver loaded, and how the latter computes.
    model: str
    receiver_model: str
    receiver_dtype: str
    #: Tokens of each text that positions were taken from.
    texts: dict[str, int]
    #: False: time was up before all positions.
    whole: bool
    seconds: float
    #: Along the texts, and along what the hand-off itself answers; None where it answered nothing.
    text: Figures
    responses: Figures | None
    finding: Finding


@dataclass(frozen=True)
class _Passage:
    """Consecutive tokens of a text, and what vLLM alone says at each place."""

    name: str
    tokens: list[int]
    rows: list[Row]


#: Called with what is being done, and how much of the whole has been, from 0 to 1.
Show = Callable[[str, float], None]


def measure(options: Options, show: Show) -> Quality:
    """Everything. Raises BenchError."""
    engines = Engines(
        Server(options.vllm, "--vllm", options.vllm_api_key),
        Server(options.receiver_http, "--receiver-http", options.receiver_api_key),
    )
    show("looking at the two engines", 0.0)
    engines.look()
    began = time.monotonic()
    show("reading the texts", 0.0)
    passages = list(_passages(engines, options))
    spots = [(p, at) for p in passages for at in _places(p.tokens)]
    if len(spots) < _FEWEST:
        raise QualityError(
            f"the texts have {len(spots)} positions that can be asked for, at least {_FEWEST} are "
            "needed: give a longer one"
        )
    # Any beginning of them is a fair sample: the time may not do for all.
    source = random.Random(1)
    spots = source.sample(spots, min(options.positions, len(spots)))
    answers = source.sample(passages, min(options.responses, len(passages)))
    passage, at = spots[0]
    show("waiting for a hand-off", 0.0)
    engines.wait_ready(passage.tokens[: at + 1])
    work = _Work(engines, time.monotonic() + options.seconds, len(spots) + len(answers), show)
    work.run(answers, spots)
    engines.check_alone()
    if len(work.text) < _FEWEST:
        raise QualityError(
            f"{len(work.text)} positions were measured in {options.seconds:.0f} s, at least "
            f"{_FEWEST} are needed: give --quality-seconds more"
        )
    health = engines.receiver.document("/health")
    found = figures(work.text, with_perplexity=True)
    lengths: dict[str, int] = {}
    for passage in passages:
        lengths[passage.name] = lengths.get(passage.name, 0) + len(passage.tokens)
    return Quality(
        model=record.public_model(engines.vllm.root),
        receiver_model=record.public_model(engines.receiver.root),
        receiver_dtype=str(health.get("dtype") or ""),
        texts=lengths,
        whole=work.whole,
        seconds=round(time.monotonic() - began, 1),
        text=found,
        responses=figures(work.responses, with_perplexity=False) if work.responses else None,
        finding=verdict(found),
    )


def _passages(engines: Engines, options: Options) -> Iterator[_Passage]:
    """Of a long text some, spread over it."""
    longest = engines.longest(PASSAGE_TOKENS)
    for name, text in options.texts.items():
        # By characters, so that each passage begins as the tokenizer begins a text.
        starts = range(0, len(text), _CHARACTERS * longest)
        for number in range(min(len(starts), PASSAGES)):
            start = starts[number * len(starts) // min(len(starts), PASSAGES)]
            tokens = engines.read(text[start : start + starts.step])[:longest]
            if len(tokens) > _BEFORE:
                yield _Passage(name, tokens, engines.vllm_alone(tokens))


def _places(tokens: list[int]) -> list[int]:
    """Positions that can be forced: a token that differs from the one before it."""
    return [at for at in range(_BEFORE, len(tokens)) if tokens[at] != tokens[at - 1]]


class _Work:
    """Positions and responses, several at once, until all are done or time is up."""

    def __init__(self, engines: Engines, until: float, total: int, show: Show) -> None:
        self._engines = engines
        self._until = until
        self._total = total
        self._show = show
        self._lock = threading.Lock()
        self._done = 0
        self._failed = False
        self.whole = True
        self.text: list[Spot] = []
        self.responses: list[Spot] = []

    def run(self, answers: list[_Passage], spots: list[tuple[_Passage, int]]) -> None:
        """Raises what the first that fails raises, once the others under way have ended."""
        with ThreadPoolExecutor(_AT_ONCE, "quality") as pool:
            # Responses take longest: between the positions, not all at the end.
            every = max(1, len(spots) // (len(answers) + 1))
            jobs: list[Any] = []
            waiting = list(answers)
            for number, (passage, at) in enumerate(spots):
                if waiting and number % every == 0:
                    jobs.append(pool.submit(self._guarded, self._respond, waiting.pop()))
                jobs.append(pool.submit(self._guarded, self._look, passage, at))
            jobs += [pool.submit(self._guarded, self._respond, passage) for passage in waiting]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                self._failed = True  # what waits is not begun: the pool is left without delay
                raise

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        if time.monotonic() > self._until:
            self.whole = False
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            raise
        with self._lock:
            self._done += 1
            self._show(f"{self._done} of {self._total}", self._done / self._total)

    def _look(self, passage: _Passage, at: int) -> None:
        tokens = passage.tokens[: at + 1]
        handoff = _tried(lambda: self._engines.handed_off(tokens))
        mac = self._engines.mac_alone(tokens)
        spot = Spot(tokens[-1], handoff, passage.rows[at], mac)
        with self._lock:
            self.text.append(spot)

    def _respond(self, passage: _Passage) -> None:
        """Continue the first half, and ask both engines about what came."""
        prompt = passage.tokens[: max(_BEFORE, len(passage.tokens) // 2)]
        answer: Continued = _tried(lambda: self._engines.response(prompt, 1 + RESPONSE_TOKENS))
        tokens = [*prompt, *answer.tokens]
        vllm = self._engines.vllm_alone(tokens)
        spots = []
        # The first token is vLLM's own.
        for at, row in enumerate(answer.rows[1:], len(prompt) + 1):
            mac = self._engines.mac_alone(tokens[: at + 1])
            spots.append(Spot(tokens[at], row, vllm[at], mac))
        with self._lock:
            self.responses += spots


def _tried(handoff: Callable[[], Any]) -> Any:
    """A hand-off, again if it breaks: that is no matter of quality. Raises BenchError."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return handoff()
        except NotHandedOff:
            time.sleep(0.5)
    return handoff()
