"""Machines' constants: each share from the published figure that it stands for, and what they
give together for the published demo, which is none of those."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_receiver.planning import models, topology
from mlx_receiver.planning.cost import Strategy
from mlx_receiver.planning.hardware import DEVICES, LINKS
from mlx_receiver.planning.models import Model
from mlx_receiver.planning.plan import plan
from mlx_receiver.planning.published import PUBLISHED

SPARK, ULTRA = DEVICES["spark"], DEVICES["m3-ultra"]


def dense(
    name: str, layers: int, hidden: int, inner: int, heads: tuple[int, int, int], words: int
) -> Model:
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": inner, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "head_dim": heads[2], "vocab_size": words,
    }  # fmt: skip
    return models.from_config(name, config)


QWEN3_8B = dense("Qwen3-8B", 36, 4096, 12_288, (32, 8, 128), 151_936)
LLAMA_7B = dense("LLaMA-7B", 32, 4096, 11_008, (32, 32, 128), 32_000)
#: Its windows make no difference to a short text.
GEMMA_3_12B = dense("Gemma-3-12B", 48, 3840, 15_360, (16, 8, 256), 262_208)


def small_oss(bits: float | None = None) -> Model:
    big = next(one.config for one in PUBLISHED if one.name == "gpt-oss-120b")
    smaller = {
        "num_hidden_layers": 24, "num_local_experts": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    }  # fmt: skip
    return models.from_config("gpt-oss-20b", big | smaller, bits)


def test_the_sparks_matrices() -> None:
    assert SPARK.matrices == pytest.approx((1908 - 1117) * 2 * 8192**3 / 9.1 / 100e12, rel=0.01)


def test_the_sparks_bandwidth() -> None:
    assert SPARK.reads == pytest.approx(13.1 * QWEN3_8B.step_bytes / 273e9, rel=0.01)
    assert SPARK.passes == pytest.approx((231 + 234) / 2 / 273, rel=0.01)


def test_the_sparks_experts() -> None:
    prefill = SPARK.profile(models.find("Qwen3.5-35B-A3B")).prefill
    assert 8192 / prefill.seconds(8192) == pytest.approx(6265, rel=0.02)
    decode = SPARK.profile(models.find("gpt-oss-120b")).decode
    assert 1 / decode.seconds(1000) == pytest.approx(33.5, rel=0.03)


def test_the_ultras_matrices() -> None:
    assert ULTRA.matrices == pytest.approx(18.7 / (26 * 60 / 80), rel=0.01)
    assert 0.88 <= ULTRA.attention / ULTRA.matrices <= 0.95


def test_the_macs_bandwidth() -> None:
    assert ULTRA.reads == pytest.approx(28.09 * GEMMA_3_12B.step_bytes / 819e9, rel=0.01)
    assert ULTRA.passes == pytest.approx(669 / 819, rel=0.01)
    m4 = LLAMA_7B.step_bytes + 64 * LLAMA_7B.context_bytes
    assert DEVICES["m4-max"].reads == pytest.approx(31.64 * m4 / 546e9, rel=0.01)


def test_the_macs_experts() -> None:
    prefill = ULTRA.profile(small_oss()).prefill
    assert 2048 / prefill.seconds(2048) == pytest.approx(2816, rel=0.02)
    decode = ULTRA.profile(models.find("Qwen3.5-35B-A3B", 8.5)).decode
    assert 1 / decode.seconds(128) == pytest.approx(74.7, rel=0.02)


def test_figures_that_no_share_is_made_of() -> None:
    """They are met from afar: other engines, other bits."""
    llama_cpp = SPARK.profile(models.find("gpt-oss-120b")).prefill.seconds(2048)
    assert 2048 / llama_cpp == pytest.approx(2444, rel=0.3)
    oss = ULTRA.profile(small_oss()).decode
    assert 1 / oss.seconds(64) == pytest.approx(115.5, rel=0.2)
    ultra = ULTRA.profile(LLAMA_7B)
    assert 1 / ultra.decode.seconds(64) == pytest.approx(39.8, rel=0.3)  # llama.cpp
    # Two Sparks, of a model whose weights are 70 billion: 332.7 ms a token alone, 162.4 together.
    one, two = (SPARK.profile(QWEN3_8B, count).decode.seconds(100) for count in (1, 2))
    assert one / two == pytest.approx(332.7 / 162.4, rel=0.05)


# --- the published demo ---------------------------------------------------------------------

PAIR = topology.load("spark+m3-ultra@10gbe").situation("Llama-3.1-8B", 8192, 33).pair
#: Its software drops the token that its prefill produces: 32 tokens are 32 steps.
STEPS = 32


def test_the_published_demo_within_5_percent() -> None:
    """What comes out near enough: the Mac's prefill, and each whole."""
    spark = PAIR.vllm.prefill.seconds(8192), PAIR.vllm.decode.text(8192, STEPS)
    mac = PAIR.mac.prefill.seconds(8192), PAIR.mac.decode.text(8192, STEPS)
    assert mac[0] == pytest.approx(5.57, rel=0.05)
    assert sum(mac) == pytest.approx(5.57 + 0.85, rel=0.05)
    assert sum(spark) == pytest.approx(1.47 + 2.87, rel=0.05)
    assert spark[0] + mac[1] == pytest.approx(1.47 + 0.85, rel=0.05)


def test_what_of_the_published_demo_does_not() -> None:
    """The other parts, by how much: docs/planning.md names the same figures."""
    spark = PAIR.vllm.prefill.seconds(8192) / 1.47, PAIR.vllm.decode.text(8192, STEPS) / 2.87
    mac = PAIR.mac.decode.text(8192, STEPS) / 0.85
    assert spark[0] == pytest.approx(1.075, abs=0.005)
    assert spark[1] == pytest.approx(0.904, abs=0.005)
    assert mac == pytest.approx(0.916, abs=0.005)


def test_the_demo_is_a_split() -> None:
    made = plan(topology.load(topology.DEFAULT).situation("Llama-3.1-8B", 8192, 32))
    assert made.chosen.strategy is Strategy.SPLIT
    assert made.chosen.shown < 0.05


# --- all of them ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DEVICES))
def test_every_device_says_where_its_figures_come_from(name: str) -> None:
    device = DEVICES[name]
    assert device.sources
    for share in (device.matrices, device.attention, device.experts, device.reads, device.passes):
        assert 0 < share <= 1
    profile = device.profile(models.find("Llama-3.1-8B"))
    assert profile.source == "hardware"
    assert profile.bandwidth < device.bandwidth
    assert 0 < profile.kv_bytes < device.memory


def test_several_of_what_is_not_joined() -> None:
    with pytest.raises(ValueError, match="several of M3 Ultra"):
        ULTRA.profile(QWEN3_8B, 2)


def test_two_sparks_are_less_than_twice_as_fast() -> None:
    """Sums over both machines take their time."""
    one, two = (SPARK.profile(QWEN3_8B, count).prefill.seconds(8192) for count in (1, 2))
    assert 1.4 < one / two < 2
    slower = replace(SPARK, peers=1e9).profile(QWEN3_8B, 2).prefill.seconds(8192)
    assert slower > one


def test_links_are_slower_than_their_names() -> None:
    assert LINKS["10gbe"].rate == pytest.approx(1.177e9, rel=1e-3)
    assert LINKS["10gbe"].rate == pytest.approx(10 * LINKS["1gbe"].rate)
    assert LINKS["wi-fi"].rate < LINKS["1gbe"].rate < LINKS["2.5gbe"].rate
    assert LINKS["10gbe"].rate < LINKS["thunderbolt-5"].rate < 10e9
