"""A request that says itself who does what of it, and what the log says of plans."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from mlx_receiver.planning.cost import Load, Strategy, Work
from mlx_receiver.wire.layout import full_attention
from tests.vllm_mac_decode.auto import Auto
from tests.vllm_mac_decode.engine import Engine
from vllm_mac_decode.scheduler import order
from vllm_mac_decode.scheduler.planner import Planner, Question
from vllm_mac_decode.settings import Settings


def asks(what: Any, **others: Any) -> dict[str, Any]:
    return {"extra_args": {order.ORDER: what} | others}


def test_what_nobody_sets_is_planned() -> None:
    assert Settings().offload == "auto"


@pytest.mark.parametrize(
    ("what", "done"),
    [("always", "split"), ("never", "vllm"), ("mac", "mac"), ("meet", "meet")],
)
@pytest.mark.parametrize("offload", ["auto", "always", "mac", "meet"])
@pytest.mark.parametrize("known", [True, False])
def test_a_request_is_done_as_it_says(what: str, done: str, offload: str, known: bool) -> None:
    engine = Auto(offload, known)
    engine.slow()  # no plan would hand it off
    assert engine.choose(max_tokens=4, **asks(what)) == f"{done}:request"
    assert (engine.schedule() > 0) == (done in ("split", "meet"))
    assert engine.choose("b", **asks("always")) == "split:request", "others' orders are no reason"


def test_it_goes_before_the_threshold() -> None:
    engine = Auto(offload_threshold=5)
    assert engine.choose("a") == "vllm:threshold"
    assert engine.choose("b", **asks("always")) == "split:request"


def test_nothing_goes_before_never() -> None:
    engine = Auto("never")
    assert engine.choose(**asks("always")) == "vllm:setting"
    assert not engine.schedule()


def test_what_stays_by_order_is_told_from_a_plan() -> None:
    engine = Auto()
    engine.add(**asks("never"))
    assert engine.counts().local == {"offload_never": 1}


def test_a_routers_prefill_is_handed_off_whatever_is_set() -> None:
    for offload in ("auto", "always", "mac", "meet"):
        for extra in ({}, asks("never"), asks("sometimes"), asks(["always"])):
            engine = Auto(offload, offload_threshold=5)
            engine.slow()
            engine.add(max_tokens=1, kv_transfer_params={"do_remote_decode": True}, **extra)
            assert engine.schedule(), (offload, extra)


@pytest.mark.parametrize(
    "extra", [asks("sometimes"), asks(1), asks(["always"]), asks("always", mine=1), asks(None)]
)
def test_what_is_no_order_stays_and_is_explained_once(
    extra: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    order._explain.cache_clear()
    caplog.set_level(logging.WARNING)
    engine = Engine()
    for name in "abc":
        engine.add(name, **extra)
        assert not engine.schedule(name)
    assert engine.counts().local == {"extra_args": 3}
    said = [record.getMessage() for record in caplog.records]
    if "mine" in extra["extra_args"]:
        assert not said
    else:
        (line,) = said
        assert "mac_decode_offload that is not one of always, never, mac, meet" in line


def test_what_cannot_be_done_is_handed_off() -> None:
    only = {Strategy.VLLM, Strategy.SPLIT}
    asked = Question(Work(9, 9), Load(), None, only, ordered=Strategy.MEET)
    decision = Planner("auto").decide(asked, 0.0)
    assert (decision.strategy, decision.reason) == (Strategy.SPLIT, "only")


@pytest.mark.parametrize("ordered", ["always", "meet"])
def test_kv_travels_as_it_would_anyway(ordered: str) -> None:
    engine = Auto(codec="q8")
    engine.relay.layout = full_attention(1, 1, 64, "float32")
    welcome = engine.receiver.welcome
    assert welcome is not None
    engine.receiver.welcome = msgspec.structs.replace(welcome, codecs=["raw", "q8"])
    engine.add(**asks(ordered))
    engine.schedule()
    (session,) = engine.relay._sessions.values()
    assert session.codec == ("q8" if ordered == "always" else "raw")


# --- the log ------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "offload=" in r.getMessage()]


def test_the_log_says_once_that_requests_are_planned_and_once_that_some_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    engine = Auto()
    for name in "abc":
        engine.add(name)
    (planned,) = lines(caplog)
    assert "both sides' profiles are known" in planned
    assert "one of 3 tokens (some 8 out) by split (fastest: vllm " in planned
    engine.slow(1.0)
    for name in "def":
        engine.add(name, max_tokens=4)
    _, stays = lines(caplog)
    assert "for a request of 3 tokens (some 4 out) vLLM alone is predicted to be the fas" in stays
    assert "vllm (fastest: vllm " in stays and "offload=always hands all requests off" in stays


def test_where_all_stay_one_line_says_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = Auto()
    engine.slow(1.0)
    for name in "abc":
        engine.add(name, max_tokens=4)
    (line,) = lines(caplog)
    assert "it decodes locally" in line


@pytest.mark.parametrize("offload", ["auto", "always", "never"])
def test_where_nothing_is_predicted_nothing_is_said(
    offload: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = Auto(offload, known=offload != "auto")
    engine.add("a")
    engine.add("b", **asks("always"))
    assert not lines(caplog)
