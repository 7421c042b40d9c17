"""Which rows of a session's cache have arrived, by layer, part, head and token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mlx_receiver.wire.frames import Header
from mlx_receiver.wire.layout import ITEMSIZE, NOTHING, CacheLayout, Held, Part

ABSENT: Final = 0
ARRIVING: Final = 1
RESIDENT: Final = 2
#: There, because the receiver computed it. vLLM's may still come: it differs in low bits.
COMPUTED: Final = 3

#: A block's or a piece's marks, and which of them were absent.
Claim = tuple[NDArray[np.uint8], NDArray[np.bool_]]

#: Tokens whose marks are looked at together.
_LOOK: Final = 1024


class Coverage:
    """A mark for every row that must come. Used with the session's lock held."""

    def __init__(self, layout: CacheLayout, tokens: int, held: Held = NOTHING) -> None:
        """Of a prompt of so many tokens: only what is ``held`` is there."""
        self._layout = layout
        self._tokens = tokens
        self._held = held
        #: Rows that did not come, and bytes of the marks, which ``forget`` frees.
        self.absent = self.nbytes = layout.cells(tokens, held)
        #: Bytes of rows that were computed.
        self.computed_bytes = 0
        marks: NDArray[np.uint8] = np.zeros(self.nbytes, np.uint8)
        self._parts: list[list[NDArray[np.uint8]]] = []
        start = 0
        for layer in layout.layers:
            found = []
            for part in layer.parts:
                shape = (part.heads, part.travels(tokens, held))
                end = start + shape[0] * shape[1]
                found.append(marks[start:end].reshape(shape))
                start = end
            self._parts.append(found)

    def part(self, header: Header) -> Part | None:
        """The part that the block belongs to, if the model has one there."""
        layers = self._layout.layers
        if header.layer >= len(layers) or header.part >= len(layers[header.layer].parts):
            return None
        return layers[header.layer].parts[header.part]

    def at(self, header: Header) -> NDArray[np.uint8]:
        """The block's marks, ``[heads, tokens]``."""
        heads, rows = self.extent(header)
        there = self._there(self._layout.layers[header.layer].parts[header.part])
        if rows.start < there:
            return np.broadcast_to(np.uint8(RESIDENT), (header.heads, header.tokens))
        marks = self._parts[header.layer][header.part]
        return marks[heads, rows.start - there : rows.stop - there]

    def extent(self, header: Header) -> tuple[slice, slice]:
        """A block's heads and rows in its part; it must be one that is not ``wrong``."""
        first = self._layout.layers[header.layer].parts[header.part].first(self._tokens)
        start = header.token_start - first
        return (
            slice(header.head_start, header.head_start + header.heads),
            slice(start, start + header.tokens),
        )

    def arrived(self, marks: NDArray[np.uint8]) -> int:
        """Note that a block is there; how many of its rows are new."""
        missing = marks < RESIDENT
        new = int(np.count_nonzero(missing))
        if new:
            marks[missing] = RESIDENT
        self.absent -= new
        return new

    # --- what is computed: of layouts whose parts keep every token ------------------------------

    def gap(self, start: int, most: int) -> tuple[int, int]:
        """The first tokens from ``start`` on of which something is missing, ``most`` of them at
        the most: the first one, and the one behind the last. Both are the prompt's end where
        nothing is missing."""
        for begin in range(max(start, self._held.tokens), self._tokens, _LOOK):
            missing = self._missing(begin, min(begin + _LOOK, self._tokens))
            if missing.any():
                first = begin + int(missing.argmax())
                behind = self._missing(first, min(first + most, self._tokens))
                return first, first + (len(behind) if behind.all() else int(behind.argmin()))
        return self._tokens, self._tokens

    def _missing(self, start: int, end: int) -> NDArray[np.bool_]:
        """For each of these tokens whether one of its rows is missing."""
        missing = np.zeros(end - start, bool)
        there = self._held.tokens
        for layer in self._parts:
            for marks in layer:
                missing |= (marks[:, start - there : end - there] < RESIDENT).any(axis=0)
        return missing

    def claim(self, start: int, end: int) -> list[list[Claim]]:
        """Note that what is absent of these tokens is being written, for each part of each layer;
        ``computed`` or ``absent_again`` follows."""
        there = self._held.tokens
        claims = []
        for layer in self._parts:
            found = []
            for marks in layer:
                piece = marks[:, start - there : end - there]
                absent = piece == ABSENT
                piece[absent] = ARRIVING
                found.append((piece, absent))
            claims.append(found)
        return claims

    def computed(self, claims: Sequence[Sequence[Claim]]) -> None:
        """What was claimed is there."""
        for layer, found in zip(self._layout.layers, claims, strict=True):
            for part, (piece, absent) in zip(layer.parts, found, strict=True):
                piece[absent] = COMPUTED
                new = int(np.count_nonzero(absent))
                self.absent -= new
                self.computed_bytes += new * part.width * ITEMSIZE[part.dtype]

    def absent_again(self, claims: Sequence[Sequence[Claim]]) -> None:
        """What was claimed could not be written."""
        for found in claims:
            for piece, absent in found:
                piece[absent] = ABSENT

    def forget(self) -> None:
        """Let go of the marks: everything is there, or nothing will come any more."""
        mark = np.uint8(COMPUTED if self.computed_bytes else RESIDENT)
        self._parts = [
            [np.broadcast_to(mark, marks.shape) for marks in layer] for layer in self._parts
        ]

    def missing(self) -> str:
        """The first hole in words; "" when there is none."""
        # Part by part: a list of all holes would be larger than the cache.
        for layer, parts in enumerate(self._parts):
            for index, marks in enumerate(parts):
                holes = marks < RESIDENT
                if not holes.any():
                    continue
                head, token = map(int, np.unravel_index(holes.argmax(), holes.shape))
                row = holes[head, token:]
                last = token + (len(row) if row.all() else int(row.argmin())) - 1
                part = self._layout.layers[layer].parts[index]
                first = part.first(self._tokens) + self._there(part)
                return (
                    f"layer {layer}, {part.name}, head {head}, "
                    f"{'tokens' if part.by_token else 'rows'} {first + token}..{first + last} "
                    f"({self.absent} of {self.nbytes} cells are missing)"
                )
        return ""

    def wrong(self, header: Header) -> str:
        """What of the block's place or form the model does not have; "" if it is right."""
        part = self.part(header)
        if part is None:
            layers = self._layout.layers
            if header.layer >= len(layers):
                return f"the model has {len(layers)} layers"
            return f"the layer has {len(layers[header.layer].parts)} parts"
        if header.width != part.width:
            return f"a row is of {header.width} numbers, the model's of {part.width}"
        if header.dtype != part.dtype:
            return f"dtype is {header.dtype}, agreed was {part.dtype}"
        if header.head_start + header.heads > part.heads:
            return f"the model has {part.heads} KV heads"
        first = part.first(self._tokens)
        if header.token_start + header.tokens > first + part.tokens(self._tokens):
            has = f"the prompt has {self._tokens} tokens"
            return has if part.by_token else f"it has {part.rows} rows and no tokens"
        if header.token_start < first:
            return f"the layer's window begins at token {first}"
        begin = first + self._there(part)
        if header.token_start < begin < header.token_start + header.tokens:
            return f"tokens up to {begin - 1} are held, and it reaches across"
        return ""

    def _there(self, part: Part) -> int:
        """Rows of each head of a part that need not come."""
        return part.tokens(self._tokens) - part.travels(self._tokens, self._held)
