"""Caches of 8-bit floats: found in vLLM's memory, sent as they are, and read with their scales."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_receiver.caches.adapter import numbers as decoded
from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.wire.layout import FULL, Part, full_attention, merged
from mlx_receiver.wire.messages import Open
from mlx_receiver.wire.sampling import Sampling
from tests.vllm_mac_decode.ranks import BLOCK, DIM, HEADS, LAYERS, Request, Store
from tests.vllm_mac_decode.worker.test_paged_layout import BLOCKS, Case
from tests.waiting import eventually
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker.exporter import Exporter
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.numbers import Numbers, numbers_of
from vllm_mac_decode.worker.paged_cache import ExportedLayer, LayoutError
from vllm_mac_decode.worker.paged_layout import PagedLayout, PlaneMap

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FINITE = {
    E4M3: [code for code in range(256) if code & 127 != 127],
    E5M2: [code for code in range(256) if code & 127 < 124],
}
SCALES = [(1.0, 1.0), (0.037, 2.5)]


@pytest.mark.parametrize("stored", [E4M3, E5M2], ids=str)
def test_every_number_is_read_as_torch_reads_it(stored: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    part = Part("keys", 1, 256, Numbers(stored, torch.float32).name, scale=0.25)  # type: ignore[arg-type]
    got = np.array(decoded(mx.array(codes.numpy()), part, mx.float32))
    np.testing.assert_array_equal(got, (codes.view(stored).float() * 0.25).numpy())


def backend(stored: torch.dtype, scales: tuple[float, float], spoilt: bool = False) -> Case:
    """vLLM's own CPU cache update on its own cache shape, of bfloat16 keys and values."""
    ops = pytest.importorskip("vllm._custom_ops")
    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        pytest.skip("this vLLM was not built for the CPU")
    if not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM has 8-bit caches on CPUs with AVX-512 only")
    name = "fp8_e4m3" if stored == E4M3 else "fp8_e5m2"
    cache = torch.zeros(BLOCKS, 3, 64, 2 * 64, dtype=torch.uint8)

    def update(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        planes = cache.view(cache.shape[0], 3, 2 * 64, -1).chunk(2, dim=2)
        k_scale = scales[0] * (1.5 if spoilt else 1.0)
        ops.cpu_attn_reshape_and_cache(k, v, *planes, slots, "vec", k_scale, scales[1], name)

    return Case(cache, update, 64, 64, numbers=Numbers(stored, torch.bfloat16, scales))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("stored", [E4M3, E5M2], ids=str)
def test_what_vllms_own_kernel_wrote_is_read_back(
    stored: torch.dtype, scales: tuple[float, float]
) -> None:
    case = backend(stored, scales)
    layout = case.probe()
    assert [part.scale for part in layout.parts] == list(scales)
    assert {part.row_bytes for part in layout.parts} == {64}
    tokens = BLOCKS * 64
    written = [torch.randn(tokens, 3, 64).bfloat16() * scale for scale in scales]
    case.update(*written, case.cache, torch.arange(tokens))
    out = torch.empty(2 * 3 * BLOCKS * 64 * 64, dtype=torch.uint8)
    layout.read(case.cache, torch.arange(BLOCKS), out)
    for data, got, scale in zip(written, layout.planes(out, BLOCKS), scales, strict=True):
        numbers = (got.view(stored).float() * scale).flatten(1, 2).transpose(0, 1)
        # Less than the last bit, of three or two beside the leading one.
        apart = (numbers - data.float()).abs() / (data.float().abs() + 0.02 * scale)
        assert apart.max() < (0.125 if stored == E4M3 else 0.25)


def test_a_gpu_gathers_8_bit_floats_as_bytes() -> None:
    case = backend(E4M3, (1.0, 1.0))
    layout = case.probe()
    case.cache.random_(0, 256)
    ids = torch.tensor([7, 2, 9])
    size = (2, 3, 3, 64, 64)
    by_numpy, by_torch = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    layout.gather(case.cache, ids, (by_numpy[0], by_numpy[1]))
    layout._gather_on_gpu(case.cache, ids, (by_torch[0], by_torch[1]))
    assert torch.equal(by_numpy, by_torch)
    assert by_numpy.any()


def test_another_scale_than_the_layer_says_is_refused() -> None:
    with pytest.raises(LayoutError):
        backend(E4M3, (0.037, 2.5), spoilt=True).probe()


@pytest.mark.parametrize(
    ("attention", "dtype", "reason"),
    [
        ({"kv_cache_dtype": "nvfp4"}, torch.uint8, "nvfp4 .*use --kv-cache-dtype auto"),
        ({"kv_cache_dtype": "fp8_per_token_head"}, torch.uint8, "fp8_per_token_head"),
        ({}, torch.int8, "torch.int8"),
        ({"kv_cache_dtype": "fp8", "calculate_kv_scales": True}, torch.uint8, "--calculate-kv"),
        ({"kv_cache_dtype": "fp8", "_k_scale": torch.ones(4)}, torch.uint8, "4 scales"),
    ],
)
def test_other_quantisations_are_refused_with_advice(
    attention: dict[str, Any], dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(LayoutError, match=reason):
        numbers_of(SimpleNamespace(**attention), torch.zeros(1, dtype=dtype), torch.bfloat16)


def test_the_scales_are_the_layers_own() -> None:
    attention = SimpleNamespace(
        kv_cache_dtype="fp8", _k_scale=torch.tensor(0.5), _v_scale_float=0.25, _v_scale=None
    )
    found = numbers_of(attention, torch.zeros(1, dtype=torch.uint8), torch.bfloat16)
    assert found == Numbers(E4M3, torch.bfloat16, (0.5, 0.25))
    plain = numbers_of(SimpleNamespace(), torch.zeros(1), torch.bfloat16)
    assert plain == Numbers(torch.float32, torch.float32)


@pytest.mark.parametrize("stored", [E4M3, E5M2], ids=str)
def test_the_receivers_cache_holds_exactly_what_vllms_attention_reads(stored: torch.dtype) -> None:
    request = Request(100, [9, 3, 4, 11, 7, 21, 2])
    row = HEADS * 2 * DIM
    layout = PagedLayout(
        blocks=32, block_size=BLOCK, heads=HEADS, widths=(DIM, DIM),
        numbers=Numbers(stored, torch.bfloat16), block_stride=BLOCK * row,
        keys=PlaneMap(0, (2 * DIM, row, 1), None), values=PlaneMap(DIM, (2 * DIM, row, 1), None),
    )  # fmt: skip
    finite = torch.tensor(FINITE[stored], dtype=torch.uint8)
    layers = {}
    for index in range(LAYERS):
        cache = finite[torch.randint(0, len(finite), (32, BLOCK, HEADS, 2 * DIM))]
        scales = (0.5 + index, 0.003 * (1 + index))
        scaled = replace(layout, numbers=Numbers(stored, torch.bfloat16, scales))
        layers[f"layers.{index}"] = ExportedLayer(index, cache, scaled, 0, FULL, BLOCK)
    sent = merged([{layer.index: layer.described() for layer in layers.values()}])
    own = full_attention(LAYERS, HEADS, DIM, "float32")
    assert own.differences(sent) == []
    assert 4 * sent.nbytes(100) == own.nbytes(100)
    store = Store()
    exporter = Exporter(layers, Settings(), BlockLedger())
    try:
        opening = Open(request.session, request.id, [1] * 100, Sampling(max_tokens=2))
        session = store.open(opening, store, sent)
        for start, end in [(0, 30), (30, 100)]:
            exporter.begin_step([request.span(start, end)], [], {request.session: store.target})
            for name in layers:
                exporter.layer_written(name)
            exporter.end_step()
        assert eventually(lambda: request.session in store.completed), store.failures
        assert session.kv_bytes == sent.nbytes(100)
        built = session.take_memory().build()
        for index, cache in enumerate(built):
            rows = layers[f"layers.{index}"].cache[request.blocks].flatten(0, 1)[:100]
            numbers = rows.view(stored).float().unflatten(-1, (2, DIM))
            for plane, array in enumerate(ModelCache(own, [PlainKV()]).parts(index, cache, 100)):
                scale = torch.tensor(sent.layers[index].parts[plane].scale, dtype=torch.float32)
                expected = (numbers[:, :, plane] * scale).transpose(0, 1)
                np.testing.assert_array_equal(np.array(array), expected.numpy())
    finally:
        exporter.close()
        store.stop()
