"""The circuit breaker opens after failures in a short time, longer each time, and recovers."""

from __future__ import annotations

from vllm_mac_decode.scheduler.breaker import CircuitBreaker


def test_three_failures_in_the_window_open_it_and_pauses_double() -> None:
    breaker = CircuitBreaker()
    assert [breaker.failed(t) for t in (0.0, 1.0)] == [0.0, 0.0]
    assert not breaker.is_open(1.5)
    assert breaker.failed(2.0) == 2.0
    assert breaker.is_open(3.9) and not breaker.is_open(4.0)
    assert [breaker.failed(t) for t in (5.0, 6.0, 7.0)] == [0.0, 0.0, 4.0]
    breaker.succeeded()
    assert [breaker.failed(t) for t in (20.0, 21.0, 22.0)] == [0.0, 0.0, 2.0]


def test_failures_far_apart_do_not_open_it() -> None:
    breaker = CircuitBreaker()
    assert not any(breaker.failed(40.0 * i) for i in range(10))


def test_the_pause_is_bounded() -> None:
    breaker = CircuitBreaker()
    pauses = [breaker.failed(t) for t in (1e3 * i + j for i in range(10) for j in range(3))]
    assert max(pauses) == 60.0
