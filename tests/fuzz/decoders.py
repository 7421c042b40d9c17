"""Every decoder of the wire: what it lets through is what the code behind it may rely on.

The rules are written here once more, by hand and by the place where a value is used, so that a type
that forgets its range is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, get_args

import msgspec
from hypothesis import strategies as st

from mlx_receiver.wire import codec, frames, trust
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.handshake import introduction
from tests.fuzz.structures import VOCABULARY, right, variants


def tagged(kinds: Iterable[Any]) -> st.SearchStrategy[tuple[Any, Any]]:
    """A type among these and a right value of it."""
    return st.one_of([right(kind).map(lambda value, kind=kind: (kind, value)) for kind in kinds])


def packed(value: Any) -> bytes | None:
    """The value as msgpack; None for what no peer can encode."""
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, msgspec.MsgspecError, UnicodeEncodeError):
        return None


def _decoded(drawn: tuple[Any, Any], decode: Callable[[bytes], Any], rely: Any) -> int:
    kind, value = drawn
    count = 0
    for index, variant in enumerate(variants(kind, value)):
        count += 1
        if (data := packed(variant)) is None:
            continue
        try:
            message = decode(data)
            if isinstance(message, msgspec.Struct):
                trust.check(message, VOCABULARY)
        except m.WireError:
            assert index, f"refused although it is right: {value}"
            continue
        rely(message)
    return count


def client_messages(drawn: tuple[Any, Any]) -> int:
    """What vLLM's side sends to the receiver."""
    return _decoded(drawn, codec.decode_client, _rely_on_client)


def receiver_messages(drawn: tuple[Any, Any]) -> int:
    """What the receiver sends to vLLM's side."""
    return _decoded(drawn, codec.decode_receiver, _rely_on_receiver)


def _token(value: Any) -> None:
    assert type(value) is int and 0 <= value < VOCABULARY


def _rely_on_client(message: m.ClientMessage) -> None:
    match message:
        case m.Open():
            assert 0 <= message.session < 1 << 63 and message.prompt_token_ids
            for token in message.prompt_token_ids:
                _token(token)
            _rely_on_sampling(message.sampling)
            assert len(message.request_id) <= 1024
        case m.Start():
            _token(message.first_token)
        case m.Hello():
            try:
                me = introduction(message)
            except m.WireError:
                return
            assert len(me.signature.rope) <= 64
            assert 1 <= len(me.layout.layers) <= 4096
            parts = [part for layer in me.layout.layers for part in layer.parts]
            assert parts and all(1 <= part.row <= 1 << 40 for part in parts)


def _rely_on_sampling(s: m.Sampling) -> None:
    assert 1 <= s.max_tokens < 1 << 31 and 0 <= s.min_tokens < 1 << 31
    assert 0 <= s.temperature < math.inf and 0 < s.top_p <= 1 and 0 <= s.min_p <= 1
    assert 0 <= s.top_k < 1 << 31 and 0 < s.repetition_penalty < math.inf
    assert math.isfinite(s.presence_penalty) and math.isfinite(s.frequency_penalty)
    assert s.seed is None or -(1 << 63) <= s.seed < 1 << 63
    assert s.logprobs is None or 0 <= s.logprobs <= 20
    assert s.allowed_token_ids is None or s.allowed_token_ids
    assert len(s.bad_words_token_ids or ()) <= 128 and all(s.bad_words_token_ids or ())
    assert all(map(math.isfinite, (s.logit_bias or {}).values()))
    ends = s.stop_token_ids if s.eos_token_id is None else [*s.stop_token_ids, s.eos_token_id]
    words = [token for word in s.bad_words_token_ids or () for token in word]
    for token in [*ends, *(s.allowed_token_ids or ()), *(s.logit_bias or ()), *words]:
        _token(token)


def _rely_on_receiver(message: m.ReceiverMessage) -> None:
    match message:
        case m.Step():
            assert len(message.decoded) <= 4096
            for decoded in message.decoded:
                assert decoded.position >= 0 and decoded.finish in ("", "stop", "length")
                assert len(decoded.token_ids) <= 64
                for token in decoded.token_ids:
                    _token(token)
                if decoded.stop_reason is not None:
                    _token(decoded.stop_reason)
                for row in decoded.logprobs or ():
                    assert row.token_ids and row.values and 1 <= row.rank < 1 << 31
                    assert not any(map(math.isnan, row.values))
                    for token in row.token_ids:
                        _token(token)
        case m.Rejected():
            # A later version may have a reason of its own.
            assert len(message.code) <= 1024 and len(message.reason) <= 4096
        case m.Refused() | m.Failed():
            assert message.code in get_args(m.Code) and len(message.reason) <= 4096
        case m.Status():
            assert len(message.sessions) <= 4096 and message.free_bytes >= 0
            assert all(p.kv_bytes >= 0 and p.tokens >= 0 for p in message.sessions)
        case m.Welcome():
            assert len(message.ticket.key) == 32 and 1 <= len(message.ticket.client) <= 64
            assert all(1 <= endpoint.port < 1 << 16 for endpoint in message.endpoints)
            assert message.max_tokens >= 1
        case m.Complete():
            assert message.kv_bytes >= 0


_PAYLOADS: dict[Any, Callable[[bytes], Any]] = {
    frames.DataHello: frames.hello_decoder.decode,
    frames.DataChallenge: frames.challenge_decoder.decode,
    frames.DataProof: frames.proof_decoder.decode,
    frames.DataReply: frames.decode_reply,
}


def data_payloads(drawn: tuple[Any, Any]) -> int:
    """The small payloads of the data channel."""

    def decode(data: bytes) -> Any:
        try:
            return _PAYLOADS[drawn[0]](data)
        except msgspec.MsgspecError as error:
            raise m.WireError(m.E_PROTOCOL, str(error)) from None

    def rely(message: Any) -> None:
        if isinstance(message, frames.DataHello):
            assert 1 <= len(message.client) <= 64 and len(message.nonce) == 32
            assert message.level in ("clear", "signed", "sealed")
        elif isinstance(message, frames.DataChallenge | frames.DataProof):
            assert len(message.proof) == 32

    return _decoded(drawn, decode, rely)


#: One value for each field of a frame's header, mostly small.
header_fields = st.tuples(
    st.sampled_from([frames.MAGIC, frames.MAGIC, frames.MAGIC, b"MDKX", b"\0\0\0\0"]),
    st.sampled_from([3, 3, 3, 2, 4, 0xFFFF]),
    st.integers(0, 9),
    st.sampled_from([*range(8), 255]),
    st.sampled_from([0, 1, 7, 2**63 - 1, 2**63, 2**64 - 1]),
    *[st.sampled_from([0, 1, 2, 3, 4, 64, 0x7FFF, 0xFFFF])] * 4,
    *[st.sampled_from([0, 1, 2, 16, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1])] * 4,
    *[st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])] * 3,
)

_EDGES = {"B": 8, "H": 16, "I": 32, "Q": 64}


def headers(fields: tuple[Any, ...]) -> int:
    """Frame headers: each field at every edge of its width, and sizes that fit the shape."""
    heads, dim, tokens = fields[7], fields[8], fields[10]
    count = 0
    for place, code in enumerate("4HBBQHHHHIIIIqqq"):
        if code not in _EDGES:
            continue
        top = (1 << _EDGES[code]) - 1
        for value in (0, 1, 2, 3, top >> 1, (top >> 1) + 1, top, heads * dim * tokens * 2 & top):
            changed = (*fields[:place], value, *fields[place + 1 :])
            count += 1
            try:
                header = frames.unpack_client(frames._HEADER.pack(*changed))
            except m.WireError:
                continue
            assert header.kind in (frames.Kind.ATTACH, frames.Kind.BLOCK, frames.Kind.PROBE)
            assert header.payload_bytes <= frames.MAX_PAYLOAD
            if header.kind is frames.Kind.BLOCK:
                size = header.heads * header.tokens * header.width
                assert header.payload_bytes == size * frames.ITEMSIZE[header.dtype] > 0
            elif header.kind is frames.Kind.ATTACH:
                assert not header.payload_bytes
            assert 0 <= header.session < 1 << 63
    return count
