"""A kind of cache that nobody has: it needs nothing but an adapter of its own.

One part has one head and a row for each token, another describes the whole text.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_receiver.caches.adapter import Rows
from mlx_receiver.caches.model import ModelCache, UnknownCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.session import Session
from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.wire import frames
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.layout import CacheLayout, LayerLayout, Part, full_attention
from mlx_receiver.wire.messages import Open, WireError
from mlx_receiver.wire.sampling import Sampling
from tests.waiting import eventually

TOKENS = 7
ODD = LayerLayout("odd", [Part("latent", 1, 6, "float32"), Part("state", 3, 5, "float32", False)])
PLAIN = full_attention(1, 2, 4, "float32").layers[0]
LAYOUT = CacheLayout([PLAIN, ODD, PLAIN])


class OddBuffers:
    """NumPy arrays, as good as any."""

    def __init__(self, layer: LayerLayout, tokens: int) -> None:
        self._arrays: list[NDArray[np.uint32]] = [
            np.zeros((part.heads, part.tokens(tokens), part.width), np.uint32)
            for part in layer.parts
        ]

    def part(self, index: int) -> NDArray[Any]:
        return self._arrays[index]

    def rows(self, index: int, heads: slice, tokens: slice) -> Rows:
        place = self._arrays[index][heads, tokens]
        return Rows([row.data.cast("B") for row in place])

    def build(self, dtypes: Any) -> tuple[Any, list[mx.array]]:
        return [array.view(np.float32) for array in self._arrays], []


class Odd:
    kind = "odd"

    def layout(self, cache: Any) -> LayerLayout | None:
        return ODD if cache == "odd" else None

    def nbytes(self, layer: LayerLayout, tokens: int, headroom: int, itemsize: int) -> int:
        return sum(part.row * part.tokens(tokens) for part in layer.parts) * itemsize

    def allocate(self, layer: LayerLayout, tokens: int, headroom: int) -> OddBuffers:
        return OddBuffers(layer, tokens)

    def empty(self, layer: LayerLayout) -> Any:
        return "odd"

    def parts(self, layer: LayerLayout, cache: Any, tokens: int) -> list[mx.array]:
        return [mx.array(array) for array in cache]


class Owner:
    id = "me"

    def __init__(self) -> None:
        self.complete_sessions: list[int] = []
        self.failures: list[str] = []

    def opened(self, session: Session) -> None: ...

    def complete(self, session: Session) -> None:
        self.complete_sessions.append(session.id)

    def failed(self, session: Session, code: str, reason: str) -> None:
        self.failures.append(reason)


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def store(owner: Owner) -> SessionStore:
    made = SessionStore(max_sessions=4, events=owner, metrics=Metrics())
    made.configure(ModelCache(LAYOUT, [PlainKV(), Odd()]), 1 << 24)
    return made


def opened(store: SessionStore, owner: Owner) -> Session:
    session = store.open(Open(5, "r", [1] * TOKENS, Sampling(max_tokens=3)), owner, LAYOUT)
    assert eventually(lambda: session.allocated_layers == 3)
    return session


def values(layer: int, index: int) -> NDArray[np.float32]:
    part = LAYOUT.layers[layer].parts[index]
    shape = (part.heads, part.tokens(TOKENS), part.width)
    return np.random.default_rng(10 * layer + index).standard_normal(shape).astype(np.float32)


def block(layer: int, index: int, heads: slice, tokens: slice) -> tuple[Header, memoryview]:
    data = np.ascontiguousarray(values(layer, index)[heads, tokens])
    header = Header(
        Kind.BLOCK, 5, data.nbytes, layer, index, "float32", heads.start, data.shape[0],
        data.shape[2], tokens.start, data.shape[1],
    )  # fmt: skip
    return frames.unpack(header.pack()), data.data.cast("B")


def land(store: SessionStore, header: Header, payload: memoryview) -> None:
    landing = store.landing("me", header)
    for buffer in landing.buffers:
        buffer[:] = payload[: buffer.nbytes]
        payload = payload[buffer.nbytes :]
    del buffer
    landing.commit()


def test_its_blocks_land_are_covered_and_built(store: SessionStore, owner: Owner) -> None:
    session = opened(store, owner)
    assert store.reserved_bytes >= LAYOUT.nbytes(TOKENS)
    for layer, of_layer in enumerate(LAYOUT.layers):
        for index, part in enumerate(of_layer.parts):
            for head in reversed(range(part.heads)):
                rows = part.tokens(TOKENS)
                for low, high in ((rows // 2, rows), (0, rows // 2)):
                    if low < high and (layer, index, head) != (1, 1, 2):
                        land(store, *block(layer, index, slice(head, head + 1), slice(low, high)))
    assert session.missing() == "layer 1, state, head 2, rows 0..0 (1 of 66 cells are missing)"
    assert not owner.complete_sessions
    land(store, *block(1, 1, slice(2, 3), slice(0, 1)))
    assert owner.complete_sessions == [5] and session.kv_bytes == LAYOUT.nbytes(TOKENS)
    built = session.take_memory().build()
    for index in range(2):
        np.testing.assert_array_equal(built[1][index], values(1, index))
        array = (built[2].keys, built[2].values)[index]
        np.testing.assert_array_equal(np.array(array)[0, :, :TOKENS], values(2, index))
    assert not owner.failures


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 5, "payload_bytes": 4 * 5}, "latent.*a row is of 5 numbers, the model's of 6"),
        ({"part": 2}, "the layer has 2 parts"),
        ({"part": 1, "width": 5, "payload_bytes": 4 * 5, "token_start": 1}, "state.*no tokens"),
        ({"head_start": 1}, "latent.*the model has 1 KV heads"),
    ],
)
def test_what_does_not_fit_is_named(
    store: SessionStore, owner: Owner, changes: dict[str, Any], said: str
) -> None:
    opened(store, owner)
    fields = dict(kind=Kind.BLOCK, session=5, payload_bytes=24, layer=1, part=0, dtype="float32",
                  heads=1, width=6, token_start=0, tokens=1)  # fmt: skip
    with pytest.raises(WireError, match=said):
        store.landing("me", Header(**{**fields, **changes}))  # type: ignore[arg-type]


def test_the_layout_comes_from_the_models_own_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_receiver.caches.model.adapters", lambda: [PlainKV(), Odd()])
    assert ModelCache.of(["odd", "odd"]).layout == CacheLayout([ODD, ODD])
    with pytest.raises(UnknownCache, match="layer 1 has a int"):
        ModelCache.of(["odd", 7])
    with pytest.raises(UnknownCache, match="layer 1 is of the kind 'other'"):
        ModelCache(CacheLayout([ODD, LayerLayout("other", ODD.parts)]))


def test_differences_name_layer_part_and_field() -> None:
    wide = LayerLayout("odd", [Part("latent", 1, 8, "float16"), ODD.parts[1]])
    other = LayerLayout("odd", [ODD.parts[0], Part("state", 3, 5, "float32")])
    assert LAYOUT.differences(CacheLayout([PLAIN, wide, PLAIN])) == [
        "layer 1, latent: width: 6 here, 8 there"
    ]
    assert LAYOUT.differences(CacheLayout([ODD, other, ODD])) == [
        "layers 0, 2, kind: full here, odd there",
        "layer 1, state: by_token: False here, True there",
    ]
    assert LAYOUT.differences(CacheLayout([PLAIN, LayerLayout("odd", ODD.parts[:1]), PLAIN])) == [
        "layer 1, parts: latent, state here, latent there"
    ]
    assert not LAYOUT.differences(LAYOUT)
