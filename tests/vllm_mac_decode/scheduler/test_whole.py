"""Requests that a receiver does all of, without vLLM: what its scheduler gets of them, and when."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire import messages as m
from tests.vllm_mac_decode.engine import PROMPT, Engine, Link
from tests.vllm_mac_decode.plain import Outputs, Params, Request, Stats
from tests.vllm_mac_decode.scheduler.test_structured_output import Structured
from vllm_mac_decode.scheduler.handoff import Phase


def engine(**settings: Any) -> Engine:
    return Engine(**({"offload": "mac"} | settings))


def given(made: Engine, name: str = "a", **params: Any) -> int:
    """A request that the receiver has; returns its session's number."""
    made.add(name, **params)
    assert name in made.taken
    opened = made.link.said[-1]
    assert isinstance(opened, m.Open) and opened.compute == "all"
    return opened.session


def begun(made: Engine, held: int = 0) -> int:
    """One whose prompt the receiver has computed."""
    number = given(made)
    made.say(m.Opened(number), m.Complete(number, 0, computed=len(PROMPT) - held))
    return number


def phase(made: Engine, name: str = "a") -> Phase:
    return made.relay._by_request[name].phase


# --- who gets it --------------------------------------------------------------------------------


def test_vllms_scheduler_is_not_given_it() -> None:
    made = engine()
    request = made.add(max_tokens=8)
    assert made.taken == {"a"} and request.max_tokens == 8
    (opened,) = made.link.said
    assert isinstance(opened, m.Open)
    assert (opened.compute, opened.prompt_token_ids) == ("all", PROMPT)
    assert opened.sampling.max_tokens == 8
    assert made.relay._by_request["a"].strategy is Strategy.MAC
    assert phase(made) is Phase.DECODING and made.relay.busy()


def test_never_means_never() -> None:
    made = engine(offload="never")
    made.add()
    made.add("routed", 1, kv_transfer_params={"do_remote_decode": True})
    assert not made.taken and not made.link.said and not made.relay._sessions
    assert made.counts().local == {"offload_never": 2}


def test_always_hands_off_after_vllms_prefill() -> None:
    made = Engine()
    assert made.add().max_tokens == 1 and not made.taken
    assert made.relay._by_request["a"].strategy is Strategy.SPLIT


@pytest.mark.parametrize(
    "params",
    [{"prompt_logprobs": 0}, {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}],
)
def test_what_vllm_tells_of_the_prompt_is_handed_off_afterwards(params: Any) -> None:
    made = engine()
    made.add(**params)
    assert not made.taken and phase(made) is Phase.DECIDED
    made.schedule()
    (opened,) = made.link.said
    assert isinstance(opened, m.Open) and opened.compute == "nothing"


@pytest.mark.parametrize("params", [{"max_tokens": 1}, {"extra_args": {"x": 1}}])
def test_what_the_receiver_may_not_decode_stays_local(params: Any) -> None:
    made = engine()
    made.add(**params)
    assert not made.taken and not made.relay._by_request


def test_a_paused_vllm_holds_requests_back() -> None:
    made = engine()
    made.port.draining = True
    made.add()
    assert not made.taken and phase(made) is Phase.DECIDED and not made.link.said


def test_a_receiver_that_cannot_be_told_is_given_nothing() -> None:
    made = engine()
    made.link.up = False
    assert made.add().max_tokens == 1
    assert not made.taken and phase(made) is Phase.DECIDED
    assert made.relay._by_request["a"].strategy is Strategy.SPLIT


def test_conversations_go_where_they_were() -> None:
    made = engine()
    link = Link()
    other = made.join(link)
    made.connect(remote=other, name="s")
    made.add("a", block_hashes=[b"1"])
    first = made.relay._by_request["a"].receiver
    made.add("b", block_hashes=[b"1", b"2"])
    assert made.relay._by_request["b"].receiver is first


# --- how it goes --------------------------------------------------------------------------------


def test_every_token_is_the_receivers() -> None:
    made = engine()
    number = begun(made, held=1)
    made.decode(number, 0, 11)
    made.decode(number, 1, 12, 13)
    for position, token in enumerate([14, 15, 16, 17], start=3):
        made.decode(number, position, token)
    made.decode(number, 7, 18, finish="length")
    assert made.tokens() == [11, 12, 13, 14, 15, 16, 17, 18]
    assert made.port.out[-1] == ("a", [18], "length")
    assert not made.port.resumed and not made.port.requeued and not made.relay._by_request
    counts = made.counts()
    assert counts.events == {
        "held_tokens": 1, "computed_tokens": 2, "kv_bytes": 0, "tokens": 8, "completed": 1,
    }  # fmt: skip
    assert not counts.handoff_gaps and not counts.fallbacks


def test_its_prompt_is_counted_with_the_first_token_once() -> None:
    made = engine()
    before = time.monotonic()
    number = given(made)
    made.say(m.Opened(number))
    made.say(m.Status(0, 0, True, 0, [m.Progress(number, "queued", 0, 0)]))
    waited = time.monotonic()
    made.say(m.Status(0, 0, True, 0, [m.Progress(number, "decoding", 0, 0, 1)]))
    made.say(m.Complete(number, 0, computed=2))
    assert not made.port.prompts
    made.decode(number, 0, 11)
    made.decode(number, 1, 12)
    cached, arrived, started = made.port.prompts["a"]
    assert cached == 1 and before <= arrived < started <= waited


def test_it_counts_as_running() -> None:
    made = engine()
    given(made)
    assert made.relay.has_news(), "an idle vLLM makes a step, in which it is counted"
    made.relay.take_ended()
    assert not made.relay.has_news()
    outputs = Outputs([], Stats(num_running_reqs=2))
    made.relay.rewrite({0: outputs})  # type: ignore[dict-item]
    assert outputs.scheduler_stats == Stats(num_running_reqs=3)


def test_no_shadow_follows_what_vllm_never_had() -> None:
    made = engine()
    number = begun(made)
    for position in range(7):
        made.decode(number, position, 20 + position)
    made.port.idle = True
    made.relay.rest()
    made.decode(number, 7, 30, finish="length")
    made.relay.rest()
    assert made.port.prefixes is not None and not made.port.prefixes.queued


# --- how it ends early --------------------------------------------------------------------------

Cause = Callable[[Engine, int], Any]

CAUSES: dict[str, Cause] = {
    "refused_capacity": lambda e, n: e.say(m.Refused(n, "capacity", "x")),
    "failed_internal": lambda e, n: e.say(m.Opened(n), m.Failed(n, "internal", "x")),
    "lost": lambda e, n: e.lose(),
    "paused": lambda e, n: e.relay.freeze(),
    "stalled": lambda e, n: e.relay.tick(time.monotonic() + 3),
    "failed_protocol": lambda e, n: e.decode(n, 0, 5),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_before_anything_came_vllm_gets_the_request_as_it_was(cause: str) -> None:
    made = engine()
    number = given(made)
    request = made.requests["a"]
    CAUSES[cause](made, number)
    assert made.port.requeued == [request] and not made.port.resumed and not made.port.out
    assert phase(made) is Phase.CONTINUING and made.relay.busy()
    assert made.counts().fallbacks == {cause: 1}
    assert not made.link.doubts, "no block was on its way"
    # It comes back on vLLM's own way in, and is vLLM's alone from there on.
    assert made.relay.on_new_request(request) is False  # type: ignore[arg-type]
    assert request.max_tokens == 8 and not made.relay._by_request and not made.relay.busy()
    out = made.step(token=7, finished=False)
    assert [o.new_token_ids for o in out.outputs] == [[7]] and not made.port.out
    made.decode(number, 0, 9)  # what comes too late comes to nothing
    assert not made.port.out


@pytest.mark.parametrize("cause", ["failed_internal", "lost", "paused", "stalled"])
def test_in_the_middle_a_continuation_takes_over(cause: str) -> None:
    made = engine()
    number = begun(made)
    made.decode(number, 0, 11, 12)
    made.port.prompts.clear()
    if cause == "failed_internal":
        made.say(m.Failed(number, "internal", "x"))
    else:
        CAUSES[cause](made, number)
    assert made.port.resumed == [("a", "a-local", [11, 12], 8)] and not made.port.requeued
    assert made.counts().fallbacks == {cause: 1}


def test_a_request_that_cannot_go_back_is_aborted() -> None:
    made = engine()
    given(made)
    made.port.broken = True
    made.lose()
    assert made.port.out == [("a", [], "abort")] and not made.relay._by_request


def test_a_stopping_vllm_does_not_take_it_back() -> None:
    made = engine()
    given(made)
    made.lose()
    assert made.relay.rejects("a", draining=True) is False  # it waits for its responses
    assert made.relay.rejects("a", draining=False) is True
    assert made.port.out == [("a", [], "abort")] and not made.relay._by_request


def test_the_end_of_everything() -> None:
    made = engine()
    number = given(made)
    made.relay.abort_all()
    assert made.port.out == [("a", [], "abort")] and not made.relay._by_request
    assert made.link.said[-1] == m.Cancel(number, "the request was aborted")
    assert not made.port.requeued


def test_a_switched_off_connector_gives_everything_back() -> None:
    made = engine()
    given(made)
    made.relay.close()
    assert [one.request_id for one in made.port.requeued] == ["a"]
    assert made.relay.on_new_request(made.requests["a"]) is False  # type: ignore[arg-type]
    made.add("b")
    assert made.taken == {"a"}


def test_its_client_leaves() -> None:
    made = engine()
    number = given(made)
    assert made.relay.abort(["a"]) == ["a"]
    assert made.link.said[-1] == m.Cancel(number, "the request was aborted")
    assert not made.relay._by_request and made.counts().events["aborted"] == 1
    assert made.port.out == [("a", [], "abort")], "its end is counted"


@pytest.mark.parametrize("order", ["abort lose", "lose abort back", "lose back abort"])
def test_its_client_leaves_while_it_falls_back(order: str) -> None:
    """vLLM's scheduler has no request that nobody waits for."""
    made = engine()
    given(made)
    scheduler: set[str] = set()
    for event in order.split():
        match event:
            case "lose":
                made.lose()
            case "abort":
                scheduler -= set(made.relay.abort(["a"]))
            case "back":
                (request,) = made.port.requeued
                if not made.relay.on_new_request(request):  # type: ignore[arg-type]
                    scheduler.add("a")
    assert not scheduler and not made.relay._by_request
    assert bool(made.port.requeued) == ("back" in order)
    # What vLLM's scheduler had, it reports itself.
    assert made.port.out == [("a", [], "abort")] * (order != "lose back abort")


def test_a_continuation_that_nobody_waits_for_does_not_begin() -> None:
    made = engine()
    number = begun(made)
    made.decode(number, 0, 11)
    made.lose()
    assert made.relay.abort(["a"]) == ["a-local"]
    local = Request("a-local", [*PROMPT, 11], Params(7))
    assert made.relay.on_new_request(local) is True  # type: ignore[arg-type]
    assert not made.relay._by_request


# --- grammars -----------------------------------------------------------------------------------


def structured(made: Engine) -> int:
    number = given(made, structured_outputs=Structured(choice=["x"]))
    made.say(m.Opened(number), m.Complete(number, 0, computed=len(PROMPT)))
    return number


def test_vllms_grammar_follows_from_the_first_token_on() -> None:
    made = engine()
    number = structured(made)
    made.decode(number, 0, 11)
    made.decode(number, 1, 12)
    assert made.port.advanced == [11, 12] and made.tokens() == [11, 12]


def test_tokens_wait_until_vllm_has_compiled_its_grammar() -> None:
    made = engine()
    made.port.compiled = False
    number = structured(made)
    made.decode(number, 0, 11)
    made.decode(number, 1, 12)
    made.relay.tick(time.monotonic() + 10)  # nor is it the receiver that stalls
    assert not made.port.out and not made.port.advanced
    made.port.compiled = True
    made.decode(number, 2, 13)
    assert made.port.advanced == [11, 12, 13] and made.tokens() == [11, 12, 13]


def test_what_waits_is_sent_even_if_nothing_follows() -> None:
    made = engine()
    made.port.compiled = False
    number = structured(made)
    made.decode(number, 0, 11)
    made.port.compiled = True
    made.relay.tick(time.monotonic())
    assert made.tokens() == [11]


def test_a_first_token_that_vllms_grammar_does_not_take() -> None:
    made = engine()
    made.port.refuses = (11,)
    number = structured(made)
    made.decode(number, 0, 11)
    assert not made.port.out and not made.port.prompts
    assert [one.request_id for one in made.port.requeued] == ["a"]


def test_what_waits_is_not_kept_without_end() -> None:
    made = engine()
    made.port.compiled = False
    number = structured(made)
    for position in range(300):
        made.decode(number, position, 11)
    assert made.counts().fallbacks == {"grammar": 1}
    assert [one.request_id for one in made.port.requeued] == ["a"] and not made.port.out


@pytest.mark.parametrize("order", list(itertools.permutations(["tokens", "compiled", "lose"])))
def test_a_grammar_a_receiver_and_its_end_in_every_order(order: tuple[str, ...]) -> None:
    made = engine()
    made.port.compiled = False
    number = structured(made)
    for event in order:
        match event:
            case "tokens":
                made.decode(number, 0, 11)
            case "compiled":
                made.port.compiled = True
                made.relay.tick(time.monotonic())
            case "lose":
                made.lose()
    shown = order.index("lose") == 2
    assert made.tokens() == ([11] if shown else [])
    assert bool(made.port.requeued) != shown and bool(made.port.resumed) == shown
