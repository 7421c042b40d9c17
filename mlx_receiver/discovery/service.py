"""What a receiver says of itself on the network, as the TXT record of its DNS-SD service.

Anybody on the network can say anything there: it is read as such, and is a hint and nothing more.
Who a receiver is, the keys prove when a connection is made; whether the models are the same, Hello.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mlx_receiver.wire.ranges import Count, Name
from mlx_receiver.wire.seldom import printable

#: The service type of RFC 6763.
SERVICE_TYPE: Final = "_mlx-receiver._tcp.local."

#: What a receiver says that has no model yet and takes the client's.
ANY_MODEL: Final = "any"

#: Bytes of one ``key=value``: its length is one byte.
_LONGEST: Final = 255
#: Bytes of a TXT record that is read at all: some keys more than there are today.
_LONGEST_RECORD: Final = 4096

Instance = Annotated[str, Meta(pattern=r"^[0-9a-f]{8,64}\Z")]
#: A public CURVE key in Z85, or none.
PublicKey = Annotated[str, Meta(pattern=r"^([!-~]{40})?\Z")]
HttpPort = Annotated[int, Meta(ge=0, le=65535)]


class Announced(msgspec.Struct, frozen=True):
    """What is announced beside the addresses and the control port.

    ``instance`` tells receivers' machines apart and ``name`` is for people. ``paired``: clients can
    connect as it is, because a machine is paired with it or none has to be. ``http_port`` 0 is no
    HTTP, ``key`` the receiver's public CURVE key, where there is one.
    """

    protocol: Count
    instance: Instance
    name: Name = ""
    model: Name = ANY_MODEL
    paired: bool = False
    http_port: HttpPort = 0
    key: PublicKey = ""


#: The keys of the TXT record; a later version may add others.
_KEYS: Final = {
    "protocol": "v",
    "instance": "id",
    "name": "name",
    "model": "model",
    "paired": "paired",
    "http_port": "http",
    "key": "key",
}
_FIELDS: Final = {key.encode(): field for field, key in _KEYS.items()}


def encode(announced: Announced) -> bytes:
    """The TXT record; what is too long for it is cut, what cannot be printed becomes a space."""
    record = b""
    for field, key in _KEYS.items():
        value = getattr(announced, field)
        text = printable(value) if isinstance(value, str) else str(int(value))
        pair = cut(f"{key}={text}", _LONGEST).encode()
        record += bytes([len(pair)]) + pair
    return record


def decode(record: bytes) -> Announced | None:
    """What a TXT record says, None for one that is not a receiver's; unknown keys are ignored.

    One of a later protocol is read as well, so that people can be told which side to update.
    """
    if len(record) > _LONGEST_RECORD:
        return None
    values: dict[str, str] = {}
    try:
        while record:
            length = 1 + record[0]
            pair, record = record[1:length], record[length:]
            key, equals, value = pair.partition(b"=")
            field = _FIELDS.get(key.lower())
            # RFC 6763, 6.4: the first one counts. One without "=" has no value.
            if field is not None and equals and field not in values:
                values[field] = value.decode()
        if any(text != printable(text) for text in values.values()):
            return None
        values.setdefault("name", values.get("instance", ""))
        return msgspec.convert(values, Announced, strict=False)
    except (UnicodeDecodeError, msgspec.ValidationError):
        return None


def cut(text: str, nbytes: int) -> str:
    """As much of the text as ``nbytes`` of UTF-8 hold."""
    return text.encode(errors="ignore")[:nbytes].decode(errors="ignore")


def why_not(
    announced: Announced, model: str, protocol: int, known: Collection[str] | None = None
) -> str:
    """Why this side, of that protocol and with that model, cannot use a receiver, in words; "" if
    it can. ``model`` "" is any; ``known`` are the keys that this machine is paired with, None where
    that is not asked. A receiver that announces no key has a token.

    Models are compared by the last part of their names, since one side may name a folder.
    """
    if announced.protocol != protocol:
        here = announced.protocol > protocol
        return (
            f"it speaks protocol {announced.protocol}, this side {protocol}: update "
            f"vllm-mac-decode {'here' if here else 'on its machine'}"
        )
    reasons = []
    if model and announced.model != ANY_MODEL and _last(announced.model) != _last(model):
        reasons.append(f"it serves {announced.model}, not {model}")
    stranger = known is not None and announced.key and announced.key not in known
    if not announced.paired or stranger:
        reasons.append(
            f"it is not paired{' with this machine' if stranger else ''}: `mlx-receiver pair` on "
            "its machine shows the code for `mac-decode pair`"
        )
    return "; ".join(reasons)


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].casefold()
