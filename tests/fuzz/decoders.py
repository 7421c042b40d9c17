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
from mlx_receiver.wire.quantised import BITS, CODECS, row_bytes
from mlx_receiver.wire.sampling import Sampling
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


def _rely_on_sampling(s: Sampling) -> None:
    assert 1 <= s.max_tokens < 1 << 31 and 0 <= s.min_tokens < 1 << 31
    assert 0 <= s.temperature < math.inf and 0 < s.top_p <= 1 and 0 <= s.min_p <= 1
    assert 0 <= s.top_k < 1 << 31 and 0 < s.repetition_penalty < math.inf
    assert math.isfinite(s.presence_penalty) and math.isfinite(s.frequency_penalty)
    assert s.seed is None or -(1 << 63) <= s.seed < 1 << 63
    assert s.logprobs is None or 0 <= s.logprobs <= 20
    assert s.allowed_token_ids is None or s.allowed_token_ids
    assert len(s.bad_words_token_ids or ()) <= 128 and all(s.bad_words_token_ids or ())
    assert all(map(math.isfinite, (s.logit_bias or {}).values()))
    grammar = s.grammar
    assert grammar is None or len(grammar.text) <= 1 << 17
    assert len(s.logprob_token_ids) <= 20 and len(s.end_token_ids) <= 1024
    after = [] if grammar is None or grammar.after is None else [grammar.after]
    told = s.thinking
    marks = [] if told is None else [told.start, told.end, told.forced]
    assert all(1 <= len(mark) <= 1024 for mark in marks)
    assert told is None or (0 <= told.budget < 1 << 31 and told.runner in ("v1", "v2"))
    for token in [*s.logprob_token_ids, *s.ends, *after]:
        _token(token)
    for mark in marks:
        for token in mark:
            _token(token)
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
    st.sampled_from([*[m.PROTOCOL_VERSION] * 3, m.PROTOCOL_VERSION - 1, 0xFFFF]),
    # The kind, and above it the codec.
    st.sampled_from([*range(10), 3, 3, 3, 0x13, 0x13, 0x23, 0x23, 0x12, 0x33, 0xF3]),
    # The part, and above it the dtype.
    st.sampled_from([*range(8), 0x10, 0x20, 0x21, 0x30, 0x50, 255]),
    st.sampled_from([0, 1, 7, 2**63 - 1, 2**63, 2**64 - 1]),
    *[st.sampled_from([0, 1, 2, 3, 4, 64, 0x7FFF, 0xFFFF])] * 4,
    *[st.sampled_from([0, 1, 2, 16, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1])] * 4,
    *[st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])] * 3,
)

_EDGES = {"B": 8, "H": 16, "I": 32, "Q": 64}


def headers(fields: tuple[Any, ...]) -> int:
    """Frame headers: each field at every edge of its width, and sizes that fit the shape."""
    heads, dim, tokens = fields[7], fields[8], fields[10]
    sizes = [heads * tokens * dim * 2]
    sizes += [heads * tokens * row_bytes(c, d, dim) for c in BITS for d in ("float16", "float32")]
    count = 0
    for place, code in enumerate("4HBBQHHHHIIIIqqq"):
        if code not in _EDGES:
            continue
        top = (1 << _EDGES[code]) - 1
        fitting = [size & top for size in sizes]
        for value in (0, 1, 2, 3, top >> 1, (top >> 1) + 1, top, *fitting):
            changed = (*fields[:place], value, *fields[place + 1 :])
            count += 1
            try:
                header = frames.unpack_client(frames._HEADER.pack(*changed))
            except m.WireError:
                continue
            assert header.kind in (frames.Kind.ATTACH, frames.Kind.BLOCK, frames.Kind.PROBE)
            assert header.payload_bytes <= frames.MAX_PAYLOAD
            if header.kind is frames.Kind.BLOCK:
                rows, numbers = header.heads * header.tokens, header.width
                size = rows * numbers * frames.ITEMSIZE[header.dtype]
                assert 0 < size <= frames.MAX_PAYLOAD, "what it is once it is decoded"
                if header.codec == "raw":
                    assert header.payload_bytes == size
                else:
                    assert header.dtype in ("bfloat16", "float16", "float32")
                    assert numbers % 64 == 0
                    ends = 2 * (numbers // 64) * frames.ITEMSIZE[header.dtype]
                    packed = numbers // {"q8": 1, "q4": 2}[header.codec]
                    assert header.payload_bytes == rows * (packed + ends) < size
            elif header.kind is frames.Kind.ATTACH:
                assert not header.payload_bytes
            assert 0 <= header.session < 1 << 63 and header.codec in CODECS
            assert header.codec == "raw" or header.kind is frames.Kind.BLOCK
            assert frames.unpack(header.pack()) == header
    return count
