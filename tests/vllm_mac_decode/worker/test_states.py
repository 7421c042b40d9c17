"""Recurrent layers: one state of a whole prompt leaves, from the block of its last token, with the
next layer that has a hook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.states import States
from mlx_receiver.wire.layout import FULL, RECURRENT, merged
from mlx_receiver.wire.messages import Open
from mlx_receiver.wire.sampling import Sampling
from tests.vllm_mac_decode.ranks import Store
from tests.waiting import eventually
from vllm_mac_decode.export import ExportSpan
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker import layers as worker_layers
from vllm_mac_decode.worker import paged_states
from vllm_mac_decode.worker.exporter import Exporter
from vllm_mac_decode.worker.layers import _places, _side_by_side
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.paged_cache import ExportedLayer, LayoutError, PagedPart, described
from vllm_mac_decode.worker.paged_states import PagedStates, states_of

BLOCK, BLOCKS, TOKENS = 8, 6, 20


def states() -> list[torch.Tensor]:
    """Side by side in a padded page, as vLLM keeps them."""
    page = torch.randn(BLOCKS, 200)
    return [
        page[:, :30].view(BLOCKS, 3, 10),
        torch.as_strided(page, (BLOCKS, 4, 5, 6), (200, 30, 6, 1), 30),
    ]


def recurrent(index: int, tensors: list[torch.Tensor]) -> ExportedLayer:
    return ExportedLayer(index, tensors, PagedStates.of(tensors, BLOCK), 0, RECURRENT, BLOCK)


def test_the_last_block_of_the_last_span() -> None:
    found = [states(), states()]
    layers = {f"layers.{i}": recurrent(i, tensors) for i, tensors in enumerate(found)}
    layout = merged([described(list(layers.values()))])
    assert [part.dims for part in layout.layers[0].parts] == [[], [5, 6]]
    store = Store()
    store.configure(ModelCache(layout, [States()]), 1 << 24)
    ledger = BlockLedger()
    exporter = Exporter(layers, Settings(), ledger)
    try:
        session = store.open(Open(3, "r", [1] * TOKENS, Sampling(max_tokens=2)), store, layout)
        # Two chunks; the first one's state is nobody's.
        for start, end, ids in ((0, 12, [5, 2]), (12, TOKENS, [2, 4])):
            span = ExportSpan(3, "r", start, end, TOKENS, [ids])
            exporter.begin_step([span], [], {3: store.target})
            exporter.end_step()
        assert eventually(lambda: 3 in store.completed), store.failures
        assert session.kv_bytes == 2 * 4 * (30 + 120)
        for got, tensors in zip(session.take_memory().build(), found, strict=True):
            for array, state in zip(got.cache, tensors, strict=True):
                np.testing.assert_array_equal(np.array(array)[0], state[4].numpy())
        assert eventually(lambda: ledger.finished({"r"}) == {"r"})
    finally:
        exporter.close()
        store.stop()


def test_states_leave_with_the_next_layer_that_has_a_hook() -> None:
    attention = PagedPart("keys", 1, 1, "float32")
    with_hook = SimpleNamespace(block_size=BLOCK, parts=[attention])
    layers = {
        "0.mamba": recurrent(0, states()),
        "1.attn": ExportedLayer(1, torch.zeros(1), with_hook, 0, FULL, BLOCK),  # type: ignore[arg-type]
        "2.mamba": recurrent(2, states()),
        "3.mamba": recurrent(3, states()),
        "4.attn": ExportedLayer(4, torch.zeros(1), with_hook, 0, FULL, BLOCK),  # type: ignore[arg-type]
        "5.mamba": recurrent(5, states()),
    }
    exporter = Exporter(layers, Settings(), BlockLedger())
    queued: list[int] = []
    exporter._gate.add = lambda written: queued.append(written.layer.index)  # type: ignore[method-assign]
    try:
        exporter._unwritten = set(layers)
        exporter.layer_written("1.attn")
        assert queued == [0, 1]
        exporter.layer_written("1.attn")
        exporter.layer_written("4.attn")
        assert queued == [0, 1, 2, 3, 4]
        exporter.end_step()
        assert queued == [0, 1, 2, 3, 4, 5]
    finally:
        exporter.close()


def test_two_caches_of_a_layer() -> None:
    """Falcon-H1 numbers its second ones behind all layers."""
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            dtype=torch.float32, hf_text_config=SimpleNamespace(num_hidden_layers=2)
        ),
        cache_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    names = ["model.layers.0.attn", "model.layers.1.attn", "model.2.mixer", "model.3.mixer"]
    places = _places(names, config)
    assert places == {names[0]: 0, names[1]: 1, names[2]: 0, names[3]: 1}
    plain = SimpleNamespace(block_size=BLOCK, parts=[PagedPart("keys", 2, 4, "float32")])
    layers = {
        name: ExportedLayer(places[name], torch.zeros(1), plain, 0, FULL, BLOCK)  # type: ignore[arg-type]
        if "attn" in name
        else recurrent(places[name], states())
        for name in names
    }
    found = _side_by_side(layers)
    assert list(found) == names
    assert [found[name].first_part for name in names] == [2, 2, 0, 0]
    first = described(list(found.values()))[0]
    assert first.kind == "recurrent+full"
    assert [part.name for part in first.parts] == ["0.state0", "0.state1", "1.keys"]


def test_layers_without_a_cache_have_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            dtype=torch.float32, hf_text_config=SimpleNamespace(num_hidden_layers=9)
        ),
        cache_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    names = [f"model.layers.{index}.mixer" for index in (7, 0, 2, 3)]
    assert list(_places(names, config).values()) == [3, 0, 1, 2]
    # A stage of a pipeline asks the other ones.
    config.parallel_config.pipeline_parallel_size = 2
    monkeypatch.setattr(worker_layers, "_of_all_stages", lambda own: own | {1, 5})
    assert list(_places(names, config).values()) == [5, 0, 2, 3]


def test_what_vllm_hands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    two = states()
    assert states_of(SimpleNamespace(kv_cache=tuple(two))) == two
    assert states_of(SimpleNamespace(kv_cache=[tuple(two)])) == two, "for a virtual engine"
    # A gated delta net's on a CPU: keys by values in memory, whatever vLLM calls them.
    _, state = states_of(SimpleNamespace(kv_cache=two), "MambaAttentionBackendEnum.GDN_ATTN")
    assert state.shape == (BLOCKS, 4, 5, 6)
    assert torch.equal(state[1, 2], two[1][1, 2].reshape(6, 5).T)
    with pytest.raises(LayoutError, match="no states of its own"):
        states_of(SimpleNamespace(kv_cache=torch.zeros(3)))
    with pytest.raises(LayoutError, match="no states of its own"):
        states_of(SimpleNamespace())
    turned = two[0].transpose(1, 2)
    monkeypatch.setattr(paged_states.mamba_utils, "is_conv_state_dim_first", lambda: True)
    conv, state = states_of(SimpleNamespace(kv_cache=[turned, two[1]]))
    assert torch.equal(conv, two[0]) and state is two[1]


@pytest.mark.parametrize(("rank", "sends"), [(0, True), (1, False)])
def test_one_rank_sends_the_latent_that_all_have(
    monkeypatch: pytest.MonkeyPatch, rank: int, sends: bool
) -> None:
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    monkeypatch.setattr(worker_layers, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(worker_layers, "get_tensor_model_parallel_world_size", lambda: 2)
    cache = torch.zeros(4, 16, 576)

    def update(
        latent: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, *_: Any
    ) -> None:
        cache.view(-1, 576)[slots] = torch.cat([latent, rope.squeeze(1)], dim=-1)

    layer = SimpleNamespace(
        impl=SimpleNamespace(do_kv_cache_update=update),
        kv_lora_rank=512, qk_rope_head_dim=64, kv_cache_dtype="auto",
    )  # fmt: skip
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            get_total_num_kv_heads=lambda: 128,
            dtype=torch.float32,
            hf_text_config=SimpleNamespace(num_hidden_layers=1),
        ),
        cache_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context={"model.layers.0.attn": layer}),
    )
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["model.layers.0.attn"])
    caches = SimpleNamespace(kv_cache_groups=[group], num_blocks=4)
    found = worker_layers.exported_layers(config, caches, {"model.layers.0.attn": cache})  # type: ignore[arg-type]
    (one,) = found.values()
    assert one.sends is sends
    widths = [(part.name, part.heads, part.width) for part in one.layout.parts]
    assert widths == [("keys", 1, 512), ("values", 1, 64)]
    assert one.head_start == 0
