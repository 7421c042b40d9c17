"""What vLLM's structured outputs ask for, in the wire's words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from mlx_receiver.wire.sampling import Grammar
from vllm_mac_decode.scheduler.port import EngineRules

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams


_KINDS: Final = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


def is_known(params: StructuredOutputsParams) -> bool:
    """Whether ``grammar_of`` finds a grammar; a schema may be too long to be written down twice."""
    return any(getattr(params, kind) not in (None, False) for kind in _KINDS)


def grammar_of(params: StructuredOutputsParams, rules: EngineRules) -> Grammar | None:
    """The request's grammar; None where its kind is unknown here.

    The order is that of vLLM's ``get_structured_output_key``. Of its libraries only guidance lets
    an object have properties that its schema does not name.
    """
    closed = params._backend != "guidance" or rules.closed_json
    compact = rules.compact_json
    if params.json is not None:
        schema = params.json if isinstance(params.json, str) else json.dumps(params.json)
        return Grammar("json", schema, closed, compact)
    if params.json_object:
        return Grammar("json", '{"type": "object"}', False, compact)
    if params.regex is not None:
        return Grammar("regex", params.regex)
    if params.choice is not None:
        choice = params.choice if isinstance(params.choice, str) else json.dumps(params.choice)
        return Grammar("choice", choice)
    if params.grammar is not None:
        return Grammar("grammar", params.grammar)
    if params.structural_tag is not None:
        return Grammar("structural_tag", params.structural_tag, closed, compact)
    return None
