"""What models ask of a machine, beside what is published of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_receiver.planning import models
from mlx_receiver.planning.published import PUBLISHED, Published
from mlx_receiver.planning.shapes import kv_bytes, layout_of, wire_dtypes
from mlx_receiver.wire.layout import NOTHING, Held

LLAMA = next(one.config for one in PUBLISHED if one.name == "Llama-3.1-8B")


#: Parameters of all, and those that a token passes through, embedding and output matrix included
#: where the publishers count them: 10^9.
@pytest.mark.parametrize(
    ("name", "total", "active", "with_head"),
    [
        ("Llama-3.1-8B", 8.03, 7.5, True),  # less the embedding's 0.53
        ("Qwen3-Coder-30B-A3B", 30.5, 3.3, True),
        ("Qwen3-235B-A22B", 235, 22, True),
        ("GLM-4.5-Air", 106, 12, False),
        ("MiniMax-M2", 230, 10, True),
        ("Ministral-3-8B", 8.4, 7.9, True),  # less 0.54
        ("Mistral-Small-24B", 23.6, 22.9, True),  # less 0.67
        ("gpt-oss-20b", 20.9, 3.6, True),
        ("gpt-oss-120b", 116.8, 5.1, True),
        ("GLM-4.7-Flash", 30, 3, False),
        ("Qwen3-Next-80B-A3B", 80, 3, False),
        ("Qwen3.5-27B", 27, 25.7, True),  # less 1.27
        ("Qwen3.5-35B-A3B", 35, 3, True),
        ("Qwen3.5-122B-A10B", 122, 9.2, True),  # less 0.76
    ],
)
def test_parameters_are_those_that_are_published(
    name: str, total: float, active: float, with_head: bool
) -> None:
    weights = models.find(name).weights
    assert (weights.dense + weights.experts + 2 * weights.head) / 1e9 == pytest.approx(
        total, rel=0.015
    )
    used = weights.dense + weights.routed + (weights.head if with_head else 0)
    assert used / 1e9 == pytest.approx(active, rel=0.09)


def test_llamas_attention() -> None:
    model = models.find("meta-llama/llama-3.1-8b")
    assert model.name == "Llama-3.1-8B"
    assert model.pair == 4 * 32 * 128 * 32  # two products, 32 heads of 128, 32 layers
    assert model.layout.every_token
    nbytes = kv_bytes(model.layout)
    assert nbytes(0, 8192) == 131_072 * 8192
    assert nbytes(8000, 8192) == 131_072 * 192
    assert nbytes(8192, 8192) == 0
    assert model.context_bytes == 131_072
    assert model.step_bytes == pytest.approx(15.01e9, rel=1e-3)


def test_windows_cost_a_token_the_same_at_any_length() -> None:
    model = models.find("gpt-oss-120b")
    layer = 4 * 64 * 64
    assert model.pair == 18 * layer
    assert model.token == 18 * layer * 128
    assert not model.layout.every_token
    assert model.context_bytes == 36_864  # of the layers without a window


def test_experts_alone_are_in_4_bits() -> None:
    model = models.find("gpt-oss-120b")
    assert (model.dense_bits, model.expert_bits) == (16, 4.25)
    assert model.nbytes / 1e9 == pytest.approx(65.2, abs=0.5)  # as its checkpoint
    assert model.routers == 36


def test_states_travel_whatever_is_held() -> None:
    nbytes = kv_bytes(models.find("Qwen3.5-35B-A3B").layout)
    states = nbytes(8192, 8192)
    assert states > 60e6
    assert nbytes(0, 8192) - states == 20_480 * 8192


@pytest.mark.parametrize("one", PUBLISHED, ids=[one.name for one in PUBLISHED])
def test_bytes_that_travel_are_the_layouts(one: Published) -> None:
    layout = layout_of(one.config, *wire_dtypes(one.config, "bfloat16"))
    nbytes = kv_bytes(layout)
    for start, end in ((0, 1), (0, 5000), (1, 1), (100, 5000), (4999, 5000), (5000, 5000)):
        held = Held(start, bounded=True) if start else NOTHING
        assert nbytes(start, end) == layout.nbytes(end, held=held)


def config(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "Some-Model"
    path.mkdir(exist_ok=True)
    made = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(made))
    return str(path)


def test_a_folder_with_a_configuration(tmp_path: Path) -> None:
    model = models.find(config(tmp_path))
    assert model.name == "Some-Model"
    assert model.weights == models.find("Llama-3.1-8B").weights
    assert models.find(config(tmp_path) + "/config.json").name == "Some-Model"


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({"quantization": {"bits": 4, "group_size": 64}}, 4.5),
        ({"quantization": {"bits": 8, "group_size": 32}}, 9),
        ({"quantization_config": {"quant_method": "fp8"}}, 8),
        ({}, 16),
    ],
)
def test_bits_of_the_weights(tmp_path: Path, changes: dict[str, Any], bits: float) -> None:
    folder = config(tmp_path, **changes)
    model = models.find(folder)
    assert (model.dense_bits, model.expert_bits) == (bits, bits)
    assert model.nbytes == pytest.approx(8.03e9 * bits / 8, rel=1e-3)
    assert models.find(folder, 5).dense_bits == 5


def test_a_tied_embedding_is_there_once(tmp_path: Path) -> None:
    tied = models.find(config(tmp_path, tie_word_embeddings=True))
    apart = models.find(config(tmp_path))
    assert apart.nbytes - tied.nbytes == 2 * 128_256 * 4096


def test_latent_attention() -> None:
    """DeepSeek-V3, 671 billion parameters of which 37 are used."""
    published = next(one.config for one in PUBLISHED if one.name == "DeepSeek-V3")
    more = {
        "hidden_size": 7168, "vocab_size": 129_280, "intermediate_size": 18_432,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "v_head_dim": 128,
    }  # fmt: skip
    model = models.from_config("DeepSeek-V3", published | more)
    weights = model.weights
    assert (weights.dense + weights.experts + 2 * weights.head) / 1e9 == pytest.approx(
        671, rel=0.01
    )
    assert (weights.dense + weights.routed + weights.head) / 1e9 == pytest.approx(37, rel=0.02)
    assert model.pair == 61 * 128 * 2 * (192 + 128)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "lacks hidden_size: give the path of its config.json"),
        ({"intermediate_size": None}, "no usable 'intermediate_size'"),
        ({"num_hidden_layers": "many"}, "no usable 'num_hidden_layers'"),
        ({"conv_L_cache": 3}, "short convolutions"),
        ({"global_head_dim": 512}, "layers of two widths"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    ],
)
def test_what_cannot_be_counted_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="^Some-Model: .*" + said):
        models.find(config(tmp_path, **changes))


def test_what_is_there_goes_before_a_published_model_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    published = models.find("Llama-3.1-8B")
    here = tmp_path / "Llama-3.1-8B"
    here.mkdir()
    assert models.find("Llama-3.1-8B") == published, "without a configuration"
    Path(config(tmp_path, num_hidden_layers=2), "config.json").rename(here / "config.json")
    for name in ("Llama-3.1-8B", str(here), str(here / "config.json")):
        assert models.find(name).layers == 2
    assert models.find("meta-llama/Llama-3.1-8B") == published


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model nowhere: give the path.*Llama-3\.1-8B"):
        models.find("nowhere")
    with pytest.raises(ValueError, match="DeepSeek-V3: its configuration lacks"):
        models.find("DeepSeek-V3")
    broken = tmp_path / "config.json"
    for text in ("{", "[]"):
        broken.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            models.find(str(tmp_path))
