"""A second connection is made by itself, exactly where the first one holds the export up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import Header
from tests.vllm_mac_decode.ranks import Request, Store, workers
from tests.waiting import eventually
from vllm_mac_decode.worker import bottleneck
from vllm_mac_decode.worker.bottleneck import FAST, WINDOW_BYTES, Bottleneck

SHAPE = {"layers": range(8), "blocks": 64, "dim": 64}


def test_a_busy_connection_as_fast_as_one_gets_is_a_bottleneck() -> None:
    judged = Bottleneck()
    piece = WINDOW_BYTES // 4
    assert [judged.sent(piece, piece / (2 * FAST), True) for _ in range(4)] == [False] * 3 + [True]


def test_a_slow_link_is_none() -> None:
    judged = Bottleneck()
    assert not any(judged.sent(8 << 20, (8 << 20) / 1.25e9, True) for _ in range(1000))


def test_a_connection_that_keeps_up_is_none() -> None:
    judged = Bottleneck()
    piece = WINDOW_BYTES // 4
    assert not any(judged.sent(piece, piece / (2 * FAST), n % 4 != 3) for n in range(1000))


class Watched(Store):
    """A store that notes which threads its blocks come from."""

    def __init__(self) -> None:
        self.threads: set[threading.Thread] = set()
        super().__init__(layers=8, dim=64)

    def landing(self, client: str, header: Header) -> Landing:
        self.threads.add(threading.current_thread())
        return SessionStore.landing(self, client, header)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """A store; a worker soon judges its first connection to it."""
    monkeypatch.setattr(bottleneck, "WINDOW_BYTES", 1 << 20)
    made = Watched()
    yield made
    made.stop()


def _export(store: Watched, prompts: int) -> None:
    """Some prompts one after the other, through one worker that chooses for itself; none any more
    once blocks have come on two connections."""
    with workers(SHAPE) as (worker,):
        for _ in range(prompts):
            if len(store.threads) > 1:
                return
            request = Request(1024, list(range(64)), layers=8, dim=64)
            session = store.add(request)
            worker.step([(request, 0, 1024)], store.target)
            assert eventually(lambda session=session: session.complete, 20), store.failures
            request.check(session)


def test_the_second_connection_carries_blocks(
    store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bottleneck, "FAST", 0.0)
    _export(store, 60)  # on a busy machine a backlog comes late
    assert len(store.threads) == 2, "no block came on a second connection"


def test_one_connection_stays_alone_on_a_slow_link(
    store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bottleneck, "FAST", 1e12)
    _export(store, 5)
    assert len(store.threads) == 1
