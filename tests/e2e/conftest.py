"""One running pair of servers for the tests that do not need their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Receiver, Vllm, pair

#: Prompts over 256 tokens are chunked; a KV cache of 96 x 128 tokens is soon touched entirely,
#: so that a process's resident memory can be compared. The rest lets requests ask for more.
ARGS = (
    "--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "96", "--max-logprobs", "50",
    "--enable-prompt-tokens-details", "--scheduling-policy", "priority",
)  # fmt: skip


@pytest.fixture(scope="session")
def served(
    tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Vllm, Receiver]]:
    """vLLM and a receiver for the tiny Llama, in fp32."""
    logs = tmp_path_factory.mktemp("served")
    with pair(tiny_llama_path, logs, args=ARGS, fresh=True) as servers:
        yield servers


@pytest.fixture(scope="session")
def vllm(served: tuple[Vllm, Receiver]) -> Vllm:
    """The pair's vLLM."""
    return served[0]


@pytest.fixture(scope="session")
def receiver(served: tuple[Vllm, Receiver]) -> Receiver:
    """The pair's receiver."""
    return served[1]
