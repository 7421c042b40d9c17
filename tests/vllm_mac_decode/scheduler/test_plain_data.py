"""KV that is not encrypted between machines: only where both sides say so."""

from __future__ import annotations

import logging

import pytest

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.keys import new_ticket
from vllm_mac_decode.scheduler.link import Link
from vllm_mac_decode.settings import Settings


def plain(host: str, ours: bool, theirs: bool) -> bool:
    """What workers are told."""
    offered = m.Endpoint("tcp", "192.0.2.7", 9, plain=theirs)
    welcome = m.Welcome("r", "m", "e", [offered], new_ticket(), 99, ["raw"])
    link = object.__new__(Link)  # without its thread
    link._settings, link.number = Settings(receiver="192.0.2.1", plain_data=ours), 0
    return link._target_of(host, welcome).endpoint.plain


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_both_sides_must_say_so(caplog: pytest.LogCaptureFixture, ours: bool, theirs: bool) -> None:
    caplog.set_level(logging.INFO)
    logging.getLogger("vllm").propagate = True
    assert plain("192.0.2.1", ours, theirs) == (ours and theirs)
    lines = [record.getMessage() for record in caplog.records]
    missing = {
        (True, False): "without --plain-data",
        (False, True): "MAC_DECODE_PLAIN_DATA is not set",
    }.get((ours, theirs))
    assert len(lines) == (missing is not None)
    assert missing is None or missing in lines[0]


def test_on_one_machine_it_does_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    assert not plain("127.0.0.1", True, False)
    assert not caplog.records
