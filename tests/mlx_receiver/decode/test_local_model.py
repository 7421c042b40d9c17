"""A model that is not handed off: its receiver starts, serves its own API, and says why."""

from __future__ import annotations

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import lfm2
from mlx_lm.utils import load_model as mlx_load

from mlx_receiver.announcement import announcement
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.caches.window import WindowKV
from mlx_receiver.wire.messages import E_MODEL, Rejected
from tests.mlx_receiver.client import FakeVllm, started
from tests.models import TOKENIZER_FILES
from vllm_mac_decode.tools.demo.model import fetch_smollm2

PROMPTS = [[5, 9, 2, 7, 30, 41], list(range(3, 40)), [11] * 5]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short convolutions, which keep a state, beside attention."""
    folder = tmp_path_factory.mktemp("lfm2")
    arguments = lfm2.ModelArgs(
        model_type="lfm2", vocab_size=128, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, norm_eps=1e-5,
        conv_bias=False, conv_L_cache=3, block_dim=64, block_multiple_of=32,
        block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False, intermediate_size=128,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )  # fmt: skip
    mx.random.seed(3)
    model = lfm2.Model(arguments)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(arguments)))
    for file in TOKENIZER_FILES:
        shutil.copyfile(fetch_smollm2() / file, folder / file)
    return folder


def by_mlx(folder: Path, prompt: list[int], count: int) -> list[int]:
    model, _ = mlx_load(folder)
    model.set_dtype(mx.float32)
    tokens = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in tokens]


@pytest.fixture(autouse=True)
def no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows its states."""
    known = [PlainKV(), WindowKV()]
    monkeypatch.setattr("mlx_receiver.caches.model.adapters", lambda: known)


def test_its_own_api_is_served_and_vllm_is_told_why(hybrid: Path) -> None:
    with started(hybrid, http_port=0, dtype="float32") as receiver:
        said = announcement(receiver)
        assert any("hands nothing off" in line and "ArraysCache" in line for line in said)
        assert not any("vllm serve" in line for line in said)
        assert receiver.http is not None
        url = f"http://127.0.0.1:{receiver.http.port}/v1/completions"

        def ask(prompt: list[int]) -> list[int]:
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True,
                    "return_token_ids": True}  # fmt: skip
            tokens: list[int] = httpx.post(url, json=body).json()["choices"][0]["token_ids"]
            return tokens

        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(ask, PROMPTS))
        assert together == [by_mlx(hybrid, prompt, 12) for prompt in PROMPTS]
        client = FakeVllm(receiver)
        try:
            answer = client.hello()
            assert isinstance(answer, Rejected) and answer.code == E_MODEL
            assert "not handed off: layer 0 has a ArraysCache, which no" in answer.reason
        finally:
            client.close()
        assert receiver.store.reserved_bytes == 0


def test_the_unknown_layer_is_named(hybrid: Path) -> None:
    with started(hybrid) as receiver:
        loaded = receiver.engine.loaded
        assert loaded is not None
        assert loaded.local == "layer 0 has a ArraysCache, which no adapter knows"
        layout = loaded.cache.layout
        assert [layer.kind for layer in layout.layers] == ["ArraysCache", "full"] * 2
        assert not layout.layers[0].parts[0].by_token
        assert layout.bytes_per_token == 2 * 2 * 2 * 16 * 4
