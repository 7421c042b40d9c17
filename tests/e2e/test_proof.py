"""Nothing is handed off to a receiver whose model computes another cache, whatever its layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import pytest

from bench.proof import layers_swapped, norm_shifted, rotated, tuned
from tests.mlx_alone import greedy
from tests.servers import start_receiver, start_vllm
from tests.waiting import eventually

pytestmark = pytest.mark.server

PROMPTS = [list(range(3, 3 + length)) for length in (5, 40, 200)]


def changed(model: Path, folder: Path, change: Callable[..., dict[str, mx.array]]) -> Path:
    """A copy of the model with other weights: the same configuration and layout."""
    shutil.copytree(model, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    found = change(weights, json.loads((folder / "config.json").read_text()))
    mx.eval(found)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), found, {"format": "pt"})
    return folder


def test_only_who_computes_the_same_is_used(tiny_llama_path: Path, tmp_path: Path) -> None:
    wrong = {
        "rotation": (rotated, "layer 0, keys: "),
        "layers": (layers_swapped, "layer 1, keys: "),
        "norm": (norm_shifted, "layer 0, keys: "),
        "tuned": (tuned(0.5), "layer 0, keys: "),
    }
    expected = greedy(tiny_llama_path, PROMPTS, 12)
    with ExitStack() as stack:
        right = start_receiver(tiny_llama_path, tmp_path / "right.log")
        stack.callback(right.server.stop)
        others = {}
        for name, (change, _) in wrong.items():
            model = changed(tiny_llama_path, tmp_path / name, change)
            others[name] = start_receiver(model, tmp_path / f"{name}.log")
            stack.callback(others[name].server.stop)
        # The right one comes last: the others must not get anything meanwhile either.
        receivers = ",".join(r.address for r in [*others.values(), right])
        vllm = start_vllm(tiny_llama_path, tmp_path / "vllm.log", receiver=receivers)
        stack.callback(vllm.server.stop)
        log = vllm.server.log

        def settled() -> bool:
            text = log.read_text()
            return f"connected to the receiver at {right.address}" in text and all(
                f"lost the receiver at {other.address}: layer" in text for other in others.values()
            )

        assert eventually(settled, 120, 0.2), vllm.server.tail()
        # Another test of this run may have proven it before.
        assert eventually(lambda: bool(right.health()["proofs"]), 60, 0.2), vllm.server.tail()
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            assert vllm.tokens(prompt, 12) == tokens
        assert right.metric("mlx_receiver_decoded_tokens_total") == len(PROMPTS) * 11
        text = log.read_text()
        for name, (_, names) in wrong.items():
            other = others[name]
            assert other.metric("mlx_receiver_decoded_tokens_total") == 0
            assert f"lost the receiver at {other.address}: {names}" in text, name
            assert other.health()["clients"] == []
        # Nobody's request is nobody's: vLLM's users and metrics do not see the comparisons.
        assert vllm.metric("vllm:request_success_total") == len(PROMPTS)
        assert vllm.metric("vllm:prompt_tokens_total") == sum(map(len, PROMPTS))
        assert vllm.metric("vllm:num_requests_running") == 0
        (said,) = right.health()["proofs"].values()
        assert said.startswith("4 layers compared")
