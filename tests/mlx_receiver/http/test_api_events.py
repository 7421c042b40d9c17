"""What the decoding thread says, as a coroutine hears it."""

from __future__ import annotations

import asyncio

import pytest

from mlx_receiver.http.openai.decoding import Events
from mlx_receiver.wire.messages import Decoded, WireError


def test_a_cancellation_beside_an_event_is_not_lost() -> None:
    async def cancelled_after(turns: int) -> str:
        events = Events()
        waiting = asyncio.create_task(events.get(5.0))
        await asyncio.sleep(0.01)
        events.put(Decoded(0, 1, [7]))
        for _ in range(turns):  # of the event loop
            await asyncio.sleep(0)
        if not waiting.cancel():
            return "too late"
        try:
            await waiting
        except asyncio.CancelledError:
            return "cancelled"
        return "lost"

    outcomes = [asyncio.run(cancelled_after(turns)) for turns in range(8)]
    assert set(outcomes) == {"cancelled", "too late"}, outcomes


def test_what_comes_is_heard_in_order_and_nothing_in_time() -> None:
    async def run() -> None:
        events = Events()
        with pytest.raises(TimeoutError):
            await events.get(0.01)
        for position in range(3):
            events.put(Decoded(0, position, [position]))
        events.put(WireError("session", "the session has ended"))
        assert [(await events.get(1.0)).position for _ in range(3)] == [0, 1, 2]
        with pytest.raises(WireError, match="the session has ended"):
            await events.get()

    asyncio.run(run())
