"""Control messages: the whole conversation between vLLM and the receiver.

vLLM's scheduler process is the client (ZeroMQ DEALER), the receiver the server (ROUTER).
A conversation::

    client                                   receiver
    Hello(signature, token)         ->
                                    <-       Welcome(endpoints, features) | Rejected(reason)
    Open(session, prompt, sampling) ->
                                    <-       Opened(session) | Refused(session, reason)
       ... KV blocks arrive on the bulk channel (``frames``) ...
                                    <-       Complete(session)
    Start(session, first_token)     ->
                                    <-       Step([Decoded(session, ...), ...]) once a decode step
    Cancel(session)                 ->
                                    <-       Failed(session, reason) when the receiver gives up
    Ping                            ->
                                    <-       Status(capacity, progress)

Every message is one msgpack frame of one tagged struct. Nothing is pickled.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from mlx_receiver.wire.signature import ModelSignature

#: Version of everything under ``mlx_receiver.wire``. Both sides must have the same one.
#: 1: first release.
PROTOCOL_VERSION: Final = 1

#: Largest control message accepted, in bytes: a prompt of a million tokens fits.
MAX_MESSAGE_BYTES: Final = 16 << 20


class WireError(Exception):
    """The peer sent something that this side does not accept.

    ``code`` is one of the ``E_*`` names below, for metrics; the text is for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


E_VERSION: Final = "version"  # another PROTOCOL_VERSION
E_CREDENTIALS: Final = "credentials"  # wrong or missing token
E_MODEL: Final = "model"  # the signatures differ
E_CAPACITY: Final = "capacity"  # no memory or too many sessions
E_UNSUPPORTED: Final = "unsupported"  # a sampling feature, dtype, codec or cache family
E_SESSION: Final = "session"  # unknown, closed or foreign session
E_BLOCK: Final = "block"  # a hole, an overlap, a wrong size: the cache cannot be trusted
E_PROTOCOL: Final = "protocol"  # not a message of this protocol
E_INTERNAL: Final = "internal"  # a fault of the receiver
E_SHUTDOWN: Final = "shutdown"  # the receiver is stopping


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the receiver samples; every field means what vLLM's ``SamplingParams`` says.

    ``max_tokens`` and ``min_tokens`` count from the first output token, the one that vLLM
    sampled itself. ``eos_token_id`` ends the text with ``stop_reason`` None, a member of
    ``stop_token_ids`` with ``stop_reason`` set to itself. ``logprobs`` is the number of
    alternatives per token (None: none wanted).
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    eos_token_id: int | None = None
    stop_token_ids: list[int] = []
    logprobs: int | None = None


class Endpoint(msgspec.Struct, frozen=True):
    """Where a bulk transport listens. An empty host means: the control channel's host."""

    transport: str
    host: str
    port: int


# --- client to receiver -------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a connection, and again after every reconnection."""

    protocol: int
    signature: ModelSignature
    kv_dtype: str
    token: str = ""
    client: str = ""
    engine: str = ""  # for people, e.g. "vllm 0.32.0"


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Ask for a session. ``session`` is a random number below 2**63, chosen by the client.

    ``prompt_token_ids`` are the tokens whose KV will arrive; the receiver never tokenises.
    A ``parked`` session gets no Start: it waits for whoever shows its id over HTTP, with a first
    token and sampling of their own, and expires if nobody does.
    """

    session: int
    request_id: str
    prompt_token_ids: list[int]
    sampling: Sampling
    codec: str = "raw"
    parked: bool = False


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first output token, sampled by vLLM. Decoding starts once the cache is complete."""

    session: int
    first_token: int


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Forget the session and free what it holds. Unknown sessions are ignored."""

    session: int
    reason: str = ""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Sent while the client is alive; a silent client's sessions are dropped."""

    sent_ns: int


# --- receiver to client -------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The client may open sessions. ``receiver`` changes when the receiver restarts."""

    receiver: str
    model: str
    engine: str  # e.g. "mlx 0.32.4"
    endpoints: list[Endpoint]
    max_tokens: int  # longest prompt + output that one session may have
    codecs: list[str]


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """Answer to a Hello that cannot be served; ``reason`` names what differs and what to do."""

    code: str
    reason: str


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The session's memory is reserved. ``prefix_tokens`` are held already: do not send them."""

    session: int
    prefix_tokens: int = 0


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The session is not accepted; the client decodes it itself."""

    session: int
    code: str
    reason: str


class Complete(msgspec.Struct, frozen=True, tag="complete"):
    """Every (layer, token, head) of the session's cache is resident."""

    session: int
    kv_bytes: int


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of one sampled token, before temperature and penalties.

    The sampled token comes first, then the ``Sampling.logprobs`` likeliest tokens in falling
    order. ``rank`` is the sampled token's rank among the vocabulary, 1 for the likeliest.
    """

    token_ids: list[int]
    values: list[float]
    rank: int


class Decoded(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one session.

    ``position`` counts output tokens: vLLM's own first token is 0, so the first one decoded by
    the receiver is 1. ``finish`` is "" while the text goes on, else "stop" or "length".
    """

    session: int
    position: int
    token_ids: list[int]
    finish: str = ""
    stop_reason: int | None = None
    logprobs: list[Logprobs] | None = None


class Step(msgspec.Struct, frozen=True, tag="step"):
    """What one decode step produced for this client's sessions."""

    decoded: list[Decoded]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The receiver gave the session up and has freed it."""

    session: int
    code: str
    reason: str


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """One session as the receiver sees it. ``state`` is receiving, waiting, decoding."""

    session: int
    state: str
    kv_bytes: int
    tokens: int


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Answer to a Ping: proof of life, capacity, and each of the client's sessions.

    ``ping_ns`` returns the Ping's own time and ``clock_ns`` the receiver's monotonic clock, so
    that the client can put both sides' times on one axis.
    """

    ping_ns: int
    clock_ns: int
    accepting: bool
    free_bytes: int
    sessions: list[Progress]


ClientMessage = Hello | Open | Start | Cancel | Ping
ReceiverMessage = Welcome | Rejected | Opened | Refused | Complete | Step | Failed | Status

_T = TypeVar("_T")

_encoder = msgspec.msgpack.Encoder()
_client_decoder = msgspec.msgpack.Decoder(ClientMessage)
_receiver_decoder = msgspec.msgpack.Decoder(ReceiverMessage)


def encode(message: ClientMessage | ReceiverMessage) -> bytes:
    """The message as one msgpack frame."""
    return _encoder.encode(message)


def decode_client(frame: bytes) -> ClientMessage:
    """What a client sent. Raises WireError (``protocol``) for anything else."""
    return _decode(_client_decoder, frame)


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


def check_protocol(protocol: int) -> None:
    """Raise WireError (``version``) unless the peer speaks this PROTOCOL_VERSION."""
    if protocol != PROTOCOL_VERSION:
        older = "client" if protocol < PROTOCOL_VERSION else "receiver"
        raise WireError(
            E_VERSION,
            f"the client speaks wire protocol {protocol}, this receiver {PROTOCOL_VERSION}: "
            f"upgrade vllm-mac-decode on the {older}'s machine",
        )
