"""What a client may open a session for."""

from __future__ import annotations

from mlx_receiver.decode.model import ModelSource
from mlx_receiver.decode.sampling import check_bad_words
from mlx_receiver.sessions.client import Client
from mlx_receiver.wire import trust
from mlx_receiver.wire.messages import E_CAPACITY, E_UNSUPPORTED, Open, WireError
from mlx_receiver.wire.quantised import CODECS, RAW
from mlx_receiver.wire.ranges import MAX_PROOF_TOKENS


def check_open(message: Open, client: Client, source: ModelSource) -> None:
    """Raise WireError unless the receiver can do what is asked of it for that model."""
    tokens = len(message.prompt_token_ids)
    if message.codec not in CODECS:
        known = ", ".join(CODECS)
        raise WireError(E_UNSUPPORTED, f"codec {message.codec!r} (known: {known})")
    if tokens >= client.context:
        raise WireError(
            E_CAPACITY, f"a prompt of {tokens} tokens fills the model's {client.context}"
        )
    if message.unclaimed and client.context < source.max_tokens:
        # Whoever claims it would decode on, where the two engines' caches differ.
        raise WireError(
            E_UNSUPPORTED, f"the engines keep the same cache for {client.context} tokens only"
        )
    trust.check(message, source.signature.vocab_size, E_UNSUPPORTED)
    check_bad_words(message.sampling)
    if message.proof and (message.unclaimed or tokens > MAX_PROOF_TOKENS):
        raise WireError(
            E_UNSUPPORTED, f"a proof is claimed, and of {MAX_PROOF_TOKENS} tokens at most"
        )
    if message.compute == "all" and (message.unclaimed or message.proof):
        raise WireError(E_UNSUPPORTED, "a prompt that is computed here is decoded here")
    if message.proof and message.codec != RAW:
        raise WireError(E_UNSUPPORTED, f"a proof travels raw, not {message.codec}")
