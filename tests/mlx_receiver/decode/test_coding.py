"""How fast a receiver decodes what comes quantised."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_receiver.caches.memory import Budget
from mlx_receiver.decode import coding, measuring
from mlx_receiver.decode.coding import Decoding
from mlx_receiver.decode.measuring import Measurement
from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.profile import Coding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_codec_has_a_rate(dtype: str) -> None:
    decoding = Decoding(full_attention(2, 8, 128, dtype))
    known = []
    while not decoding.done:
        decoding.step()
        known.append(decoding.found)
    assert known[0].q8 > 1e6 and known[0].q4 == 0.0
    assert all(1e6 < rate < 1e12 for rate in (known[-1].q8, known[-1].q4))
    assert 1 <= known[-1].threads <= 4
    assert 0 < decoding.nbytes < 64 << 20


def test_it_is_what_a_block_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made to take a known time, beside which its own is little; threads wait together."""
    slow, threads = 0.05, set()

    def scatter(sources: object, targets: list[memoryview]) -> None:
        threads.add(threading.current_thread())
        time.sleep(slow)
        sizes.append(targets[0].nbytes)

    sizes: list[int] = []
    monkeypatch.setattr(coding, "scatter", scatter)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    decoding = Decoding(full_attention(2, 8, 128, "bfloat16"))
    while not decoding.done:
        decoding.step()
    found = decoding.found
    assert 0.3 * sizes[0] / slow < found.q8 <= sizes[0] / slow
    assert 1.5 < found.threads <= 4
    assert not any(thread.is_alive() for thread in threads - {threading.current_thread()})


def test_what_cannot_be_quantised_has_no_rate() -> None:
    decoding = Decoding(full_attention(2, 8, 48, "bfloat16"))
    assert decoding.nbytes == 0 and decoding.done and decoding.found == Coding()


@pytest.mark.parametrize("room", [1 << 24, 1 << 30])
def test_it_is_part_of_what_a_receiver_measures_where_there_is_room(
    tiny_qwen3_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_GROWN", 256)
    monkeypatch.setattr(measuring, "_BATCHES", ((32, 1), (64, 1)))
    source = find_model(str(tiny_qwen3_path))
    loaded, budget = load_model(source), Budget()
    budget.configure(loaded.cache, room)
    measurement, interrupted = Measurement(source, loaded, 1, budget), 0
    while measurement.advance():
        if room > 1 << 24 and measurement._prefilled and not measurement._decoding.done:
            measurement.give_way()  # somebody comes each time: it goes on where it was
            assert budget.reserved == 0
            interrupted += 1
            assert interrupted < 100
    found = measurement.result()
    assert budget.reserved == 0 and found is not None
    if room > 1 << 24:
        assert found.profile.coding.q8 > 1e6 < found.profile.coding.q4 and interrupted == 2
    else:
        assert found.profile.coding == Coding(), "it would make no room"


@pytest.mark.parametrize("experts", [False, True])
def test_the_rest_of_a_profile_does_not_depend_on_it(
    tiny_qwen3_path: Path, experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with experts a step reads some: what it reads a second is not known."""

    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(coding, "scatter", fails)
    monkeypatch.setattr(measuring, "_GROWN", 256)
    monkeypatch.setattr(measuring, "_BATCHES", ((32, 1), (64, 1)))
    source = find_model(str(tiny_qwen3_path))
    loaded, budget = replace(load_model(source), experts=experts), Budget()
    budget.configure(loaded.cache, 1 << 30)
    measurement = Measurement(source, loaded, 1, budget)
    while measurement.advance():
        pass
    found = measurement.result()
    assert budget.reserved == 0 and found is not None
    assert found.profile.coding == Coding()
    assert found.profile.bandwidth == 0 or not experts
