"""What numbers, names and texts in control messages may be.

Each stands in the type of a message's field, so that decoding refuses what is outside. Where vLLM
is named, it bounds the same thing as strictly (0.32, ``vllm/envs.py``).
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

MAX_INT: Final = 2**31 - 1
#: Members of one ``Step``, and sessions of one ``Status``.
MAX_ROWS: Final = 4096
#: Output tokens of one session in one ``Decoded``.
MAX_STEP_TOKENS: Final = 64
#: Alternatives for each token; vLLM's default for ``--max-logprobs``.
MAX_LOGPROBS: Final = 20
#: Words, and their tokens together: VLLM_MAX_NUM_BAD_WORDS, VLLM_MAX_BAD_WORDS_TOTAL_TOKENS.
MAX_BAD_WORDS: Final = 128
MAX_BAD_WORDS_TOKENS: Final = 1024
#: Token ids that end a text; models have a handful.
MAX_STOP_TOKENS: Final = 1024
#: Biased tokens: a dictionary takes longer to build than a list.
MAX_LOGIT_BIAS: Final = 8192
#: Tokens of what begins or ends a model's reasoning.
MAX_MARK_TOKENS: Final = 1024
#: Characters of a grammar; a schema of a hundred kilobytes takes seconds to compile.
MAX_GRAMMAR: Final = 1 << 17
#: Tokens of a prompt whose cache is compared.
MAX_PROOF_TOKENS: Final = 1024
#: Longest name of something, in characters.
MAX_NAME: Final = 1024

#: Longest text of a reason or name, in characters.
MAX_TEXT: Final = 4096

Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
Positive = Annotated[int, Meta(ge=1, le=MAX_INT)]
Nanoseconds = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Bytes = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
#: A session's number: random, chosen by the client.
SessionId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
#: An index into the model's vocabulary; ``trust.check`` compares it with the vocabulary's size.
TokenId = Annotated[int, Meta(ge=0, le=MAX_INT, extra={"index": "vocabulary"})]
#: JSON's and msgpack's numbers; minus infinity is a token that cannot come.
Logprob = Annotated[float, Meta(le=1e-3, extra={"infinite": True})]
Name = Annotated[str, Meta(max_length=MAX_NAME)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
