"""Families of models: what is handed off is decoded as MLX alone decodes it, token by token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import cached_family
from tests.families import FAMILIES, WINDOW, for_mlx, write
from tests.servers import Receiver, start_receiver

pytestmark = pytest.mark.server

OUTPUT = 24
#: Shorter than a window, at its edges, longer; one that vLLM prefills in chunks.
LENGTHS = (30, WINDOW - 1, WINDOW, WINDOW + 1, 100, 200)
PROMPTS = [[1 + (7 * i + 3 * n) % 500 for i in range(length)] for n, length in enumerate(LENGTHS)]


class Offline:
    """vLLM in a process of its own, with one model after the other."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.offline"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
        self.log = log

    def run(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in answer, (answer, self.log.read_text()[-3000:])
        return answer

    def said(self) -> str:
        """What the connector's log has."""
        lines = self.log.read_text(errors="replace").splitlines()
        ours = ("link.py", "fleet.py", "answers.py", "handoffs.py", "connector.py", "exporter.py")
        return "\n".join([line for line in lines if any(name in line for name in ours)][-20:])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offline]:
    made = Offline(tmp_path_factory.mktemp("offline") / "vllm.log")
    yield made
    made.close()


def by_mlx_alone(receiver: Receiver, prompt: list[int]) -> list[int]:
    body = {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    answer = httpx.post(f"{receiver.url}/v1/completions", json=body)
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


#: Of each kind; the others on request, since each takes half a minute.
USUAL = {"gpt_oss", "qwen3_moe", "gemma4", "nemotron_h", "falcon_h1", "deepseek_v3"}
ALL = bool(os.environ.get("MAC_DECODE_ALL_FAMILIES"))


#: vLLM 0.32's CPU kernel rotates queries and keys of three dimensions wrongly, as these models pass
#: them (``docs/models.md``); PyTorch does not.
NATIVE_ROTATION = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
OPTIONS = {"lfm2": NATIVE_ROTATION, "deepseek_v3": NATIVE_ROTATION}

#: By Dynamo alone: no kernel is made.
TRACED = {"compilation_config": {"mode": 2, "backend": "eager"}}


#: Two have tests of their own; the third one's Mamba 1 is not in vLLM's CPU build.
OTHERS = {"mistral-window", "qwen3_next", "jamba"}


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in OTHERS and (ALL or name in USUAL)]
)
def test_tokens_are_those_of_mlx_alone(family: str, offline: Offline, tmp_path: Path) -> None:
    as_mlx_alone(family, offline, tmp_path, OPTIONS.get(family, {}))


@pytest.mark.skipif(not ALL, reason="each takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
@pytest.mark.parametrize(
    "family",
    ["gemma4", "deepseek_v3", "nemotron_h", "falcon_h1", "granitemoehybrid", "lfm2"],
)
def test_two_ranks(family: str, offline: Offline, tmp_path: Path) -> None:
    """Each sends its heads and its channels; a latent and a group, which both have, one."""
    options = {"tensor_parallel_size": 2} | OPTIONS.get(family, {})
    as_mlx_alone(family, offline, tmp_path, options)


@pytest.mark.skipif(not ALL, reason="each takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
@pytest.mark.parametrize("family", ["mistral", "nemotron_h"])
def test_two_stages(family: str, offline: Offline, tmp_path: Path) -> None:
    """Each sends its layers, also where some in between have no cache. vLLM 0.32's CPU build makes
    what the second stage needs only when it compiles a model, and takes no stage without attention.
    """
    model = None
    if family == "nemotron_h":
        model = write(family, tmp_path / "model", hybrid_override_pattern="M*-M*-")
    options = {"pipeline_parallel_size": 2, "enforce_eager": False} | TRACED
    as_mlx_alone(family, offline, tmp_path, options, model)


@pytest.mark.skipif(not ALL, reason="each takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gated_delta_net(ranks: int, offline: Offline, tmp_path: Path) -> None:
    """In bf16, and so by the proof alone: tokens differ where two are nearly as likely."""
    heads = {"linear_num_key_heads": ranks, "linear_num_value_heads": 2 * ranks}
    model = write("qwen3_next", tmp_path / "model", "bfloat16", **heads)
    receiver = start_receiver(model, tmp_path / "receiver.log")
    try:
        order = {"model": str(model), "prompts": PROMPTS, "tokens": OUTPUT, "dtype": "bfloat16"}
        options = {"tensor_parallel_size": ranks}
        answer = offline.run(receiver=receiver.address, options=options, **order)
    finally:
        receiver.server.stop()
    assert answer["handed_off"] == len(PROMPTS) * (OUTPUT - 1)
    assert "4 layers compared" in receiver.server.log.read_text()


def as_mlx_alone(
    family: str,
    offline: Offline,
    tmp_path: Path,
    options: dict[str, Any],
    model: Path | None = None,
) -> None:
    model = model or cached_family(family)
    receiver = start_receiver(for_mlx(family, model), tmp_path / "receiver.log")
    try:
        expected = [by_mlx_alone(receiver, prompt) for prompt in PROMPTS]
        wanted = len(PROMPTS) * (OUTPUT - 1)
        for _ in range(3):  # on a busy machine a response may have gone on locally
            answer = offline.run(
                model=str(model),
                receiver=receiver.address,
                prompts=PROMPTS,
                tokens=OUTPUT,
                options=options,
            )
            receiver.assert_idle()
            assert answer["tokens"] == expected
            refused = "do not compute the same cache" in receiver.server.log.read_text()
            if answer["handed_off"] == wanted or refused:
                break
        assert answer["handed_off"] == wanted, offline.said()
    finally:
        receiver.server.stop()


def test_a_window_that_mlx_does_not_know(offline: Offline, tmp_path: Path) -> None:
    """MLX's Mistral attends to everything: what is longer than the window is vLLM's."""
    model = cached_family("mistral-window")
    order = {"model": str(model), "prompts": PROMPTS, "tokens": OUTPUT}
    expected = offline.run(receiver="", **order)["tokens"]
    receiver = start_receiver(model, tmp_path / "receiver.log")
    try:
        answer = offline.run(receiver=receiver.address, **order)
    finally:
        receiver.server.stop()
    assert answer["tokens"] == expected
    # Of the shortest one alone, up to the end of the window.
    assert answer["handed_off"] == WINDOW - len(PROMPTS[0]) - 1
