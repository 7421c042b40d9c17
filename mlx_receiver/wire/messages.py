"""Control messages: the whole conversation between vLLM and the receiver.

vLLM's scheduler process is the client (ZeroMQ DEALER), the receiver the server (ROUTER).
A conversation::

    client                                   receiver
    Hello(protocol, payload)        ->
                                    <-       Welcome(endpoints, features) | Rejected(reason)
    Open(session, prompt, sampling) ->
                                    <-       Opened(session) | Refused(session, reason)
       ... KV blocks arrive on the data channel (``frames``) ...
                                    <-       Complete(session)
    Start(session, first_token)     ->
                                    <-       Step([Decoded(session, ...), ...]) once a decode step
    Cancel(session)                 ->
                                    <-       Failed(session, reason) when the receiver gives up
    Open(session, compute all)      ->
                                    <-       Opened, then Complete and Step without Start
    Open(session, compute="front")  ->
       ... KV comes from the end, the receiver computes from the front ...
                                    <-       Complete(session) once the two have met
    Open(session, proof) .. Start   ->
                                    <-       Proven(session, same, text) instead of Step
    Ping                            ->
                                    <-       Status(capacity, progress)

Every message is one msgpack frame of one tagged struct. Nothing is pickled. The connection itself
is authenticated and encrypted (``keys``), so no message carries the token. Ranges and lengths stand
in the types: ``codec`` refuses what is outside them, and
``trust.check`` what depends on the model.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from mlx_receiver.wire.layout import NOTHING, Held
from mlx_receiver.wire.profile import Profile
from mlx_receiver.wire.ranges import (
    MAX_LOGPROBS,
    MAX_PROOF_TOKENS,
    MAX_ROWS,
    MAX_STEP_TOKENS,
    MAX_TEXT,
    Bytes,
    Count,
    Logprob,
    Name,
    Nanoseconds,
    Port,
    Positive,
    SessionId,
    Text,
    TokenId,
)
from mlx_receiver.wire.sampling import Sampling

#: Version of everything under ``mlx_receiver.wire``. Both sides must have the same one.
#: 1: first release.
#: 2: connections are authenticated by keys instead of a token in Hello and HELLO; every value has a
#: range; a session that waits for room in the batch says so; the cache's layout is data, and blocks
#: name a part of it; Hello is an envelope that every later version can read.
#: 3: frames of ``tcp`` data connections are authenticated and encrypted; HELLO says at which level,
#: and an Endpoint whether its receiver allows less.
#: 4: equal layouts are not enough: Welcome names tokens whose cache is compared with the receiver's
#: own before anything is handed off.
#: 5: a part's numbers may be 8-bit floats, with a scale. One that is not indexed by token has rows:
#: the states of convolutions have one for each channel, so that a worker can send its own.
#: 6: of a prompt that begins like an earlier text only the rest travels (``Held``). Sampling has a
#: grammar that the text conforms to, the tokens that may end it, and those whose log-probabilities
#: are wanted.
#: 7: a session's KV may come in another codec, the receiver may compute some or all of the prompt
#: itself (``Open.compute``), and Welcome says how fast it is.
#: Sampling may have a budget for the model's reasoning.
PROTOCOL_VERSION: Final = 7

#: Largest control message accepted, in bytes: a prompt of a million tokens fits.
MAX_MESSAGE_BYTES: Final = 16 << 20


class WireError(Exception):
    """The peer sent something that this side does not accept.

    ``code`` is one of the ``E_*`` names below, for metrics; the text is for people.
    """

    def __init__(self, code: Code, reason: str) -> None:
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

#: The same as a type: a peer cannot make up others, which would become labels of metrics.
Code = Literal[
    "version", "credentials", "model", "capacity", "unsupported", "session", "block", "protocol",
    "internal", "shutdown",
]  # fmt: skip

#: Why a text ends; "" while it goes on.
FinishReason = Literal["", "stop", "length"]


def clipped(text: str, limit: int = MAX_TEXT) -> str:
    """The text, shortened to what a message may carry."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


#: What the receiver computes of a prompt whose session is opened.
Compute = Literal["nothing", "front", "all"]


class Endpoint(msgspec.Struct, frozen=True):
    """Where a data transport listens. The client takes the control connection's host, whatever
    ``host`` says: workers connect nowhere else.

    ``nonce`` names this listener, so that a proof made for it is worth nothing elsewhere. ``plain``
    allows KV that is not encrypted between machines; to be used only where the client allows it,
    too.
    """

    transport: Name
    host: Name
    port: Port
    nonce: Annotated[bytes, Meta(max_length=64)] = b""
    plain: bool = False


# --- client to receiver -------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a connection: an envelope, which stays as it is in every version.

    ``payload`` is a packed ``handshake.Introduction``, for whoever speaks that ``protocol``.
    """

    protocol: int
    payload: Annotated[bytes, Meta(max_length=1 << 20)] = b""


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Ask for a session. ``session`` is a random number below 2**63, chosen by the client.

    ``prompt_token_ids`` are the tokens whose KV will arrive; the receiver never tokenises.
    What was kept of earlier texts is used only for prompts of the same client, ``salt`` and
    ``codec`` (``quantised``).
    An ``unclaimed`` session gets no Start: it waits for whoever shows its id over HTTP, with a
    first token and sampling of their own, and expires if nobody does. Of a ``proof`` nothing is
    decoded: ``Proven`` tells whether the receiver computes the same cache itself.
    What of the prompt the receiver is to ``compute``: nothing; the "front", until it meets the KV
    that comes from the end; or "all", and no KV comes, no Start either, and its first token is the
    receiver's. ``plan`` says for people why that was chosen.
    """

    session: SessionId
    request_id: Name
    prompt_token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    sampling: Sampling
    codec: Name = "raw"
    unclaimed: bool = False
    proof: bool = False
    salt: Name = ""
    compute: Compute = "nothing"
    plan: Text = ""


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first output token, sampled by vLLM. Decoding starts once the cache is complete."""

    session: SessionId
    first_token: TokenId


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Forget the session and free what it holds. Unknown sessions are ignored."""

    session: SessionId
    reason: Text = ""


class DataPath(msgspec.Struct, frozen=True):
    """Which of the receiver's addresses the client sends blocks to, and what it measured there:
    bytes a second, nanoseconds for a word and its answer, the largest packet (0: not known)."""

    host: Name
    rate: Bytes
    round_trip_ns: Nanoseconds
    mtu: Count = 0

    @property
    def text(self) -> str:
        """For people."""
        mtu = f", MTU {self.mtu}" if self.mtu else ""
        return (
            f"{self.host} ({8e-9 * self.rate:.2f} Gbit/s, {1e-6 * self.round_trip_ns:.1f} ms{mtu})"
        )


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Sent while the client is alive; a silent client's sessions are dropped. ``path`` is where its
    blocks go, if it has measured that: the receiver shows it."""

    sent_ns: Nanoseconds
    path: DataPath | None = None


# --- receiver to client -------------------------------------------------------------------


class DataTicket(msgspec.Struct, frozen=True):
    """What the client's workers show on the data channel: it belongs to this connection alone."""

    client: Annotated[str, Meta(min_length=1, max_length=64)]
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The client may open sessions. ``receiver`` changes when the receiver restarts.

    ``proof_token_ids`` is the prompt of the proof that the two engines' caches are the same; empty
    where that is known. ``profile`` says how fast the receiver computes the model; None while it
    does not know that.
    """

    receiver: Name
    model: Name
    engine: Name  # e.g. "mlx 0.32.4"
    endpoints: Annotated[list[Endpoint], Meta(max_length=16)]
    ticket: DataTicket
    max_tokens: Positive  # longest prompt + output that one session may have
    codecs: Annotated[list[Name], Meta(max_length=64)]
    proof_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_PROOF_TOKENS)] = []
    profile: Profile | None = None


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """Answer to a Hello that cannot be served; ``reason`` names what differs and what to do.

    It stays as it is in every version, too; ``code`` may be one that only a later one knows.
    """

    code: Name
    reason: Text


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The session's memory is reserved. What is ``held`` already need not be sent."""

    session: SessionId
    held: Held = NOTHING


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The session is not accepted; the client decodes it itself."""

    session: SessionId
    code: Code
    reason: Text


class Complete(msgspec.Struct, frozen=True, tag="complete"):
    """Every (layer, token, head) of the session's cache is resident: ``kv_bytes`` of it came, and
    where the receiver computes the front, ``computed_bytes`` are its own. What is still to be sent
    is not wanted any more. Where it computes all, so many tokens were ``computed``."""

    session: SessionId
    kv_bytes: Bytes
    computed_bytes: Bytes = 0
    computed: Count = 0


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of one sampled token, before temperature and penalties.

    The sampled token comes first, then the ``Sampling.logprobs`` likeliest tokens in falling
    order. ``rank`` is the sampled token's rank among the vocabulary, 1 for the likeliest.
    """

    token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_LOGPROBS + 1)]
    values: Annotated[list[Logprob], Meta(min_length=1, max_length=MAX_LOGPROBS + 1)]
    rank: Positive


class Decoded(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one session.

    ``position`` counts output tokens: vLLM's own first token, where there is one, is 0, so the
    first one decoded by the receiver is 1. ``finish`` is "" while the text goes on, else "stop" or
    "length".
    """

    session: SessionId
    position: Count
    token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STEP_TOKENS)]
    finish: FinishReason = ""
    stop_reason: TokenId | None = None
    logprobs: Annotated[list[Logprobs], Meta(max_length=MAX_STEP_TOKENS)] | None = None


class Step(msgspec.Struct, frozen=True, tag="step"):
    """What one decode step produced for this client's sessions."""

    decoded: Annotated[list[Decoded], Meta(max_length=MAX_ROWS)]


class Proven(msgspec.Struct, frozen=True, tag="proven"):
    """What comparing a proof's cache gave: whether it is the ``same`` as the receiver's own, and in
    words how far apart they are."""

    session: SessionId
    same: bool
    text: Text


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The receiver gave the session up and has freed it."""

    session: SessionId
    code: Code
    reason: Text


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """One session as the receiver sees it; ``kv_bytes`` of its cache came or were computed.

    ``receiving``: its cache is incomplete; ``waiting``: for Start; ``queued``: for room in the
    batch; ``decoding``: in it. ``computed``: tokens of the prompt that the receiver has computed.
    """

    session: SessionId
    state: Literal["receiving", "waiting", "queued", "decoding", "ended"]
    kv_bytes: Bytes
    tokens: Count
    computed: Count = 0


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Answer to a Ping: proof of life, capacity, and each of the client's sessions.

    ``load`` is how many texts the receiver is working on or waiting for, whoever asked for them.
    ``ping_ns`` returns the Ping's own time and ``clock_ns`` the receiver's monotonic clock, so
    that the client can put both sides' times on one axis. ``profile`` is there when it is another
    than the client was told.
    """

    ping_ns: Nanoseconds
    clock_ns: Nanoseconds
    accepting: bool
    free_bytes: Bytes
    sessions: Annotated[list[Progress], Meta(max_length=MAX_ROWS)]
    load: Count = 0
    profile: Profile | None = None


ClientMessage = Hello | Open | Start | Cancel | Ping
ReceiverMessage = Welcome | Rejected | Opened | Refused | Complete | Step | Proven | Failed | Status
