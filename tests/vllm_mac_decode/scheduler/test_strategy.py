"""Who does what of a request, by the setting ``offload`` and the model's cache."""

from __future__ import annotations

import pytest

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.layout import (
    CacheLayout,
    LayerLayout,
    Part,
    chunked,
    full_attention,
    windowed,
)
from tests.vllm_mac_decode.engine import BYTES, PROMPT, Engine

PLAIN = full_attention(2, 4, 2, "float32")
LAYER = PLAIN.layers[0]
LATENT = LayerLayout("full", [Part("keys", 1, 512, "bfloat16"), Part("values", 1, 64, "bfloat16")])
STATES = LayerLayout("recurrent", [Part("state", 4, 8, "float32", by_token=False)])

LAYOUTS = [
    (PLAIN, True),
    (CacheLayout([LATENT, LAYER]), True),
    (CacheLayout([LAYER, windowed(LAYER, 8)]), False),
    (CacheLayout([LAYER, chunked(LAYER, 8)]), False),
    (CacheLayout([LAYER, STATES]), False),
]


@pytest.mark.parametrize(("layout", "every_token"), LAYOUTS)
def test_only_caches_that_keep_every_token_meet(layout: CacheLayout, every_token: bool) -> None:
    assert layout.every_token is every_token
    for offload in ("meet", "always"):
        engine = Engine(offload=offload)
        engine.relay.layout = layout
        engine.add()
        assert engine.schedule()
        meets = every_token and offload == "meet"
        assert opened(engine).compute == ("front" if meets else "nothing")


def opened(engine: Engine) -> m.Open:
    (message,) = [said for said in engine.link.said if isinstance(said, m.Open)]
    return message


def test_the_receiver_is_asked_to_compute_the_front() -> None:
    engine = Engine(offload="meet")
    engine.add()
    number = engine.schedule()
    assert opened(engine).compute == "front"
    need = len(PROMPT) * BYTES
    engine.say(m.Opened(number), m.Complete(number, need - 2 * BYTES, 2 * BYTES))
    # The workers stop to send; the response goes on at the receiver.
    assert engine.relay.take_ended() == [number] and engine.port.woken == 1
    assert engine.relay.alive("a")
    engine.step()
    engine.decode(number, 1, 8, 9)
    assert engine.tokens() == [7, 8, 9]
    counts = engine.counts().events
    assert (counts["kv_bytes"], counts["computed_bytes"]) == (need - 2 * BYTES, 2 * BYTES)


def test_nothing_is_computed_unless_that_is_wanted() -> None:
    engine = Engine()
    engine.add()
    number = engine.schedule()
    assert opened(engine).compute == "nothing"
    engine.say(m.Opened(number), m.Complete(number, 2 * BYTES, BYTES))
    assert engine.counts().fallbacks == {"failed_protocol": 1}
    engine = Engine()
    engine.add()
    engine.complete(engine.schedule())
    assert engine.relay.take_ended() == []


def test_a_router_gets_all_that_vllm_computes() -> None:
    engine = Engine(offload="meet")
    engine.add(max_tokens=1, kv_transfer_params={"do_remote_decode": True})
    engine.schedule()
    assert opened(engine).compute == "nothing"


def test_never_hands_nothing_off() -> None:
    engine = Engine(offload="never")
    engine.add()
    assert engine.schedule() == 0 and engine.counts().local == {"offload_never": 1}
