"""Sizes that the documents compute are those of caches that were handed off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.lab import RESULTS
from bench.model_table import KEPT, LENGTHS, on_cuda, pages
from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.planning.published import PUBLISHED
from mlx_receiver.planning.shapes import fixed_bytes, layout_of, token_bytes, wire_dtypes
from mlx_receiver.wire.layout import CacheLayout
from tests.conftest import cached_family
from tests.families import FAMILIES, configuration, for_mlx, write

pytest.importorskip("torch", reason="transformers makes the families' models with it")

RUNS = json.loads((RESULTS / "parity_families_cpu.json").read_text())["rows"]


def of_family(family: str, dtype: str = "float32") -> CacheLayout:
    config = configuration(family)
    return layout_of(config, *wire_dtypes(config, dtype))


#: MLX does not know the windows of the first two; of the third's states no published size is
#: computed.
OTHERS = ("mistral-window", "gemma2", "jamba")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in OTHERS])
def test_the_layout_is_what_mlx_allocates(family: str) -> None:
    layout = of_family(family)
    loaded = load_model(find_model(str(for_mlx(family, cached_family(family)))))
    assert not loaded.local
    assert loaded.cache.layout.differences(layout) == []
    assert layout.differences(loaded.cache.layout) == []


def test_keys_that_are_values_are_kept_twice(tmp_path: Path) -> None:
    """As in Gemma 4's larger models, whose layers of full attention have other heads, too."""
    others = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}
    model = write("gemma4", tmp_path / "model", **others)
    layout = layout_of(json.loads((model / "config.json").read_text()), "float32", "float32")
    assert [part.row for part in layout.layers[1].parts] == [64, 64]
    assert load_model(find_model(str(model))).cache.layout.differences(layout) == []


def test_layers_of_experts_keep_nothing(tmp_path: Path) -> None:
    """As in Nemotron 3, whose experts vLLM's CPU build does not have."""
    others = {
        "hybrid_override_pattern": "ME*EME", "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
    }  # fmt: skip
    model = write("nemotron_h", tmp_path / "model", **others)
    layout = layout_of(json.loads((model / "config.json").read_text()), "float32", "float32")
    assert len(layout.layers) == 3
    assert load_model(find_model(str(model))).cache.layout.differences(layout) == []


@pytest.mark.parametrize("row", RUNS, ids=[row["family"] for row in RUNS])
def test_as_many_bytes_came(row: dict[str, Any]) -> None:
    """What the receiver counted for each prompt, in every recorded run. vLLM's CPU build keeps the
    larger states in fp32 whatever the model is in."""
    layout = layout_of(configuration(row["family"]), row["dtype"], "float32")
    for run in row["runs"]:
        assert run["kv_bytes"]
        for tokens, nbytes in run["kv_bytes"].items():
            assert layout.nbytes(int(tokens)) == nbytes


@pytest.mark.parametrize("model", PUBLISHED, ids=[model.name for model in PUBLISHED])
def test_a_long_prompt_is_so_many_bytes_a_token_and_some_once(model: Any) -> None:
    layout = layout_of(model.config, *wire_dtypes(model.config, "bfloat16"))
    assert fixed_bytes(layout) + LENGTHS[-1] * token_bytes(layout) == layout.nbytes(LENGTHS[-1])


#: Others' figures for these models: one token's K and V of all layers, in bf16.
@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("Llama-3.1-8B", 131_072),
        ("DeepSeek-V3", 61 * 576 * 2),
        ("Granite-4.0-H-Small", 16_384),
        ("Llama-4-Scout", 12 * 4096),
    ],
)
def test_known_sizes(name: str, nbytes: int) -> None:
    (model,) = [model for model in PUBLISHED if model.name == name]
    layout = layout_of(model.config, *wire_dtypes(model.config, "bfloat16"))
    assert token_bytes(layout) == nbytes


def test_every_family_has_a_row() -> None:
    types = [kind for kinds in KEPT.values() for kind in kinds]
    assert len(types) == len(set(types))
    assert {model.model_type for model in PUBLISHED} <= set(types)
    named = {name.removesuffix("_text") for name in types}
    assert set(FAMILIES) - {"mistral-window"} <= named


def test_the_pages_have_them() -> None:
    for _, text, wanted in pages(RESULTS):
        assert text == wanted


def test_tokens_behind_a_rounded_cache_are_in_no_table(tmp_path: Path) -> None:
    """``bench.parity_gpu`` writes such rows beside the others."""
    row = {"model": "llama", "dtype": "float32", "equal": 30, "of": 30}
    rounded = row | {"kv_cache_dtype": "fp8", "equal": 3, "vllm_alone_equal": 1,
                     "of_vllm_alone": 10}  # fmt: skip
    rows = [row, row | {"kv_cache_dtype": "auto"}, rounded]
    (tmp_path / "parity_gpu.json").write_text(json.dumps({"rows": rows}))
    assert on_cuda(tmp_path) == {"llama": "30 of 30"}
