"""One vLLM and two receivers: both are used, and each may be lost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.servers import Receiver, Vllm, start_receiver, start_vllm
from tests.waiting import eventually

pytestmark = pytest.mark.server

PROMPTS = [[1 + (7 * i + 3 * n) % 250 for i in range(60)] for n in range(6)]
_DECODED = "mlx_receiver_decoded_tokens_total"


@pytest.fixture
def ports() -> list[tuple[int, int]]:
    return [(free_port(), free_port()) for _ in range(2)]


@pytest.fixture
def vllm(tiny_llama_path: Path, tmp_path: Path, ports: list[tuple[int, int]]) -> Iterator[Vllm]:
    both = ",".join(f"127.0.0.1:{port}" for port, _ in ports)
    server = start_vllm(tiny_llama_path, tmp_path / "vllm.log", receiver=both)
    yield server
    server.server.stop()


def wait_connected(receiver: Receiver) -> None:
    """A request that is alone may always go to the other one."""
    assert eventually(lambda: bool(receiver.health()["clients"]), 20, 0.1)


def ask_all(vllm: Vllm, tokens: int) -> list[list[int]]:
    """Every prompt at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: vllm.tokens(prompt, tokens), PROMPTS))


def test_both_are_used_and_each_may_be_lost(
    vllm: Vllm, ports: list[tuple[int, int]], tiny_llama_path: Path, tmp_path: Path
) -> None:
    def start(which: int) -> Receiver:
        port, http_port = ports[which]
        log = tmp_path / f"receiver{which}.log"
        return start_receiver(tiny_llama_path, log, port=port, http_port=http_port)

    # No receiver is there yet: what vLLM decodes is what everything is compared with.
    short, long = ask_all(vllm, 24), ask_all(vllm, 300)
    assert vllm.metric("vllm:mac_decode_tokens_total") == 0
    receivers = [start(0), start(1)]
    try:
        for receiver in receivers:
            wait_connected(receiver)
        before = [receiver.metric(_DECODED) for receiver in receivers]
        assert ask_all(vllm, 24) == short
        shares = [r.metric(_DECODED) - b for r, b in zip(receivers, before, strict=True)]
        assert all(share >= 2 * 23 for share in shares), shares
        # One is killed while both decode.
        kept = receivers[1].metric(_DECODED)
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(ask_all, vllm, 300)
            assert eventually(lambda: all(r.health()["decoding"] >= 2 for r in receivers), 30, 0.02)
            receivers[0].server.process.kill()
            assert answers.result(120) == long
        whole, rest = divmod(receivers[1].metric(_DECODED) - kept, 299)
        assert whole >= 2 and not rest, "the other's responses stayed there to their ends"
        assert 0 < vllm.metric("vllm:mac_decode_fallbacks_total") < len(PROMPTS)
        # New ones go to the other alone.
        kept = receivers[1].metric(_DECODED)
        assert ask_all(vllm, 24) == short
        assert receivers[1].metric(_DECODED) - kept == 23 * len(PROMPTS)
        # And to both when there are two again.
        receivers[0].server.stop()
        receivers[0] = start(0)
        wait_connected(receivers[0])
        assert ask_all(vllm, 24) == short
        assert receivers[0].metric(_DECODED) >= 2 * 23
        for receiver in receivers:
            receiver.assert_idle()
    finally:
        for receiver in receivers:
            receiver.server.stop()
