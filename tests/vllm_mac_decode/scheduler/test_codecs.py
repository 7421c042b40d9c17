"""Which codec a hand-off's KV travels in."""

from __future__ import annotations

import logging
import time

import pytest

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.layout import LayerLayout, Part, full_attention
from mlx_receiver.wire.quantised import codec_of, ratio
from tests.vllm_mac_decode.engine import Engine
from vllm_mac_decode.scheduler import codecs
from vllm_mac_decode.settings import SettingsError, load

WIDE = full_attention(1, 1, 64, "bfloat16")
ALL = ["raw", "q8", "q4"]


@pytest.fixture(autouse=True)
def _nothing_was_said() -> None:
    codecs._say.cache_clear()


@pytest.mark.parametrize("setting", ["raw", "q8", "q4"])
def test_what_is_set_is_chosen_where_it_is_offered(setting: str) -> None:
    assert codecs.allowed(setting, ALL, WIDE) == (setting,)
    assert codecs.agreed("raw", codecs.allowed(setting, ALL, WIDE)) == setting


@pytest.mark.parametrize(
    ("offered", "found"),
    [([], ("raw",)), (["raw"], ("raw",)), (["raw", "q4"], ("raw",)), (ALL, ("raw", "q8"))],
)
def test_auto_never_loses_much(offered: list[str], found: tuple[str, ...]) -> None:
    assert codecs.allowed("auto", offered, WIDE) == found
    assert codecs.allowed("auto", offered, full_attention(1, 1, 80, "bfloat16")) == ("raw",)
    assert codecs.agreed("q8", found) == found[-1]


def test_what_is_not_offered_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vllm.mac_decode.relay"):
        for _ in range(3):
            assert codecs.allowed("q4", ["raw", "q8"], WIDE) == ("raw",)
    (line,) = caplog.messages
    assert line == "the receiver does not know the codec q4 (it offers raw, q8): KV travels raw"


@pytest.mark.parametrize(("width", "dtype"), [(80, "bfloat16"), (64, "float8_e4m3"), (64, "int8")])
def test_a_cache_that_cannot_be_quantised(
    caplog: pytest.LogCaptureFixture, width: int, dtype: str
) -> None:
    layout = full_attention(2, 4, width, dtype)
    with caplog.at_level(logging.WARNING, "vllm.mac_decode.relay"):
        assert [codecs.allowed("q8", ALL, layout) for _ in range(2)] == 2 * [("raw",)]
    (line,) = caplog.messages
    assert "nothing of this model's cache can be sent in the codec q8" in line


def test_words_of_a_peer_do_not_fill_memory_or_the_log() -> None:
    for number in range(1000):
        assert codecs.allowed("q8", [f"c{number}\n" * 100], WIDE) == ("raw",)
    assert codecs._say.cache_info().currsize <= 16


def test_ratios() -> None:
    whole = full_attention(3, 2, 128, "float32")
    state = Part("state0", 8, 4096, "float32", by_token=False)
    mixed = [*WIDE.layers, LayerLayout("recurrent", [state])]
    assert ratio(WIDE, "raw") == 1
    assert ratio(WIDE, "q8") == 8.5 / 16 and ratio(WIDE, "q4") == 4.5 / 16
    assert ratio(whole, "q8") == 9 / 32 and ratio(whole, "q4") == 5 / 32
    assert ratio(type(WIDE)(mixed), "q8") == 8.5 / 16, "states are not of any token"
    assert codec_of(state, "q8") == "raw"


# --- in a hand-off ------------------------------------------------------------------------------


def opened(engine: Engine) -> m.Open:
    engine.relay.layout = full_attention(1, 1, 64, "bfloat16")
    engine.add()
    assert engine.schedule()
    message = engine.link.said[-1]
    assert isinstance(message, m.Open)
    return message


@pytest.mark.parametrize(
    ("setting", "offered", "codec"),
    [("raw", ALL, "raw"), ("q8", ALL, "q8"), ("q4", ALL, "q4"), ("q4", ["raw"], "raw")],
)
def test_open_names_it(setting: str, offered: list[str], codec: str) -> None:
    engine = Engine(codec=setting)
    engine.codecs = offered
    engine.lose()
    engine.connect()
    message = opened(engine)
    assert message.codec == codec
    session = engine.relay._sessions[message.session]
    assert session.codec == codec, "what the workers are told"


def test_a_proof_travels_raw() -> None:
    engine = Engine(codec="q8")
    engine.relay.layout = full_attention(1, 1, 64, "bfloat16")
    engine.codecs = ALL
    engine.lose()
    engine.connect(proof=[5, 6, 7])
    engine.port.idle = True
    engine.relay.tick(time.monotonic())
    (request,) = engine.port.prefilled
    engine.requests[request.request_id] = request
    engine.relay.on_new_request(request)  # type: ignore[arg-type]
    assert engine.schedule(request.request_id)
    message = engine.link.said[-1]
    assert isinstance(message, m.Open) and message.proof and message.codec == "raw"


def test_a_codec_that_there_is_not() -> None:
    with pytest.raises(SettingsError, match="codec"):
        load({"codec": "zip"}, {})
