"""vLLM's own grammars while the receiver decodes, with each of its libraries."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.utils import choice_as_grammar

from vllm_mac_decode.engine.grammars import accept, reasoning_end

EOS = 2
TEXT = '{"ok": true}'


@pytest.fixture(scope="module")
def config(tiny_llama_path: Path) -> Any:
    return EngineArgs(model=str(tiny_llama_path), dtype="float32").create_engine_config()


@pytest.fixture(scope="module")
def tokenizer(config: Any) -> Any:
    return cached_tokenizer_from_config(model_config=config.model_config)


def request(config: Any, backend: str, **kind: Any) -> Request:
    """A request whose grammar vLLM has compiled."""
    structured = StructuredOutputsParams(**kind)
    structured._backend = backend
    if structured.choice:  # as vLLM's front end has it for xgrammar
        structured.grammar, structured.choice = choice_as_grammar(structured.choice), None
    params = SamplingParams(max_tokens=16, structured_outputs=structured)
    params.update_from_generation_config({}, eos_token_id=EOS)
    made = Request("r", [5, 6, 7], params, None)
    manager = StructuredOutputManager(config)
    manager.grammar_init(made)
    made.structured_output_request._grammar.result(60)  # type: ignore[union-attr]
    return made


@pytest.mark.parametrize("backend", ["xgrammar", "guidance", "outlines"])
def test_a_grammar_is_where_the_text_is(config: Any, tokenizer: Any, backend: str) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    made = request(config, backend, json=schema)
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(tokens) > 3
    assert accept(made, tokens[:1], None) == 1
    # What it does not take leaves it as it was, however often.
    wrong = tokenizer.encode("]")[0]
    assert accept(made, [wrong], None) == 0 and accept(made, [EOS], None) == 0
    assert accept(made, [*tokens[1:3], wrong], None) == 2
    assert accept(made, tokens[3:], None) == len(tokens) - 3
    assert accept(made, [wrong], None) == 0
    assert accept(made, [EOS], None) == 1
    # Behind an end that is ignored vLLM constrains nothing.
    assert accept(made, [wrong, 17], None) == 2
    assert made.structured_output_request.reasoning_ended  # type: ignore[union-attr]


def test_reasoning_is_not_the_grammars(config: Any, tokenizer: Any) -> None:
    made = request(config, "xgrammar", choice=["yes"])
    structured: Any = made.structured_output_request
    assert accept(made, [40, EOS, 41], 6) == 3 and not structured.reasoning_ended
    assert accept(made, [6], 6) == 1 and structured.reasoning_ended
    assert accept(made, [40], 6) == 0
    assert accept(made, [*tokenizer.encode("yes"), EOS], 6) == 2


def test_a_grammar_that_failed_is_no_end_of_vllm(config: Any) -> None:
    made = request(config, "xgrammar", choice=["yes"])
    made.structured_output_request._grammar = RuntimeError("none")  # type: ignore[union-attr]
    assert accept(made, [40], None) == 0


class Marks(BaseThinkingReasoningParser):
    """``<file_sep>`` (5) and ``<filename>`` (6) begin and end the reasoning."""

    start_token, end_token = "<file_sep>", "<filename>"


class Others(Marks):
    """Its reasoning ends in another way, too."""

    def is_reasoning_end_streaming(self, input_ids: Any, delta_ids: Any) -> bool:
        return True


class Engine:
    """As vLLM's parsers with an engine: 6 ends the reasoning, as does 8, which begins a call."""

    def __init__(self, _tokenizer: Any, ends: tuple[int, ...] = (6, 8)) -> None:
        self.reasoning_end_token_ids = frozenset(ends)

    def is_reasoning_end(self, prompt: list[int]) -> bool:
        return 6 in prompt

    def find_reasoning_end(self, tokens: list[int]) -> Any:
        return SimpleNamespace(offset=0, implicit=tokens[0] == 8)


def test_a_call_that_ends_the_reasoning_is_vllms(config: Any, tokenizer: Any) -> None:
    made = request(config, "xgrammar", choice=["yes"])
    structured: Any = made.structured_output_request
    structured.reasoner = Engine(None)
    assert accept(made, [40, 41, 8, 42], 6) == 2 and not structured.reasoning_ended
    assert accept(made, [6, *tokenizer.encode("yes")], 6) == 2 and structured.reasoning_ended


def asked(tokenizer: Any, kind: Any, prompt: list[int], ended: bool | None = None) -> int | None:
    made: Any = SimpleNamespace(
        prompt_token_ids=prompt, structured_output_request=SimpleNamespace(reasoning_ended=ended)
    )
    manager = SimpleNamespace(
        _get_reasoner=lambda _: kind and kind(tokenizer), _get_constraint_bounds=None
    )
    return reasoning_end(manager, made)


def test_where_reasoning_ends(tokenizer: Any) -> None:
    assert asked(tokenizer, Marks, [30, 31]) == 6
    assert asked(tokenizer, Marks, [5, 31]) == 6
    assert asked(tokenizer, Marks, [5, 31, 6, 32]) is None
    # vLLM was told that it has not: it does not look at the prompt.
    assert asked(tokenizer, Marks, [5, 31, 6, 32], ended=False) == 6
    assert asked(tokenizer, Marks, [30], ended=True) is None
    assert asked(tokenizer, None, [30]) is None
    with pytest.raises(LookupError, match="Others"):
        asked(tokenizer, Others, [30])
    assert asked(tokenizer, Engine, [30]) == 6
    assert asked(tokenizer, Engine, [30, 6, 31]) is None
    for ends in ((), (8,), (6, 7)):
        with pytest.raises(LookupError, match="tokens that end reasoning"):
            asked(tokenizer, lambda t, ends=ends: Engine(t, ends), [30])
