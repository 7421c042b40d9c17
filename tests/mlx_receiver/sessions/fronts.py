"""Prompts whose front the receiver computes, chunk by chunk as a test lets it."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

from mlx_receiver.decode.fronts import CHUNK_SECONDS, Fronts
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.messages import Complete, Opened
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import FakeVllm, Prefilled, block
from tests.waiting import eventually

LAYERS, HEADS, DIM = 4, 2, 32
A_TOKEN = 2 * LAYERS * HEADS * DIM * 4
GREEDY = Sampling(max_tokens=8, temperature=0.0)
FRONT = {"compute": "front"}


class Gate:
    """Lets the receiver compute so many chunks, and notes how many it has computed."""

    def __init__(self, fronts: Fronts) -> None:
        self.fronts = fronts
        self._compute = fronts.compute
        self._open = threading.Semaphore(0)
        self.computed = 0
        #: That each chunk may take.
        self.seconds = CHUNK_SECONDS
        fronts.compute = self.compute  # type: ignore[method-assign]

    def compute(self, loaded: Any, rows: int, _seconds: float) -> bool:
        if not self._open.acquire(timeout=0.002):
            return False
        called = []
        for turn in self.fronts._waiting:
            turn.chunk, turn.rate = 16, 0.0

        def model(inputs: Any, cache: Any) -> Any:
            called.append(inputs)
            return loaded.model(inputs, cache=cache)

        fake = SimpleNamespace(model=model)
        self._compute(fake, rows, self.seconds)  # type: ignore[arg-type]
        if called:
            self.computed += 1
        else:
            self._open.release()  # nothing could be computed yet
        return bool(called)

    def let(self, chunks: int) -> None:
        """Have so many computed, of 16 tokens each, and wait for that."""
        for count in range(self.computed + 1, self.computed + 1 + chunks):
            self._open.release()
            assert eventually(lambda count=count: self.computed == count)

    def close(self) -> None:
        del self.fronts.compute  # type: ignore[method-assign]


def free(receiver: Receiver) -> None:
    """Nothing is held of what ended."""
    store = receiver.store
    assert eventually(lambda: not store.sessions() and not receiver.engine._gap.fronts)
    assert eventually(lambda: store.reserved_bytes == 0)
    while store.residents.reclaim():
        pass
    assert store.budget.reserved == 0


def opened(client: FakeVllm, kv: Prefilled, sampling: Sampling = GREEDY) -> int:
    session = client.open(kv.prompt, sampling, FRONT)
    assert isinstance(client.opened(session), Opened)
    assert eventually(lambda: len(client.receiver.engine._gap.fronts) > 0)
    found = client.receiver.store.get(session)
    assert found is not None and eventually(lambda: found.allocated)
    return session


def send(client: FakeVllm, session: int, kv: Prefilled, start: int, end: int) -> None:
    """All layers of these tokens."""
    for layer, plane in itertools.product(range(LAYERS), range(2)):
        send_one(client, session, kv, layer, plane, start, end)


def send_one(
    client: FakeVllm, session: int, kv: Prefilled, layer: int, plane: int, start: int, end: int
) -> None:
    assert client.data is not None
    header, payload = block(session, kv, layer, plane, slice(0, HEADS), slice(start, end))
    client.data.send(header, [payload])


def arrived(client: FakeVllm, session: int, nbytes: int) -> None:
    found = client.receiver.store.get(session)
    assert found is not None
    assert eventually(lambda: found.kv_bytes >= nbytes)


def finish(client: FakeVllm, session: int, kv: Prefilled, computed: int, held: int = 0) -> None:
    """The session is complete, with so many tokens computed, and decodes as MLX alone does."""
    complete = client.complete(session)
    assert complete == Complete(
        session, (len(kv.prompt) - held - computed) * A_TOKEN, computed * A_TOKEN
    )
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens
