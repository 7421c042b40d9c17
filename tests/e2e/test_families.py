"""Families of models: what is handed off is decoded as MLX alone decodes it, token by token."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_receiver.planning.shapes import layout_of
from mlx_receiver.wire.layout import Held
from tests.conftest import cached_family
from tests.e2e.handing_off import (
    GATED,
    OPTIONS,
    OUTPUT,
    PROMPTS,
    THEN,
    Offline,
    Outcome,
    hand_off,
)
from tests.families import FAMILIES, NOT_COMPARED, WINDOW
from tests.mlx_alone import Float8Prompt, greedy
from tests.servers import start_receiver

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offline]:
    made = Offline(tmp_path_factory.mktemp("offline") / "vllm.log")
    yield made
    made.close()


#: Of each kind; the others on request, since each takes half a minute.
USUAL = {"gpt_oss", "qwen3_moe", "gemma4", "llama4", "nemotron_h", "falcon_h1", "deepseek_v3"}
ALL = bool(os.environ.get("MAC_DECODE_ALL_FAMILIES"))


#: What Qwen3-VL has and Qwen3 has not: a rotation by three positions, which are one in a text.
QWEN3_VL = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0,
                        "mrope_section": [6, 5, 5], "mrope_interleaved": True},
}  # fmt: skip

#: The same of Qwen2.5-VL and Qwen2, in the older spelling.
QWEN2_VL = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0,
                        "mrope_section": [4, 6, 6]},
}  # fmt: skip

#: By Dynamo alone: no kernel is made.
TRACED = {"compilation_config": {"mode": 2, "backend": "eager"}}


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in NOT_COMPARED and (ALL or name in USUAL)]
)
def test_tokens_are_those_of_mlx_alone(family: str, offline: Offline, tmp_path: Path) -> None:
    as_mlx_alone(hand_off(family, offline, tmp_path), offline)


@pytest.mark.skipif(not ALL, reason="each takes half a minute (MAC_DECODE_ALL_FAMILIES=1)")
@pytest.mark.parametrize(
    ("family", "others"),
    [
        ("gemma3", {}),
        ("gemma4", {}),
        ("ministral3", {}),
        ("llama4", {}),
        ("qwen3", QWEN3_VL),
        ("qwen2", QWEN2_VL),
    ],
)
def test_models_that_also_see(
    family: str, others: dict[str, Any], offline: Offline, tmp_path: Path
) -> None:
    """As they are published: in vLLM another class than that for text alone."""
    as_mlx_alone(hand_off(family, offline, tmp_path, published=True, **others), offline)


@pytest.mark.skipif(not ALL, reason="each takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
@pytest.mark.parametrize(
    "family",
    ["gemma4", "deepseek_v3", "nemotron_h", "falcon_h1", "granitemoehybrid", "lfm2"],
)
def test_two_ranks(family: str, offline: Offline, tmp_path: Path) -> None:
    """Each sends its heads and its channels; a latent and a group, which both have, one."""
    options = {"tensor_parallel_size": 2} | OPTIONS.get(family, {})
    as_mlx_alone(hand_off(family, offline, tmp_path, options), offline)


@pytest.mark.skipif(not ALL, reason="each takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
@pytest.mark.parametrize("family", ["mistral", "nemotron_h"])
def test_two_stages(family: str, offline: Offline, tmp_path: Path) -> None:
    """Each sends its layers, also where some in between have no cache. vLLM 0.32's CPU build makes
    what the second stage needs only when it compiles a model, and takes no stage without attention.
    """
    others = {"hybrid_override_pattern": "M*-M*-"} if family == "nemotron_h" else {}
    options = {"pipeline_parallel_size": 2, "enforce_eager": False} | TRACED
    as_mlx_alone(hand_off(family, offline, tmp_path, options, **others), offline)


@pytest.mark.skipif(not ALL, reason="it takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
def test_two_stages_of_two_ranks(offline: Offline, tmp_path: Path) -> None:
    """Each of four workers sends its heads of its layers."""
    options = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enforce_eager": False}
    as_mlx_alone(hand_off("llama", offline, tmp_path, options | TRACED), offline)


@pytest.mark.skipif(not ALL, reason="each takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_a_gated_delta_net_by_vllms_kernels(family: str, offline: Offline, tmp_path: Path) -> None:
    """They know bf16 only: by the proof, as tokens differ where two are nearly as likely."""
    outcome = hand_off(family, offline, tmp_path, dtype="bfloat16")
    assert outcome.handed_off == outcome.wanted, offline.said()
    assert "4 layers compared" in outcome.log
    as_announced(outcome, "bfloat16")


@pytest.mark.skipif(not ALL, reason="each takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
@pytest.mark.parametrize("family", GATED)
def test_a_gated_delta_net_in_two_ranks(family: str, offline: Offline, tmp_path: Path) -> None:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    options = {"tensor_parallel_size": 2}
    as_mlx_alone(hand_off(family, offline, tmp_path, options, **heads), offline)


def as_mlx_alone(outcome: Outcome, offline: Offline) -> None:
    assert outcome.tokens == outcome.by_mlx_alone
    assert outcome.handed_off == outcome.wanted, offline.said()
    as_announced(outcome, "float32")


def as_announced(outcome: Outcome, dtype: str) -> None:
    """As many bytes have come as ``docs/models.md`` computes for a model of that shape; in the
    second turn, of the first one's tokens none, but for the last where rows are decoded alone. The
    receiver decodes in fp32, and of what comes in other numbers it keeps nothing."""
    config = json.loads((outcome.model / "config.json").read_text())
    layout = layout_of(config, dtype, "float32")  # vLLM's CPU build keeps states in fp32
    came = {h["prompt_tokens"]: h for h in outcome.handoffs if h["output_tokens"]}
    for prompt in PROMPTS:
        more = len(prompt) + OUTPUT + len(THEN)
        first, second = came.pop(len(prompt)), came.pop(more)
        held = second["held_tokens"]
        kept = (more - len(THEN) - 1, more - len(THEN)) if dtype == "float32" else (0,)
        assert first["held_tokens"] == 0 and held in kept
        assert first["kv_bytes"] == layout.nbytes(len(prompt))
        assert second["kv_bytes"] == layout.nbytes(more, held=Held(held, bounded=True))
    assert all(h["kv_bytes"] == layout.nbytes(tokens) for tokens, h in came.items())


def test_a_window_that_mlx_does_not_know(offline: Offline, tmp_path: Path) -> None:
    """MLX's Mistral attends to everything: what is longer than the window is vLLM's."""
    model = cached_family("mistral-window")
    expected, answer = offline.alone_and_together(
        model, tmp_path / "receiver.log", prompts=PROMPTS, tokens=OUTPUT
    )
    assert answer["tokens"] == expected
    # Of the shortest one alone, up to the end of the window.
    assert answer["handed_off"] == WINDOW - len(PROMPTS[0]) - 1


def test_a_cache_of_8_bit_floats(offline: Offline, tiny_llama_path: Path, tmp_path: Path) -> None:
    """What MLX decodes from is what vLLM's attention read: the prompt's K and V after rounding."""
    receiver = start_receiver(tiny_llama_path, tmp_path / "receiver.log")
    order = {"model": str(tiny_llama_path), "prompts": PROMPTS, "tokens": OUTPUT}
    try:
        answer = offline.run(
            receiver=receiver.address, options={"kv_cache_dtype": "fp8_e4m3"}, **order
        )
    finally:
        receiver.server.stop()
    assert answer["tokens"] == greedy(tiny_llama_path, PROMPTS, OUTPUT, cache=Float8Prompt)
    assert answer["tokens"] != greedy(tiny_llama_path, PROMPTS, OUTPUT)
    assert answer["handed_off"] == len(PROMPTS) * (OUTPUT - 1)
    assert "KV in float8_e4m3" in receiver.server.log.read_text()
