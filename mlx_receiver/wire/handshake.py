"""The first message of a conversation: an envelope that every version can read
(``messages.Hello``), and in it what this version says."""

from __future__ import annotations

import msgspec

from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.messages import E_PROTOCOL, E_VERSION, PROTOCOL_VERSION, Hello, WireError
from mlx_receiver.wire.ranges import Name
from mlx_receiver.wire.signature import ModelSignature


class Introduction(msgspec.Struct, frozen=True):
    """Who says Hello, and what it will send; numbers travel in the layout's dtypes."""

    signature: ModelSignature
    layout: CacheLayout
    client: Name = ""  # for people
    engine: Name = ""  # for people, e.g. "vllm 0.32.0"
    model: Name = ""  # as vLLM was told: a Hugging Face id or a folder of its machine
    #: What the weights are kept in: a dtype, or how they are quantised.
    weights: Name = ""
    #: Of the weights (``fingerprint.of_folder``); "" where that is not known.
    fingerprint: Name = ""

    def hello(self) -> Hello:
        """In its envelope."""
        return Hello(PROTOCOL_VERSION, msgspec.msgpack.encode(self))


_decoder = msgspec.msgpack.Decoder(Introduction)


def introduction(hello: Hello) -> Introduction:
    """What the envelope holds. Raises WireError: ``version`` unless the client speaks this
    PROTOCOL_VERSION, ``protocol`` for a payload that this version does not allow."""
    if hello.protocol != PROTOCOL_VERSION:
        older = "client" if hello.protocol < PROTOCOL_VERSION else "receiver"
        raise WireError(
            E_VERSION,
            f"the client speaks wire protocol {hello.protocol}, this receiver {PROTOCOL_VERSION}: "
            f"upgrade vllm-mac-decode on the {older}'s machine",
        )
    try:
        return _decoder.decode(hello.payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(E_PROTOCOL, f"the client's introduction cannot be read: {error}") from None
