"""What a receiver may say of one session, what not, and for how long it may say nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlx_receiver.wire.layout import Held, full_attention
from mlx_receiver.wire.messages import Complete, Decoded, Logprobs, Opened, Progress, Refused
from mlx_receiver.wire.sampling import Sampling as S
from vllm_mac_decode.scheduler.promise import BrokenPromise, Promise

PROMPT, CONTEXT = 10, 20
#: 640 bytes a token.
LAYOUT = full_attention(5, 4, 8, "bfloat16")
BYTES = LAYOUT.nbytes(PROMPT)
FIRST = [3]


def promised(sampling: S | None = None, *, started: bool = True, complete: bool = True) -> Promise:
    promise = Promise(sampling or S(max_tokens=8), PROMPT, LAYOUT, CONTEXT)
    promise.opened(Opened(1))
    if complete:
        promise.completed(Complete(1, BYTES), 0.0)
    if started:
        promise.start(0.0)
    return promise


def rows(*tokens: int, count: int = 2) -> list[Logprobs]:
    return [Logprobs([token, *range(count)], [-1.0] * (count + 1), 1) for token in tokens]


RIGHT: list[tuple[S, list[int], Decoded]] = [
    (S(max_tokens=8), FIRST, Decoded(1, 1, [4])),
    (S(max_tokens=8), FIRST, Decoded(1, 1, [4, 5, 6])),
    (S(max_tokens=8), [3, 4, 5], Decoded(1, 3, [6, 7])),
    (S(max_tokens=3), FIRST, Decoded(1, 1, [4, 5], "length")),
    (S(max_tokens=8, eos_token_id=9), FIRST, Decoded(1, 1, [4, 9], "stop")),
    (S(max_tokens=2, eos_token_id=9), FIRST, Decoded(1, 1, [9], "stop")),
    (S(max_tokens=8, stop_token_ids=[9]), FIRST, Decoded(1, 1, [9], "stop", 9)),
    (S(max_tokens=8, stop_token_ids=[9], min_tokens=1), FIRST, Decoded(1, 1, [9], "stop", 9)),
    (S(max_tokens=8, logprobs=2), FIRST, Decoded(1, 1, [4, 5], logprobs=rows(4, 5))),
    (S(max_tokens=8, logprobs=0), FIRST, Decoded(1, 1, [4], logprobs=rows(4, count=0))),
    (S(max_tokens=8, eos_token_id=3), FIRST, Decoded(1, 1, [], "stop")),
    (S(max_tokens=8, eos_token_id=3, logprobs=2), FIRST, Decoded(1, 1, [], "stop")),
]

EOS = S(max_tokens=8, eos_token_id=9, stop_token_ids=[8])
WRONG: list[tuple[S, list[int], Decoded, str]] = [
    (EOS, FIRST, Decoded(1, 0, [4]), "begin at 0; 1 are there"),
    (EOS, FIRST, Decoded(1, 2, [4]), "begin at 2"),
    (EOS, FIRST, Decoded(1, 1, []), "without a token"),
    (EOS, [3, 9], Decoded(1, 2, [], "stop"), "without a token"),
    (EOS, FIRST, Decoded(1, 1, [4] * 8, "length"), "went on after token 8"),
    (EOS, FIRST, Decoded(1, 1, [4] * 7), "after token 8 it says ''"),
    (EOS, FIRST, Decoded(1, 1, [4, 9, 5]), "went on after token 3"),
    (EOS, FIRST, Decoded(1, 1, [4, 8, 5], "stop", 8), "went on after token 3"),
    (EOS, FIRST, Decoded(1, 1, [9]), "after token 2 it says ''"),
    (EOS, FIRST, Decoded(1, 1, [9], "length"), "it says 'length'"),
    (EOS, FIRST, Decoded(1, 1, [9], "stop", 9), r"\(9\), where the text is at 'stop' \(None\)"),
    (EOS, FIRST, Decoded(1, 1, [8], "stop"), r"where the text is at 'stop' \(8\)"),
    (EOS, FIRST, Decoded(1, 1, [4], "stop"), "where the text is at ''"),
    (EOS, FIRST, Decoded(1, 1, [4], "length"), "where the text is at ''"),
    (EOS, FIRST, Decoded(1, 1, [4], "", 4), "where the text is at ''"),
    (S(max_tokens=8, eos_token_id=9, min_tokens=3), FIRST, Decoded(1, 1, [4, 9], "stop"),
     "token 3 ends the text, which has 3 at least"),
    (S(max_tokens=8, stop_token_ids=[9], min_tokens=2), FIRST, Decoded(1, 1, [9], "stop", 9),
     "token 2 ends the text"),
    (S(max_tokens=8, eos_token_id=3), FIRST, Decoded(1, 1, [4]), "went on after token 1"),
    (S(max_tokens=8), FIRST, Decoded(1, 1, [4], logprobs=rows(4)), "nobody asked for"),
    (S(max_tokens=8), FIRST, Decoded(1, 1, [4], logprobs=[]), "nobody asked for"),
    (S(max_tokens=8, logprobs=2), FIRST, Decoded(1, 1, [4]), "of 0 tokens, not of each"),
    (S(max_tokens=8, logprobs=2), FIRST, Decoded(1, 1, [4, 5], logprobs=rows(4)), "of 1 tokens"),
    (S(max_tokens=8, logprobs=2), FIRST, Decoded(1, 1, [4], logprobs=rows(5)), "another token's"),
    (S(max_tokens=8, logprobs=2), FIRST, Decoded(1, 1, [4], logprobs=rows(4, count=1)), "not 3"),
    (S(max_tokens=8, logprobs=2), FIRST,
     Decoded(1, 1, [4], logprobs=[Logprobs([4, 5, 6], [-1.0], 1)]), "1 log-probabilities of 3"),
]  # fmt: skip


@pytest.mark.parametrize(("sampling", "tokens", "step"), RIGHT)
def test_what_keeps_the_promise(sampling: S, tokens: list[int], step: Decoded) -> None:
    assert not promised(sampling).decoded(step, tokens, 1.0)


@pytest.mark.parametrize(("sampling", "tokens", "step", "complaint"), WRONG)
def test_what_breaks_it(sampling: S, tokens: list[int], step: Decoded, complaint: str) -> None:
    with pytest.raises(BrokenPromise, match=complaint):
        promised(sampling).decoded(step, tokens, 1.0)


def test_a_context_that_is_full_is_not_the_texts_end() -> None:
    step = Decoded(1, 1, list(range(4, 13)), "length")
    assert promised(S(max_tokens=50)).decoded(step, FIRST, 1.0)
    assert not promised(S(max_tokens=10)).decoded(step, FIRST, 1.0)
    full = Promise(S(max_tokens=50), CONTEXT - 1, LAYOUT, CONTEXT)
    full.opened(Opened(1))
    full.completed(Complete(1, LAYOUT.nbytes(CONTEXT - 1)), 0.0)
    full.start(0.0)
    assert full.decoded(Decoded(1, 1, [], "length"), FIRST, 1.0)


@pytest.mark.parametrize("computed", [0, 640, BYTES])
def test_what_was_computed_need_not_come(computed: int) -> None:
    """Both together are all of it, and only a receiver that was asked to computes."""
    for computes in (False, True):
        compute = "front" if computes else "nothing"
        promise = Promise(S(max_tokens=8), PROMPT, LAYOUT, CONTEXT, compute)
        promise.opened(Opened(1, Held(2)))
        with pytest.raises(
            BrokenPromise, match="computed" if not computes else "prompt's has 5120"
        ):
            promise.completed(Complete(1, BYTES - computed, max(1, computed)), 0.0)
        if computes:
            computed = min(computed, 5120)
            promise.completed(Complete(1, 5120 - computed, computed), 0.0)
            assert promise.complete


ORDERS: list[tuple[Callable[[Promise], Any], str]] = [
    (lambda p: p.opened(Opened(1)), "twice"),
    (lambda p: p.refused(Refused(1, "capacity", "")), "had opened"),
    (lambda p: p.completed(Complete(1, BYTES - 1), 0.0), "prompt's has 6400"),
    (lambda p: p.completed(Complete(1, 2**62), 0.0), "prompt's has 6400"),
    (lambda p: p.decoded(Decoded(1, 1, [4]), FIRST, 0.0), "before it could"),
    (lambda p: p.progress(Progress(1, "receiving", BYTES + 1, 0), 0.0), "the prompt's are 6400"),
    (lambda p: p.progress(Progress(1, "decoding", 0, 9), 0.0), "8 are the limit"),
]


@pytest.mark.parametrize(("say", "complaint"), ORDERS)
def test_what_comes_at_the_wrong_time(say: Callable[[Promise], Any], complaint: str) -> None:
    with pytest.raises(BrokenPromise, match=complaint):
        say(promised(complete=False))


def test_what_must_come_first() -> None:
    new = Promise(S(max_tokens=8), PROMPT, LAYOUT, CONTEXT)
    with pytest.raises(BrokenPromise, match="before it was open"):
        new.completed(Complete(1, BYTES), 0.0)
    with pytest.raises(BrokenPromise, match="11 tokens of a prompt of 10"):
        new.opened(Opened(1, Held(11)))
    new.refused(Refused(1, "capacity", ""))
    with pytest.raises(BrokenPromise, match="twice"):
        promised().completed(Complete(1, BYTES), 0.0)
    with pytest.raises(BrokenPromise, match="before it could"):
        promised(started=False).decoded(Decoded(1, 1, [4]), FIRST, 0.0)


@pytest.mark.parametrize(("kv_bytes", "tokens"), [(BYTES - 1, 3), (BYTES, 2)])
def test_progress_never_goes_back(kv_bytes: int, tokens: int) -> None:
    promise = promised()
    promise.progress(Progress(1, "decoding", BYTES, 3), 1.0)
    with pytest.raises(BrokenPromise):
        promise.progress(Progress(1, "decoding", kv_bytes, tokens), 2.0)


# --- the clock --------------------------------------------------------------------------------


def late(promise: Promise, now: float) -> str:
    return promise.overdue(now, 2.0, 30.0)


def test_nobody_waits_before_the_first_token() -> None:
    assert late(promised(started=False), 1e6) == ""


def test_tokens_and_nothing_else_keep_a_response_waiting() -> None:
    promise = promised()
    for second in range(1, 6):
        promise.decoded(Decoded(1, second, [4]), [3] * second, float(second))
        assert late(promise, second + 1.9) == ""
    promise.progress(Progress(1, "decoding", BYTES, 6), 6.9)
    promise.progress(Progress(1, "decoding", BYTES, 7), 7.0)
    assert late(promise, 7.1) == "stalled"


def test_kv_that_grows_keeps_it_waiting_until_it_is_there() -> None:
    promise = promised(complete=False)
    for second in range(1, 11):
        promise.progress(Progress(1, "receiving", second * BYTES // 10, 0), float(second))
        assert late(promise, second + 1.9) == ""
    promise.progress(Progress(1, "receiving", BYTES, 0), 12.0)
    assert late(promise, 12.1) == "stalled"


def test_kv_that_creeps_does_not() -> None:
    promise = promised(complete=False)
    for second in range(200):
        promise.progress(Progress(1, "receiving", second, 0), float(second))
        if late(promise, second + 1.0):
            break
    assert late(promise, second + 1.0) == "stalled"
    # Nor does growth that is as slow as it may be: a bounded number of times.
    promise, now = promised(complete=False), 0.0
    for kv_bytes in range(0, BYTES + 1, 100):
        promise.progress(Progress(1, "receiving", kv_bytes, 0), now := now + 1.9)
        assert late(promise, now) == ""
    assert late(promise, now + 2.1) == "stalled" and now < 64 * 2.0 + 5


def test_queued_is_not_stalled_but_ends() -> None:
    promise = promised()
    for quarter in range(4 * 30):
        promise.progress(Progress(1, "queued", BYTES, 0), quarter / 4)
        assert late(promise, quarter / 4) == ""
    assert late(promise, 30.1) == "queued"
    promise.progress(Progress(1, "decoding", BYTES, 0), 30.2)
    assert late(promise, 30.3) == ""
    assert late(promise, 32.3) == "stalled"
    promise.decoded(Decoded(1, 1, [4]), FIRST, 33.0)
    for second in range(34, 60):  # the wait is another one, since a token came
        promise.progress(Progress(1, "queued", BYTES, 1), float(second))
    assert late(promise, 60.0) == ""


def test_queueing_off_and_on_gains_nothing() -> None:
    promise = promised()
    for second in range(100):
        state: Any = "queued" if second % 2 else "decoding"
        promise.progress(Progress(1, state, BYTES, 0), float(second))
        if why := late(promise, second + 0.5):
            break
    assert (why, second) == ("stalled", 3)


def test_nor_does_it_where_both_are_said_at_once() -> None:
    promise = promised()
    for second in range(100):
        promise.progress(Progress(1, "queued", BYTES, 0), float(second))
        promise.progress(Progress(1, "decoding", BYTES, 0), float(second))
        if why := late(promise, second + 0.5):
            break
    assert (why, second) == ("stalled", 2)


def test_an_incomplete_cache_is_not_queued() -> None:
    promise = promised(complete=False)
    promise.progress(Progress(1, "queued", 0, 0), 5.0)
    assert late(promise, 5.1) == "stalled"


# --- a prompt that the receiver computes ------------------------------------------------------


def computing(opened: bool = True, prompt: int = PROMPT) -> Promise:
    promise = Promise(S(max_tokens=8), prompt, LAYOUT, CONTEXT, "all")
    promise.start(0.0)
    if opened:
        promise.opened(Opened(1))
    return promise


def test_its_first_token_is_the_receivers() -> None:
    promise = computing()
    with pytest.raises(BrokenPromise, match="before it could"):
        promise.decoded(Decoded(1, 0, [4]), [], 1.0)
    promise.completed(Complete(1, 0, computed=PROMPT - 1), 1.0)
    assert promise.computed == PROMPT - 1
    with pytest.raises(BrokenPromise, match="begin at 1; 0"):
        promise.decoded(Decoded(1, 1, [4]), [], 1.0)
    promise.decoded(Decoded(1, 0, [4]), [], 1.0)
    promise.decoded(Decoded(1, 1, [5]), [4], 1.0)


def test_its_first_token_may_end_the_text_but_not_before_its_least_length() -> None:
    for least, message in ((0, None), (1, "token 1 ends the text")):
        promise = Promise(S(max_tokens=8, min_tokens=least, eos_token_id=4), 3, LAYOUT, 60, "all")
        promise.start(0.0)
        promise.opened(Opened(1))
        promise.completed(Complete(1, 0, computed=3), 1.0)
        if message is None:
            promise.decoded(Decoded(1, 0, [4], "stop"), [], 1.0)
            continue
        with pytest.raises(BrokenPromise, match=message):
            promise.decoded(Decoded(1, 0, [4], "stop"), [], 1.0)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Complete(1, 1, computed=PROMPT), "1 bytes"),
        (Complete(1, 0, computed=PROMPT + 1), f"{PROMPT + 1} tokens"),
        (Complete(1, 0, computed=1), "1 tokens after 2"),
        (Complete(1, 0), "0 tokens after 2"),
    ],
)
def test_what_it_computed_is_within_the_prompt(message: Complete, text: str) -> None:
    promise = computing()
    promise.progress(Progress(1, "decoding", 0, 0, 2), 1.0)
    with pytest.raises(BrokenPromise, match=text):
        promise.completed(message, 1.0)


def test_no_kv_comes_for_it() -> None:
    with pytest.raises(BrokenPromise, match="holds part"):
        computing(opened=False).opened(Opened(1, Held(2)))
    with pytest.raises(BrokenPromise, match="before it was open"):
        computing(opened=False).completed(Complete(1, 0, computed=PROMPT), 1.0)
    with pytest.raises(BrokenPromise, match="bytes of KV"):
        computing().progress(Progress(1, "decoding", 1, 0), 1.0)


def test_what_it_says_of_computing_never_goes_back() -> None:
    promise = computing()
    promise.progress(Progress(1, "decoding", 0, 0, 2), 1.0)
    for computed in (1, PROMPT + 1):
        with pytest.raises(BrokenPromise, match="computed tokens"):
            promise.progress(Progress(1, "decoding", 0, 0, computed), 1.0)


def test_its_clock_runs_from_the_request_on() -> None:
    assert late(computing(opened=False), 1.9) == ""
    assert late(computing(opened=False), 2.1) == "stalled"


def test_computing_keeps_it_waiting_queueing_too_and_nothing_else() -> None:
    promise = computing(prompt=10_000)
    now = 0.0
    for _ in range(4):
        promise.progress(Progress(1, "queued", 0, 0), now := now + 1.9)
        assert late(promise, now) == ""
    for computed in range(100, 1000, 100):
        promise.progress(Progress(1, "decoding", 0, 0, computed), now := now + 1.9)
        assert late(promise, now) == ""
    promise.progress(Progress(1, "decoding", 0, 0, 900), now + 1.0)
    assert late(promise, now + 2.1) == "stalled"


def test_computing_that_creeps_does_not() -> None:
    promise = computing(prompt=10_000)
    for second in range(200):
        promise.progress(Progress(1, "decoding", 0, 0, second), float(second))
        if late(promise, second + 1.0):
            break
    assert late(promise, second + 1.0) == "stalled" and second < 10
