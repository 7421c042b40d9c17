"""Tensor parallelism: what each rank keeps of a recurrent layer's states, cut by vLLM's own rules,
is the model's again in the receiver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import ArraysCache
from vllm.model_executor.layers.mamba.mamba_mixer2 import mamba_v2_sharded_weight_loader
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes

from mlx_receiver.caches.model import ModelCache
from mlx_receiver.wire.layout import FULL, RECURRENT, LayerLayout, Part, merged
from mlx_receiver.wire.messages import Open
from mlx_receiver.wire.sampling import Sampling
from tests.vllm_mac_decode.ranks import Store
from tests.waiting import eventually
from vllm_mac_decode.export import ExportSpan
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker.exporter import Exporter
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.paged_cache import ExportedLayer, PagedPart, Run, described
from vllm_mac_decode.worker.paged_layout import LayoutError
from vllm_mac_decode.worker.paged_states import PagedStates
from vllm_mac_decode.worker.state_shards import Shard, shard_of

BLOCK, BLOCKS, TOKENS, LAST = 8, 4, 20, 2
KERNEL, STATE, HEAD = 4, 6, 5


class Kind:
    """A recurrent layer of the model: its attributes in vLLM, what vLLM's loader of the
    convolution's weight gets, and the shapes of a rank's states."""

    def __init__(self, mamba_type: str, spec: Any, shapes: Any, **attributes: Any) -> None:
        self.mamba_type, self.spec, self.shapes = mamba_type, spec, shapes
        self.layer = SimpleNamespace(**attributes)

    def cut(self, full: list[torch.Tensor], rank: int, size: int) -> list[torch.Tensor]:
        """The rank's part of a text's states."""
        shapes = self.shapes(size)
        turned = torch.full(shapes[0][::-1], torch.nan)  # channels come first in weights
        load = mamba_v2_sharded_weight_loader(self.spec(size), size, rank)
        load(turned, full[0].T.contiguous())
        found = [turned.T]
        for state, shape in zip(full[1:], shapes[1:], strict=True):
            found.append(state[rank * shape[0] : (rank + 1) * shape[0]])
        assert [tuple(state.shape) for state in found] == list(shapes)
        return found


def mamba2(groups: int) -> Kind:
    heads = 8

    def spec(size: int) -> Any:
        extra = Shapes.extra_groups_for_head_shards(groups, size)
        group = ((groups + extra) * STATE, extra * STATE, groups == 1)
        return [(heads * HEAD, 0, False), group, group]

    def shapes(size: int) -> Any:
        return Shapes.mamba2_state_shape(size, heads * HEAD, groups, heads, HEAD, STATE, KERNEL)

    norm = SimpleNamespace(n_groups=groups)
    return Kind(
        "MambaAttentionBackendEnum.MAMBA2", spec, shapes,
        intermediate_size=heads * HEAD, ssm_state_size=STATE, norm=norm,
    )  # fmt: skip


def gated_delta_net(keys: int = 4, values: int = 8) -> Kind:
    def spec(size: int) -> Any:
        return [(keys * STATE, 0, False)] * 2 + [(values * HEAD, 0, False)]

    def shapes(size: int) -> Any:
        return Shapes.gated_delta_net_state_shape(size, keys, values, STATE, HEAD, KERNEL)

    return Kind(
        "MambaAttentionBackendEnum.GDN_ATTN", spec, shapes, num_k_heads=keys, num_v_heads=values,
        key_dim=keys * STATE, value_dim=values * HEAD,
    )  # fmt: skip


KINDS = {
    "Mamba 2": mamba2(groups=4),
    "Mamba 2, one group": mamba2(groups=1),
    "gated delta net": gated_delta_net(),
    "Mamba 1": Kind(
        "mamba1", lambda size: [(48, 0, False)],
        lambda size: Shapes.mamba1_state_shape(size, 48, STATE, KERNEL),
    ),
    "short convolution": Kind(
        "MambaAttentionBackendEnum.SHORT_CONV", lambda size: [(48, 0, False)],
        lambda size: Shapes.short_conv_state_shape(size, 48, KERNEL),
    ),
}  # fmt: skip


def of_rank(kind: Kind, layers: list[list[torch.Tensor]], rank: int, size: int) -> Any:
    """The rank's layers; each text's states are in block LAST."""
    found = {}
    for index, full in enumerate(layers):
        states = []
        for own in kind.cut(full, rank, size):
            cache = torch.full((BLOCKS, *own.shape), torch.nan)
            cache[LAST] = own
            states.append(cache)
        shard = shard_of(kind.layer, states, kind.mamba_type, rank, size)
        layout = PagedStates.of(states, BLOCK, shard.runs)
        found[f"layers.{index}"] = ExportedLayer(
            index, states, layout, shard.head_start, RECURRENT, BLOCK
        )
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_ranks_together_send_the_models_states(name: str, size: int) -> None:
    kind = KINDS[name]
    layers = [[torch.randn(shape) for shape in kind.shapes(1)] for _ in range(2)]
    ranks = [of_rank(kind, layers, rank, size) for rank in range(size)]
    layout = merged([described(list(rank.values())) for rank in ranks])
    # What mlx-lm keeps of the same layers.
    caches = [ArraysCache(len(full)) for full in layers]
    for cache, full in zip(caches, layers, strict=True):
        cache.cache = [mx.array(state.numpy())[None] for state in full]
    model = ModelCache.of(caches)
    assert model.layout.differences(layout) == []

    store = Store()
    store.configure(model, 1 << 24)
    exporters = [Exporter(rank, Settings(), BlockLedger()) for rank in ranks]
    try:
        session = store.open(Open(3, "r", [1] * TOKENS, Sampling(max_tokens=2)), store, layout)
        for exporter in exporters:
            assert not store.completed
            span = ExportSpan(3, "r", 0, TOKENS, TOKENS, [[0, 1, LAST]])
            exporter.begin_step([span], [], {3: store.target})
            exporter.end_step()
        assert eventually(lambda: 3 in store.completed), store.failures
        numbers = sum(state.numel() for full in layers for state in full)
        assert session.kv_bytes == 4 * numbers
        assert session.timeline.duplicate_blocks == 0, "what all have is sent once"
        for got, full in zip(session.take_memory().build(), layers, strict=True):
            for array, state in zip(got.cache, full, strict=True):
                np.testing.assert_array_equal(np.array(array)[0], state.numpy())
    finally:
        for exporter in exporters:
            exporter.close()
        store.stop()


def shard(kind: Kind, rank: int, size: int) -> Shard:
    states = [torch.zeros(BLOCKS, *shape) for shape in kind.shapes(size)]
    return shard_of(kind.layer, states, kind.mamba_type, rank, size)


def test_one_rank_sends_the_only_group() -> None:
    x, group = 40, STATE
    assert shard(mamba2(groups=1), 0, 2).runs == (
        Run(0, 0, x // 2), Run(x // 2, x, group), Run(x // 2 + group, x + group, group),
    )  # fmt: skip
    assert shard(mamba2(groups=1), 1, 2).runs == (Run(0, x // 2, x // 2),)


def test_a_single_worker_has_everything() -> None:
    assert shard(mamba2(groups=4), 0, 1) == Shard(None, 0)
    assert shard_of(SimpleNamespace(), [torch.zeros(1, 2, 3)], "no such kind", 0, 1) == Shard()


def test_a_layer_without_a_convolution() -> None:
    state = torch.zeros(BLOCKS, 3, 5, 5)
    assert shard_of(SimpleNamespace(), [state], "LINEAR", 2, 4) == Shard(None, 6)


@pytest.mark.parametrize(
    ("kind", "states", "size", "reason"),
    [
        (mamba2(groups=4), [(3, 10)], 8, "the 4 groups .* not divided evenly among 8"),
        (gated_delta_net(3, 6), [(3, 10)], 2, "the 3 key heads .* among 2 tensor-parallel"),
        (gated_delta_net(2, 3), [(3, 10)], 2, "the 3 value heads"),
        (Kind("LINEAR", None, None), [(3, 10)], 2, "of the kind LINEAR .* not known"),
        (Kind("MAMBA2", None, None), [(3, 10)], 2, "is not known: .*norm"),
        (mamba2(groups=4), [(3, 10)], 2, "keeps 10 channels .* each of 2 workers, not 44"),
        (mamba2(groups=4), [(3, 44), (4, 5, 6), (2, 5, 6)], 2, "different numbers of heads"),
    ],
)
def test_what_is_divided_otherwise_is_refused(
    kind: Kind, states: list[tuple[int, ...]], size: int, reason: str
) -> None:
    tensors = [torch.zeros(BLOCKS, *shape) for shape in states]
    with pytest.raises(LayoutError, match=reason):
        shard_of(kind.layer, tensors, kind.mamba_type, 0, size)


def test_who_does_not_send_kv_describes_it() -> None:
    """A rank that has another one's KV heads has recurrent heads of its own."""
    kind = mamba2(groups=4)
    full = [torch.randn(shape) for shape in kind.shapes(1)]
    keys: Any = SimpleNamespace(block_size=BLOCK, parts=[PagedPart("keys", 1, 4, "float32")])
    pieces = []
    for rank in range(2):
        (states,) = of_rank(kind, [full], rank, 2).values()
        attention = ExportedLayer(
            0, torch.zeros(1), keys, 0, FULL, BLOCK, first_part=2, sends=rank == 0
        )
        pieces.append(described([states, attention]))
    (layer,) = merged(pieces).layers
    conv, state = kind.shapes(1)
    assert layer == LayerLayout("recurrent+full", [
        Part("0.state0", conv[0], 1, "float32", False, rows=conv[1]),
        Part("0.state1", state[0], 30, "float32", False, dims=[5, 6]),
        Part("1.keys", 1, 4, "float32"),
    ])  # fmt: skip
