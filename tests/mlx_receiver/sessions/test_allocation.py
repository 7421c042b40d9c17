"""What fails while a session gets its memory, wherever that is: it fails, and holds nothing."""

from __future__ import annotations

import pytest

from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.branches import LEAST_MORE
from mlx_receiver.sessions.session import Session
from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.messages import Open
from mlx_receiver.wire.sampling import Sampling
from tests.waiting import eventually

LAYOUT = full_attention(2, 2, 4, "float32")
PROMPT = list(range(2 * LEAST_MORE))


class Owner:
    id = "owner"

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def opened(self, session: Session) -> None: ...

    def complete(self, session: Session) -> None: ...

    def failed(self, session: Session, code: str, reason: str) -> None:
        self.reasons.append(reason)


@pytest.mark.parametrize("where", ["copied", "allocate", "opened"])
def test_whoever_opened_it_hears_of_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of all things")

    owner = Owner()
    store = SessionStore(max_sessions=4, events=owner, metrics=Metrics())
    store.configure(ModelCache(LAYOUT, [PlainKV()]), 1 << 24)
    text = store.earlier.decoded.add("", PROMPT, lambda _tokens, _wanted, done: done(None))
    if where == "copied":
        monkeypatch.setattr(store.earlier, "copied", fail)
    elif where == "allocate":
        monkeypatch.setattr(ModelCache, "allocate", fail)
    elif where == "opened":
        monkeypatch.setattr(owner, "opened", fail)
    opened = Open(1, "r", [*PROMPT, 1], Sampling(max_tokens=4))
    session = store.open(opened, owner, LAYOUT)
    assert eventually(lambda: bool(owner.reasons))
    assert "of all things" in owner.reasons[0] and not session.alive and not store.sessions()
    store.earlier.decoded.remove(text)
    assert eventually(lambda: store.budget.reserved == 0)
    store.close()
