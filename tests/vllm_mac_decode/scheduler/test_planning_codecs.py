"""Plans of requests whose KV travels quantised."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.profile import Coding, Prefill
from tests.vllm_mac_decode.auto import MAC, VLLM, Auto
from tests.vllm_mac_decode.engine import PROMPT, Link
from vllm_mac_decode.scheduler.planning import Case


def test_what_is_quantised_is_planned_with_and_told_of_in_the_bytes_that_travel() -> None:
    engine = Auto(codec="q8")
    engine.relay.layout = full_attention(1, 1, 64, "float32")
    welcome = engine.receiver.welcome
    assert welcome is not None
    engine.receiver.welcome = msgspec.structs.replace(welcome, codecs=["raw", "q8"])
    engine.choose(max_tokens=8)
    engine.schedule()
    (session,) = engine.relay._sessions.values()
    assert session.plan is not None and session.codec == "q8"
    decision = session.plan.decision
    predicted = {prediction.strategy: prediction for prediction in decision.predictions}
    split, meet = predicted[Strategy.SPLIT], predicted[Strategy.MEET]
    assert (split.codec.name, meet.codec.name) == ("q8", "raw")
    assert split.kv_bytes == len(PROMPT) * 2 * (64 + 8)
    assert session.ratio == split.codec.ratio == (64 + 8) / 256
    assert session.promise is not None
    port = engine.relay.engine
    assert port is not None
    case = Case(session.request, engine.receiver, set(), port, engine.relay.layout, [session], 0.0)
    pair = engine.relay._planning._pair(case)
    assert pair is not None
    load = engine.relay._planning._load(case, pair)
    assert load.link_bytes == session.promise.missing * session.ratio > 0


def quantising(offload: str = "always", **settings: Any) -> Auto:
    """Of a cache that can be quantised, with a receiver that knows how."""
    engine = Auto(offload, **{"codec": "auto", **settings})
    engine.relay.layout = full_attention(1, 1, 64, "float32")
    welcome = engine.receiver.welcome
    assert welcome is not None
    engine.receiver.welcome = msgspec.structs.replace(welcome, codecs=["raw", "q8", "q4"])
    return engine


def sent(engine: Auto, name: str = "a", **params: Any) -> m.Open:
    """How a request is handed off."""
    engine.add(name, **params)
    assert engine.schedule(name)
    opened = engine.link.said[-1]
    assert isinstance(opened, m.Open)
    return opened


def test_an_automatic_codec_follows_the_link_whatever_decides_who_does_what() -> None:
    engine = quantising()
    opened = sent(engine)
    assert (opened.codec, opened.plan) == ("raw", "split (setting)"), "a fast one"
    engine.slow()
    opened = sent(engine, "b")
    assert (opened.codec, opened.plan) == ("q8", "split q8 (setting)")
    session = engine.relay._sessions[opened.session]
    assert session.codec == "q8" and session.ratio == (64 + 8) / 256
    engine.link.path = m.DataPath("h", 10**9, 1_000_000)
    engine.relay.look(engine.receiver, 0.0)
    assert sent(engine, "c").codec == "raw"
    engine.slow(500.0)
    planned = quantising("auto")
    planned.slow(1500.0)
    assert sent(planned, max_tokens=60, prompt=list(range(1, 7))).plan.startswith("split q8 (fast")


def stating(vllm: Coding, mac: Coding, link: float, **settings: Any) -> str:
    """The codec of a prompt with much KV, with sides that say so of their speed."""
    engine = quantising(**settings)
    # 210 MB for a token, which vLLM computes in no time.
    engine.relay.layout = full_attention(100, 4096, 64, "float32")
    fast = Prefill(0.0, 1e-6, 0.0, 8192)
    engine.relay.profiling.estimate.measured(
        msgspec.structs.replace(VLLM, prefill=fast, coding=vllm)
    )
    engine.say(m.Status(0, 0, True, 0, [], profile=msgspec.structs.replace(MAC, coding=mac)))
    engine.slow(link)
    return sent(engine, max_tokens=2).codec


@pytest.mark.parametrize("link", [0.3e9, 1e9, 3e9])
def test_it_is_chosen_by_what_both_sides_say_of_their_speed(link: float) -> None:
    slow, fast = Coding(q8=0.5 * link), Coding(q8=3 * link)
    assert stating(fast, fast, link) == "q8"
    assert stating(slow, fast, link) == stating(fast, slow, link) == "raw"
    # What an old one does not say is taken to be as on a core of a server.
    assert stating(Coding(), Coding(), link) == ("q8" if link < 0.6e9 else "raw")


def test_workers_and_connections_count() -> None:
    each = Coding(q8=0.5e9, threads=8)
    one = Coding(q8=0.5e9)
    assert stating(one, each, 1e9) == "raw"
    assert stating(Coding(q8=0.5e9, threads=4), each, 1e9) == "q8"
    assert stating(Coding(q8=2e9), each, 1e9) == "raw"
    assert stating(Coding(q8=2e9), each, 1e9, streams=4) == "q8"
    assert stating(Coding(q8=2e9), one, 1e9, streams=4) == "raw", "it has one core"


@pytest.mark.parametrize("rate", [5e-324, 1e-9, 1.0, 1e18])
def test_absurd_rates_only_make_a_codec_look_good_or_bad(rate: float) -> None:
    absurd = Coding(q8=rate, q4=rate, threads=65536)
    wanted = "q8" if rate > 1e9 else "raw"
    assert stating(Coding(q8=1e10), absurd, 1e9) == wanted
    assert stating(Coding(q8=0.1e9), absurd, 1e9) == "raw", "no more than this side does"


def test_a_routers_prefill_has_an_automatic_codec_too() -> None:
    engine = quantising("auto")
    engine.slow()
    transfer = {"do_remote_decode": True, "do_remote_prefill": False}
    opened = sent(engine, max_tokens=1, kv_transfer_params=transfer)
    assert opened.unclaimed and opened.codec == "q8"


def test_a_receiver_that_does_not_quantise_gets_raw_kv_though_another_was_planned_with() -> None:
    engine = quantising()
    engine.slow()
    engine.add("a")
    other = engine.join(Link())
    engine.connect(remote=other, name="other")
    engine.lose()
    number = engine.schedule("a")
    assert engine.relay._sessions[number].receiver is other
    assert engine.relay._sessions[number].codec == "raw"


def test_a_conversation_that_travelled_quantised_is_no_beginning_for_a_raw_one() -> None:
    engine = quantising()
    engine.slow()
    number = sent(engine, block_hashes=["a"]).session
    engine.relay.abort(["a"])
    homes = engine.relay._planning.homes
    homes._ends["a"].tokens = 3
    request = engine.add("b", prompt=[*PROMPT, 4, 5], block_hashes=["a", "b"])
    assert homes.find(request, engine.receiver) == (3, "q8")  # type: ignore[arg-type]
    engine.link.path = m.DataPath("h", 10**9, 1_000_000)
    engine.relay.look(engine.receiver, 0.0)
    engine.relay.abort(["b"])
    opened = sent(engine, "c", prompt=[*PROMPT, 4, 5], block_hashes=["a", "b"])
    engine.say(m.Opened(opened.session))
    assert opened.codec == "raw" and number != opened.session
    assert engine.receiver.keeps == 1.0, "nothing was expected there"
