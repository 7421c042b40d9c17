"""vLLM's own grammar of a request, while the receiver decodes it.

vLLM compiles it, samples the first token by it and advances it over that token
(``Scheduler.update_from_output``). From there on nobody in vLLM touches it: the relay advances it
over the receiver's tokens, so that a continuation finds it where the text is. Of a request that
vLLM's scheduler never had it is compiled all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger("vllm.mac_decode.engine")

#: What a parser of reasoning must leave as it is, for a single token to be the end.
_RULES: Final = ("is_reasoning_end", "is_reasoning_end_streaming")


def ready(request: Request) -> bool:
    """See ``EnginePort.grammar_ready``."""
    structured: Any = request.structured_output_request
    try:
        return structured is None or bool(structured.is_grammar_ready)
    except Exception:  # what compiling it raised: ``accept`` takes nothing then
        return True


def accept(request: Request, tokens: list[int], after: int | None) -> int:
    """See ``EnginePort.accept``. Not for a request that vLLM's scheduler has."""
    for count, token in enumerate(tokens):
        try:
            if not _takes(request, token, after):
                return count
        except Exception:
            logger.exception("the grammar of %s cannot be advanced", request.request_id)
            return count
    return len(tokens)


def _takes(request: Request, token: int, after: int | None) -> bool:
    """Whether the grammar takes the token; it is advanced then, and as it was otherwise."""
    structured: Any = request.structured_output_request
    if after is not None and not structured.reasoning_ended:
        structured.reasoning_ended = token == after
        # The reasoning also ends where a tool call begins: vLLM is to see to that.
        others = getattr(structured.reasoner, "reasoning_end_token_ids", None) or ()
        return token == after or token not in others
    structured.reasoning_ended = True
    grammar = structured.grammar
    if grammar.is_terminated():
        return True  # vLLM constrains nothing any more
    # Asked first: guidance is of no use once it was told a token that it does not take.
    if grammar.validate_tokens([token]) != [token] and not _ends(request, grammar, token):
        return False
    return bool(grammar.accept_tokens(request.request_id, [token]))


def _ends(request: Request, grammar: Any, token: int) -> bool:
    """Whether the token ends a text of guidance's to which nothing can be added: asked about its
    end, guidance says no."""
    assert request.sampling_params is not None
    matcher = getattr(grammar, "ll_matcher", None)
    ends = token in request.sampling_params.all_stop_token_ids
    return matcher is not None and ends and matcher.is_stopped() and not matcher.is_error()


def reasoning_end(manager: Any, request: Request) -> int | None:
    """See ``EnginePort.reasoning_end``; ``manager`` is vLLM's StructuredOutputManager."""
    from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser as Thinking

    structured: Any = request.structured_output_request
    if structured.reasoning_ended:
        return None
    reasoner = manager._get_reasoner(request)
    if reasoner is None:
        return None
    if structured.reasoning_ended is None and reasoner.is_reasoning_end(request.prompt_token_ids):
        return None
    kind = type(reasoner)
    if hasattr(manager, "_get_constraint_bounds") and hasattr(reasoner, "find_reasoning_end"):
        tokens = reasoner.reasoning_end_token_ids or ()
        # Others belong to what follows.
        ends = [token for token in tokens if not reasoner.find_reasoning_end([token]).implicit]
        if len(ends) != 1:
            raise LookupError(f"{kind.__name__} has {len(ends)} tokens that end reasoning")
        return int(ends[0])
    if not isinstance(reasoner, Thinking) or any(
        getattr(kind, rule) is not getattr(Thinking, rule) for rule in _RULES
    ):
        raise LookupError(f"{kind.__name__} has rules of its own for the end of reasoning")
    return int(reasoner.end_token_id)
