"""The demo's request, sent as any client of vLLM would send it, and its reference."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_mac_decode.tools.demo.pair import Pair, PairError
from vllm_mac_decode.tools.demo.services import Service, ServiceDied, console_script

#: Seconds in which MLX alone must have answered the demo's prompt.
_REFERENCE_SECONDS = 240.0
_WARM_UP_ATTEMPTS = 5


@dataclass
class Answer:
    """One streamed chat response."""

    id: str = ""
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Seconds from sending the request to each piece of text.
    arrivals: list[float] = field(default_factory=list)


def warm_up(pair: Pair) -> None:
    """Ask for a few tokens until the receiver decodes them.

    The first request of a fresh process pays for things that the second one does not. Its prompt
    shares nothing with the demo's, whose whole KV must be computed and sent.

    Raises PairError when every attempt is decoded by vLLM itself.
    """
    client = _client(pair)
    for _ in range(_WARM_UP_ATTEMPTS):
        pair.check()
        before = pair.receiver_metric("mlx_receiver_decoded_tokens_total")
        client.completions.create(
            model=pair.model_name, prompt="Once upon a time", max_tokens=4, temperature=0
        )
        if pair.receiver_metric("mlx_receiver_decoded_tokens_total") > before:
            return
        time.sleep(1)
    raise PairError(
        "vLLM answers, but decodes everything itself. "
        f"The end of {pair.vllm.log}:\n{pair.vllm.tail()}"
    )


def ask(pair: Pair, prompt: str, max_tokens: int, show: Callable[[str], None]) -> Answer:
    """Stream the chat response to ``prompt``; ``show`` gets each piece of text as it arrives."""
    answer = Answer()
    began = time.monotonic()
    stream = _client(pair).chat.completions.create(
        model=pair.model_name,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        # vLLM's own: the tokens beside the text.
        extra_body={"return_token_ids": True},
    )
    for chunk in stream:
        answer.id = chunk.id
        extra = chunk.model_extra or {}
        answer.prompt_token_ids = extra.get("prompt_token_ids") or answer.prompt_token_ids
        if chunk.usage is not None:
            answer.prompt_tokens = chunk.usage.prompt_tokens
            answer.completion_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            tokens = (choice.model_extra or {}).get("token_ids") or []
            answer.token_ids += tokens
            answer.finish_reason = choice.finish_reason or answer.finish_reason
            if tokens:
                answer.arrivals.append(time.monotonic() - began)
            if choice.delta.content:
                show(choice.delta.content)
    return answer


def reference(model: Path, answer: Answer, out: Path) -> list[int]:
    """What MLX alone, prefill included, answers to the same prompt: as many tokens, greedily.

    Raises ServiceDied when it fails.
    """
    log = out / "reference.log"
    command = [
        *(console_script("mlx-receiver"), "generate", "--model", str(model)),
        *("--token-ids", ",".join(map(str, answer.prompt_token_ids))),
        *("--max-tokens", str(len(answer.token_ids)), "--dtype", "float32", "--json"),
    ]
    child = Service("mlx-receiver generate", command, log)
    try:
        status = child.wait(_REFERENCE_SECONDS)
    finally:
        child.stop()
    if status != 0:
        raise ServiceDied(f"mlx-receiver generate: status {status}\n{child.tail()}")
    # The log holds what the libraries say as well.
    (line,) = [line for line in child.tail(1000).splitlines() if line.startswith("{")][-1:]
    result: dict[str, Any] = json.loads(line)
    return [int(token) for token in result["token_ids"]]


def _client(pair: Pair) -> Any:
    from openai import OpenAI

    return OpenAI(
        base_url=f"{pair.vllm_url}/v1", api_key="none", http_client=pair.http, timeout=240,
        max_retries=0,
    )  # fmt: skip
