"""The worked example's two halves (``docs/extending.md``), from paged blocks to MLX's cache; and
what becomes of a package that does not work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_receiver import plugins
from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.wire.layout import CacheLayout, merged
from mlx_receiver.wire.messages import Open
from mlx_receiver.wire.sampling import Sampling
from tests.rounding import rounded
from tests.vllm_mac_decode.ranks import DIM, HEADS, LAYERS, Request, Store, Worker
from tests.waiting import eventually
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker import layers as worker_layers
from vllm_mac_decode.worker.exporter import Exporter
from vllm_mac_decode.worker.layers import exported_layers
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.paged_cache import (
    AllocatedLayer,
    ExportedLayer,
    LayoutError,
    PagedPart,
    Readable,
    described,
)

EXAMPLE = Path(__file__).parents[2] / "extension"
TOKENS = 45


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))


def quantised(worker: Worker) -> list[ExportedLayer]:
    """Let the worker export as the example does."""
    from mac_decode_int8.paged import Int8Paged

    layers = {
        name: ExportedLayer(
            layer.index, layer.cache, Int8Paged(layer.layout), layer.head_start, "int8",
            layer.block_size,
        )
        for name, layer in worker.exporter._layers.items()
    }  # fmt: skip
    worker.exporter.close()
    worker.exporter = Exporter(layers, Settings(), worker.ledger)
    return list(layers.values())


def test_what_two_ranks_round_is_what_is_decoded_from() -> None:
    from mac_decode_int8.landed import Int8KV

    ranks = [Worker(heads=range(0, 2), kernel_block=8), Worker(heads=range(2, HEADS))]
    layout = merged([described(quantised(rank)) for rank in ranks])
    own = ModelCache(
        CacheLayout([Int8KV().layout(filled())] * LAYERS),  # type: ignore[list-item]
        [Int8KV()],
    )
    assert not own.layout.differences(layout)
    store, request = Store(), Request(TOKENS, [9, 3, 4])
    store.configure(own, 1 << 28)
    try:
        opened = Open(request.session, request.id, [1] * TOKENS, Sampling(max_tokens=2))
        session = store.open(opened, store, layout)
        for start, end in ((0, 20), (20, TOKENS)):
            for rank in ranks:
                rank.step([(request, start, end)], store.target)
        assert eventually(lambda: request.session in store.completed), store.failures
        assert session.kv_bytes == layout.nbytes(TOKENS) == TOKENS * LAYERS * 2 * HEADS * (DIM + 2)
        built = session.take_memory().build()
    finally:
        for rank in ranks:
            rank.exporter.close()
        store.stop()
    for layer, cache in enumerate(built):
        for plane, array in enumerate((cache.keys, cache.values)):
            assert array.dtype == mx.float32 and cache.offset == TOKENS
            given = request.kv[layer, plane].numpy()
            got = np.array(array)[0, :, :TOKENS]
            np.testing.assert_array_equal(got, rounded(given))
            assert 1e-3 < np.abs(got - given).max() / np.abs(given).max() < 5e-3
        # What the proof compares: the same numbers as of a cache that was not rounded.
        plain = PlainKV().empty(layout.layers[0])
        plain.update_and_fetch(*(mx.array(kv.numpy())[None] for kv in request.kv[layer]))
        theirs, mine = (own.parts(layer, c, TOKENS) for c in (cache, plain))
        for part, a, b in zip(layout.layers[0].parts, theirs, mine, strict=True):
            assert a.shape == b.shape == (HEADS, TOKENS, part.width)
            assert mx.array_equal(a, b)


def filled() -> Any:
    from mlx_lm.models.cache import KVCache

    cache = KVCache()
    cache.update_and_fetch(mx.zeros((1, HEADS, 1, DIM)), mx.zeros((1, HEADS, 1, DIM)))
    return cache


class Paged:
    """Two tokens in a block, one number each."""

    block_size = 2
    parts: Any = (PagedPart("one", 1, 1, "float32"),)

    def read(self, cache: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        raise KeyError("no such block")


class Adapter:
    """Answers what it is told to."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def readable(self, layer: AllocatedLayer) -> Readable | None:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def readable(**changes: Any) -> Readable:
    paged = Paged()
    for name in ("parts", "block_size"):
        if name in changes:
            setattr(paged, name, changes.pop(name))
    return Readable(**{"kind": "odd", "layout": paged, "cache": torch.zeros(1)} | changes)


def export(monkeypatch: pytest.MonkeyPatch, *adapters: Adapter) -> dict[str, ExportedLayer]:
    """Of a model of two layers with a cache that vLLM does not have."""
    monkeypatch.setattr(worker_layers, "adapters", lambda: list(adapters))
    monkeypatch.setattr(worker_layers, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(worker_layers, "get_tensor_model_parallel_world_size", lambda: 1)
    names = ["layers.0.attn", "layers.1.attn"]
    spec = type("OddSpec", (), {"block_size": 4})()
    vllm: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(names)),
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=2),
            get_total_num_kv_heads=lambda: 1,
        ),
        cache_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=names)
    caches: Any = SimpleNamespace(kv_cache_groups=[group], num_blocks=3)
    return exported_layers(vllm, caches, dict.fromkeys(names, torch.zeros(1)))


def test_the_first_that_knows_a_layer_exports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = readable(window=7), readable()
    layers = export(monkeypatch, Adapter(None), Adapter(first), Adapter(second))
    assert [layer.kind for layer in layers.values()] == ["odd", "odd"]
    assert {layer.window for layer in layers.values()} == {7}
    with pytest.raises(LayoutError, match="it has layers of the kinds Odd"):
        export(monkeypatch, Adapter(None))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (LayoutError("it is upside down"), r"layer layers\.0\.attn: it is upside down"),
        (ZeroDivisionError("no"), "test_extension.Adapter failed: ZeroDivisionError: no"),
        ("something", "failed: AttributeError"),
        (readable(kind="a+b"), "a kind has no"),
        (readable(kind=""), "no layer has that form"),
        (readable(block_size=3), "3 tokens do not divide a block of 4"),
        (readable(parts=[]), "no layer has that form"),
        (readable(parts=[PagedPart("one", 1, 1, "float64")]), "no layer has that form"),
        (readable(parts=[PagedPart("one", 1, 1, "int8")] * 2), "no two parts of a name"),
        (
            readable(parts=[PagedPart("a", 1, 1, "int8"), PagedPart("b", 1, 1, "int8", False)]),
            "some of its parts have rows for tokens",
        ),
    ],
)
def test_who_fails_is_named(answer: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LayoutError, match=said):
        export(monkeypatch, Adapter(answer), Adapter(readable()))


def test_a_cache_that_cannot_be_read_ends_the_export_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layers = export(monkeypatch, Adapter(readable()))
    store, request = Store(), Request(4, [1], layers=2)
    ledger = BlockLedger()
    exporter = Exporter(layers, Settings(), ledger)
    layout = merged([described(list(layers.values()))])
    monkeypatch.setattr("vllm_mac_decode.worker.destination.logger.propagate", True)
    # The store takes the session's blocks, none of which comes.
    store.configure(ModelCache(layout, [Odd()]), 1 << 24)  # type: ignore[list-item]
    try:
        store.open(
            Open(request.session, request.id, [1] * 4, Sampling(max_tokens=1)), store, layout
        )
        exporter.begin_step([request.span(0, 4, 4)], [], {request.session: store.target})
        for name in layers:
            exporter.layer_written(name)
        exporter.end_step()
        assert eventually(lambda: exporter.stopped)
        assert eventually(lambda: ledger.finished({request.id}) == {request.id})
    finally:
        exporter.close()
        store.stop()
    assert "layer 0 cannot be read by" in caplog.text
    assert "test_extension.Paged: KeyError: 'no such block'" in caplog.text


class Odd(PlainKV):
    """Room for one number of each token."""

    kind = "odd"


def test_a_hook_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        @plugins.hookimpl
        def mac_decode_paged_caches(self) -> list[Any]:
            raise OSError("no licence")

    class Useless:
        @plugins.hookimpl
        def mac_decode_paged_caches(self) -> list[Any]:
            return [7]

    class Fine:
        @plugins.hookimpl
        def mac_decode_paged_caches(self) -> list[Any]:
            return [Adapter(None)]

    for name, plugin in (("broken", Broken()), ("useless", Useless()), ("fine", Fine())):
        plugins.manager().register(plugin, name)
    try:
        for _ in range(2):
            first, *others = worker_layers.adapters()
            assert isinstance(first, Adapter)
            assert [type(other).__name__ for other in others] == ["AttentionKV", "RecurrentStates"]
    finally:
        for name in ("broken", "useless", "fine"):
            plugins.manager().unregister(name=name)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the plugin useless cannot answer mac_decode_paged_caches and is left out: "
        "AttributeError: 'int' object has no attribute 'readable'",
        "the plugin broken cannot answer mac_decode_paged_caches and is left out: "
        "OSError: no licence",
    ]
