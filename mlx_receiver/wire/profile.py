"""How fast one side computes one model: what it measured, as it tells the other side.

Three numbers for each of the two phases, since that is what a transformer's time is made of: every
step has a cost of its own (kernels are launched, and in decoding every weight is read once), every
token one (its matrix products), and every pair of a token and an earlier one (attention).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(ge=0, le=1e6)]

_Name = Annotated[str, Meta(max_length=1024)]
_Bytes = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]

#: Bytes of raw KV a second.
Rate = Annotated[float, Meta(ge=0, le=1e18)]

#: Where numbers come from: measured by forwards of the model's own, the same corrected by what
#: requests took since, or calculated from what the device's maker says.
Source = Literal["measured", "live", "hardware"]


class Prefill(msgspec.Struct, frozen=True):
    """Prefilling one text: ``step`` seconds for each chunk of ``chunk`` tokens at most, ``token``
    for each new token, ``pair`` for each new token and token before it."""

    step: Seconds
    token: Seconds
    pair: Seconds
    chunk: _Tokens

    def seconds(self, new: int, context: int = 0) -> float:
        """Of ``new`` tokens behind ``context`` others whose cache is there."""
        pairs = new * context + new * new / 2
        return math.ceil(new / self.chunk) * self.step + new * self.token + pairs * self.pair


class Decode(msgspec.Struct, frozen=True):
    """One decode step of a batch: ``step`` seconds, ``row`` for each text in it, ``context`` for
    each token that those texts have."""

    step: Seconds
    row: Seconds
    context: Seconds

    def seconds(self, context: int, rows: int = 1) -> float:
        """With ``rows`` texts of ``context`` tokens each."""
        return self.step + rows * (self.row + context * self.context)

    def text(self, context: int, tokens: int, rows: int = 1) -> float:
        """Of ``tokens`` steps of texts that grow by one token in each, from ``context`` on."""
        return tokens * self.seconds(context + tokens // 2, rows)


class Coding(msgspec.Struct, frozen=True):
    """How fast one thread of a side quantises KV, where that is vLLM's, or makes raw KV of it
    again, where it is the receiver's: bytes of raw KV a second in each codec; 0: not known.

    ``threads``: so many times as fast are all of them together. vLLM's side has one in each worker;
    the receiver has one for each connection, of which more than that many do not help.
    """

    q8: Rate = 0.0
    q4: Rate = 0.0
    threads: Annotated[float, Meta(ge=1, le=65536)] = 1.0

    def rate(self, codec: str) -> float:
        """Of one thread in the codec of that name; 0 where it is not known."""
        return {"q8": self.q8, "q4": self.q4}.get(codec, 0.0)


class Profile(msgspec.Struct, frozen=True):
    """One side. ``kv_bytes`` is the memory that it has for caches, ``bandwidth`` what a decode step
    reads of its memory in a second (0: not known), ``coding`` how fast it quantises."""

    device: _Name
    model: _Name
    prefill: Prefill
    decode: Decode
    source: Source = "measured"
    kv_bytes: _Bytes = 0
    bandwidth: _Bytes = 0
    coding: Coding = Coding()
