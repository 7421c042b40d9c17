"""vLLM without its server, one model after the other: ``python -m tests.e2e.offline``.

Reads an order a line, as JSON: a model, a receiver, prompts and a number of tokens; answers each
with the tokens, once the receiver is connected; without a receiver vLLM decodes alone. ``then`` are
tokens that go on behind each answer, in a second turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from tests.gated_delta_net import add_float32
from tests.warm import fork_what_is_spawned, possible

#: How long a first hand-off may take, unless an order says otherwise (``connect``).
CONNECT_SECONDS = 120.0


def run(order: dict[str, Any]) -> dict[str, Any]:
    """One order."""
    from vllm import LLM

    add_float32()
    options = {"enforce_eager": True} | order.get("options", {})
    model = LLM(
        order["model"],
        dtype=order.get("dtype", "float32"),
        max_model_len=512,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": "mac_decode",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {
                "receiver": order["receiver"],
                "enabled": bool(order["receiver"]),
                "discovery": False,
                "stall_timeout": 20.0,
            },
        },
        **options,
    )
    try:
        until = time.monotonic() + (
            order.get("connect", CONNECT_SECONDS) if order["receiver"] else 0
        )
        while not _handed_off(model) and time.monotonic() < until:
            _generate(model, [[1, 2, 3]], 3)
            time.sleep(0.1)
        _generate(model, [[1, 2, 3]], 1)  # the counts move with the engine's steps
        before = _handed_off(model)
        turns = [_generate(model, order["prompts"], order["tokens"])]
        if "then" in order:
            asked = zip(order["prompts"], turns[0], strict=True)
            prompts = [prompt + answer + order["then"] for prompt, answer in asked]
            turns.append(_generate(model, prompts, order["tokens"]))
        _generate(model, [[1, 2, 3]], 1)
        return {
            "tokens": turns[0],
            "then": turns[-1],
            "handed_off": _handed_off(model) - before,
        }
    finally:
        model.llm_engine.engine_core.shutdown()


def _generate(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    found = model.generate(asked, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in found]


def _handed_off(model: Any) -> float:
    """Tokens that the receiver has decoded."""
    return sum(
        metric.value
        for metric in model.get_metrics()
        if metric.name == "vllm:mac_decode_tokens" and hasattr(metric, "value")
    )


def main() -> None:
    """Serve orders until there are none."""
    if possible():
        fork_what_is_spawned()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    for line in sys.stdin:
        try:
            answer = run(json.loads(line))
        except Exception as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a process of vLLM's that was spawned
    add_float32()
