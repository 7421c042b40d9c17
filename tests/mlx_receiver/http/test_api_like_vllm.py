"""Request bodies are read as vLLM 0.32 reads them: every field with values of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_receiver.decode.model import find_model
from mlx_receiver.decode.sampling import check_sampling
from mlx_receiver.http.errors import ApiError
from mlx_receiver.http.openai.bodies import ChatBody, CompletionBody, SamplingBody, parse
from mlx_receiver.http.openai.parameters import Defaults, sampling
from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.ranges import MAX_LOGPROBS
from mlx_receiver.wire.sampling import Sampling

pytest.importorskip("vllm")

MESSAGES = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

#: Values of every kind; a few are sensible for each field.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 5, 128, 129, 2**31, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1,
    0.0, 1.0, 0.5, -0.5, 1.5, 2.0, 2.5, -2.0, -2.5, 1e-7, 1e300,
    "", "1", "0", "1.0", "0.5", "true", "True", "yes", "off", "null", "nan", "inf", "word",
    [], [1], ["1"], ["a"], ["a"] * 4, ["a"] * 5, [""], [None], [True], [1.0], [10**9], [-1], [1.5],
    {}, {"1": 1}, {"1": "2"}, {"a": 1}, {"-1": 1}, {"1": None}, {"1": "nan"}, {str(10**9): 1},
    {"include_usage": True}, {"include_usage": None}, {"include_usage": "yes"},
    {"continuous_usage_stats": 1}, {"include_usage": "word"}, [TOOL], [{"type": "function"}],
    [{**TOOL, "type": "other"}], [{"function": {"name": 1}}], "auto", "none",
]  # fmt: skip

SHARED = [
    "n", "stream", "stream_options", "max_tokens", "min_tokens", "temperature", "top_p", "top_k",
    "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "stop", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "return_token_ids",
    "return_tokens_as_token_ids", "add_special_tokens", "echo",
]  # fmt: skip
COMPLETION = [*SHARED, "logprobs", "prompt"]
CHAT = [
    *SHARED, "logprobs", "top_logprobs", "max_completion_tokens", "tools", "tool_choice",
    "add_generation_prompt", "continue_final_message", "parallel_tool_calls", "reasoning_effort",
]  # fmt: skip

#: What vLLM accepts and this receiver refuses, on purpose.
STRICTER: list[tuple[str, Any]] = [
    # One request fills the batch at most four times.
    ("n", 129),
    # No number.
    ("logit_bias", {"1": "nan"}),
    # A list is not searched for booleans that stand for numbers.
    ("allowed_token_ids", [True]),
    ("stop_token_ids", [True]),
    ("prompt", [True]),
]
#: Refused once it is known that no hand-off brings the prompt.
LATER: list[tuple[str, Any]] = [("prompt", None), ("prompt", "")]


@pytest.fixture(scope="module")
def source(tiny_llama_path: Path) -> Any:
    return find_model(str(tiny_llama_path))


def ours(source: Any, tokenizer: Tokenizer, body: dict[str, Any], kind: Any) -> Sampling | str:
    vocab = source.signature.vocab_size
    try:
        parsed: SamplingBody = parse(json.dumps(body).encode(), kind, vocab)
        found = sampling(parsed, Defaults(source), tokenizer)
        check_sampling(found, vocab)
    except ApiError as error:
        assert error.status == 400
        return error.message
    except WireError as error:
        return error.reason
    return found


def theirs(source: Any, tokenizer: Tokenizer, body: dict[str, Any], kind: Any) -> Any:
    """vLLM's SamplingParams, or why it refuses the body."""
    from types import SimpleNamespace

    from vllm.exceptions import VLLMValidationError

    vocab = source.signature.vocab_size
    model = SimpleNamespace(
        max_logprobs=MAX_LOGPROBS, get_vocab_size=lambda: vocab, max_model_len=source.max_tokens
    )
    try:
        request = kind.model_validate(body)
        limit = request.max_tokens
        if getattr(request, "max_completion_tokens", None) is not None:
            limit = request.max_completion_tokens
        params = request.to_sampling_params(10**6 if limit is None else limit, {})
        params._validate_logprobs(model)
        params._validate_logit_bias(model)
        params._validate_stop_token_ids(model)
        params._validate_allowed_token_ids(model)
    except (ValueError, VLLMValidationError) as error:
        return str(error)
    return params


@pytest.mark.parametrize("chat", [False, True])
def test_every_field_is_read_as_vllm_reads_it(source: Any, chat: bool) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    tokenizer = Tokenizer(source)
    base: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": "x"}
    kinds = (ChatBody, ChatCompletionRequest) if chat else (CompletionBody, CompletionRequest)
    wrong = []
    for field in CHAT if chat else COMPLETION:
        for value in VALUES:
            body = base | {field: value}
            if field == "stream_options":
                body["stream"] = True
            if field == "top_logprobs":
                body["logprobs"] = True
            if field == "tool_choice":
                body["tools"] = [TOOL]
            mine = ours(source, tokenizer, dict(body), kinds[0])
            its = theirs(source, tokenizer, json.loads(json.dumps(body)), kinds[1])
            if isinstance(mine, str) != isinstance(its, str):
                wrong.append((field, value, mine, str(its)[:300]))
            elif not isinstance(mine, str):
                for name in ("min_tokens", "temperature", "seed", "logit_bias", "logprobs",
                             "repetition_penalty", "allowed_token_ids"):  # fmt: skip
                    said = None if getattr(its, name) == {} else getattr(its, name)
                    if getattr(mine, name) != said:
                        wrong.append((field, value, name, getattr(mine, name), said))
    allowed = [repr(entry) for entry in [*STRICTER, *LATER]]
    wrong = [w for w in wrong if repr((w[0], w[1])) not in allowed]
    assert not wrong, "\n".join(map(str, wrong))
