"""codec="auto": a real receiver gets KV raw over a link that is taken for fast, quantised over one
that is taken for slow, and decodes what MLX decodes from such a cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import KVCache

from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import FULL
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from mlx_receiver.wire.quantised import ratio
from tests.mlx_alone import _model
from tests.mlx_receiver.client import layout_of, started
from tests.quantised import there_and_back
from tests.vllm_mac_decode.engine import Port
from tests.vllm_mac_decode.plain import Output, Outputs, Params, Request, Stats
from tests.waiting import eventually
from vllm_mac_decode.export import ExportSpan
from vllm_mac_decode.scheduler.fleet import Fleet
from vllm_mac_decode.scheduler.relay import Relay
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker.exporter import Exporter
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.numbers import Numbers
from vllm_mac_decode.worker.paged_cache import ExportedLayer
from vllm_mac_decode.worker.paged_layout import PagedLayout, PlaneMap

Offload = Literal["always", "auto"]

BLOCK, BLOCKS, OUTPUT = 16, 4, 12
PROMPT = [20 + (7 * i) % 900 for i in range(BLOCK * BLOCKS)]
HEADS, DIM = 2, 64

VLLM = Profile("v", "m", Prefill(0.0, 1e-4, 0.0, 8192), Decode(0.1, 0.0, 0.0))
MAC = Profile("r", "m", Prefill(0.0, 1.0, 0.0, 2048), Decode(0.01, 0.0, 0.0))


class Prefilled:
    """A prompt's cache as vLLM would have it, and what MLX decodes from it in each codec."""

    def __init__(self, path: Path) -> None:
        self._model = _model(path, mx.float32)
        self._caches = [KVCache() for _ in self._model.layers]
        logits = self._model(mx.array([PROMPT]), cache=self._caches)
        self.first = int(mx.argmax(logits[0, -1]).item())
        self.layers = {
            f"layers.{index}": ExportedLayer(index, _paged(cache), _LAYOUT, 0, FULL, BLOCK)
            for index, cache in enumerate(self._caches)
        }

    def decoded(self, codec: str) -> list[int]:
        caches, tokens = [KVCache() for _ in self._caches], [self.first]
        for made, cache in zip(caches, self._caches, strict=True):
            pair = (array[:, :, : len(PROMPT)] for array in (cache.keys, cache.values))
            if codec != "raw":
                pair = (there_and_back(array[0], codec)[None] for array in pair)
            made.update_and_fetch(*pair)
        while len(tokens) < OUTPUT:
            logits = self._model(mx.array([tokens[-1:]]), cache=caches)
            tokens.append(int(mx.argmax(logits[0, -1]).item()))
        return tokens


_PIECE = HEADS * BLOCK * DIM
_LAYOUT = PagedLayout(
    blocks=BLOCKS,
    block_size=BLOCK,
    heads=HEADS,
    widths=(DIM, DIM),
    numbers=Numbers(torch.float32, torch.float32),
    block_stride=_PIECE,
    keys=PlaneMap(0, (BLOCK * DIM, DIM, 1), None),
    values=PlaneMap(BLOCKS * _PIECE, (BLOCK * DIM, DIM, 1), None),
)


def _paged(cache: KVCache) -> torch.Tensor:
    planes = []
    for array in (cache.keys, cache.values):
        rows = np.array(array[0, :, : len(PROMPT)]).reshape(HEADS, BLOCKS, BLOCK, DIM)
        planes.append(torch.from_numpy(rows).transpose(0, 1))
    return torch.stack(planes).contiguous()


class Vllm:
    """Its scheduler's and its worker's half around an engine that has prefilled."""

    def __init__(self, receiver: Receiver, kv: Prefilled, offload: Offload) -> None:
        settings = Settings(
            receiver=f"127.0.0.1:{receiver.port}", discovery=False, proof=False,
            shadow_prefill=False, profile=False, codec="auto", stall_timeout=20.0,
            offload=offload,
        )  # fmt: skip
        self._kv, self._layout = kv, layout_of(receiver.source, "float32")
        self.port, self.relay = Port(max_model_len=512), Relay(settings)
        self.relay.engine = self.port  # type: ignore[assignment]
        self.relay.layout = self._layout
        self.relay.vocab_size = receiver.source.signature.vocab_size
        self.relay.profiling.estimate.measured(VLLM)
        self._blocks = BlockLedger()
        self._exporter = Exporter(kv.layers, settings, self._blocks)
        me = Introduction(receiver.source.signature, self._layout, client="test")
        self._fleet = Fleet(settings, me, self.relay.join)
        assert eventually(lambda: any(r.welcome for r in self.relay._receivers), 20)
        (self.remote,) = self.relay._receivers
        self.remote.speed.measured(MAC)

    def ask(self, name: str) -> tuple[str, list[int]]:
        """The codec of a request's hand-off, and its tokens."""
        request = Request(name, PROMPT, Params(OUTPUT))
        assert not self.relay.on_new_request(request)  # type: ignore[arg-type]
        session = self.relay.scheduled(name)
        assert session is not None
        tokens, blocks = len(PROMPT), [list(range(BLOCKS))]
        span = ExportSpan(
            session.session, name, 0, tokens, tokens, blocks, session.codec,
        )  # fmt: skip
        targets = self.relay.targets([session.session])
        self._exporter.begin_step([span], self.relay.take_ended(), targets)
        for layer in self._kv.layers:
            self._exporter.layer_written(layer)
        self._exporter.end_step()
        self._blocks.finished({name})
        ended = Output(name, [self._kv.first], "length")
        self.relay.rewrite({0: Outputs([ended], Stats())})  # type: ignore[dict-item]

        def finish() -> str:
            return next((end for one, _, end in reversed(self.port.out) if one == name), "")

        assert eventually(lambda: bool(finish()), 20) and finish() == "length"
        assert not self.port.resumed, "it went on locally"
        found = [token for one, some, _ in self.port.out if one == name for token in some]
        return session.codec, found

    def link(self, rate: float) -> None:
        """It is taken to be as fast."""
        self.remote.throughput.measured(rate, 1e-4, time.monotonic())

    def close(self) -> None:
        self._fleet.close()
        self._exporter.close()


@contextmanager
def vllm(receiver: Receiver, kv: Prefilled, offload: Offload) -> Iterator[Vllm]:
    made = Vllm(receiver, kv, offload)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("offload", ["always", "auto"])
def test_kv_travels_quantised_over_a_slow_link_only(
    tiny_qwen3_path: Path, offload: Offload
) -> None:
    kv = Prefilled(tiny_qwen3_path)
    expected: dict[str, Any] = {codec: kv.decoded(codec) for codec in ("raw", "q8")}
    with started(tiny_qwen3_path) as receiver, vllm(receiver, kv, offload) as engine:
        layout = layout_of(receiver.source, "float32")
        whole = layout.nbytes(len(PROMPT))
        for name, rate, codec in (("a", 1e10, "raw"), ("b", 4e5, "q8"), ("c", 1e10, "raw")):
            engine.link(rate)
            before = receiver.metrics.kv_bytes._value.get()
            assert engine.ask(name) == (codec, expected[codec])
            came = receiver.metrics.kv_bytes._value.get() - before
            assert came == whole * ratio(layout, codec)
