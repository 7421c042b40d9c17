"""Control messages as msgpack frames, and back: what is no message of this protocol is refused."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from mlx_receiver.wire.messages import (
    E_PROTOCOL,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Cancel,
    ClientMessage,
    Hello,
    Open,
    Ping,
    ReceiverMessage,
    Start,
    WireError,
)
from mlx_receiver.wire.ranges import SessionId, TokenId
from mlx_receiver.wire.sampling import Sampling

_T = TypeVar("_T")

_encoder = msgspec.msgpack.Encoder()
_client_decoder = msgspec.msgpack.Decoder(ClientMessage)
_receiver_decoder = msgspec.msgpack.Decoder(ReceiverMessage)


def encode(message: ClientMessage | ReceiverMessage) -> bytes:
    """The message as one msgpack frame."""
    return _encoder.encode(message)


def client_decoder(max_tokens: int, vocab_size: int) -> msgspec.msgpack.Decoder[ClientMessage]:
    """A decoder for one model's receiver, whose lists are no longer than that model can use.

    A list of a million numbers takes a tenth of a second to build; refused by its length, none.
    """
    sampling = msgspec.defstruct(
        "Sampling",
        [
            (
                "allowed_token_ids",
                Annotated[list[TokenId], Meta(min_length=1, max_length=vocab_size)] | None,
                None,
            ),
        ],
        bases=(Sampling,),
        frozen=True,
        omit_defaults=True,
    )
    prompt = Annotated[list[TokenId], Meta(min_length=1, max_length=max_tokens)]
    opening = msgspec.defstruct(
        "Open",
        [("prompt_token_ids", prompt), ("sampling", sampling)],
        bases=(Open,),
        frozen=True,
        tag="open",
    )
    return msgspec.msgpack.Decoder(Hello | opening | Start | Cancel | Ping)


class _Opening(msgspec.Struct, tag="open"):
    """What an Open is about, whatever else it says."""

    session: SessionId


_opening_decoder = msgspec.msgpack.Decoder(_Opening)


def opened_session(frame: bytes) -> int | None:
    """The session of an Open that ``decode_client`` does not accept; None for anything else."""
    try:
        return _opening_decoder.decode(frame).session
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def decode_client(
    frame: bytes, decoder: msgspec.msgpack.Decoder[ClientMessage] = _client_decoder
) -> ClientMessage:
    """What a client sent. Raises WireError (``protocol``) for anything else."""
    return _decode(decoder, frame)


def decode_receiver(frame: bytes) -> ReceiverMessage:
    """What a receiver sent. Raises WireError (``protocol``) for anything else."""
    return _decode(_receiver_decoder, frame)


def _decode(decoder: msgspec.msgpack.Decoder[_T], frame: bytes) -> _T:
    if len(frame) > MAX_MESSAGE_BYTES:
        raise WireError(
            E_PROTOCOL,
            f"a control message of {len(frame)} bytes is over the limit of {MAX_MESSAGE_BYTES}",
        )
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(
            E_PROTOCOL, f"not a message of protocol {PROTOCOL_VERSION}: {error}"
        ) from None
