"""Which rows of a session's cache have arrived, by layer, part, head and token."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mlx_receiver.wire.frames import Header
from mlx_receiver.wire.layout import CacheLayout, Part

ABSENT: Final = 0
ARRIVING: Final = 1
RESIDENT: Final = 2


class Coverage:
    """A mark for every row. Used with the session's lock held."""

    def __init__(self, layout: CacheLayout, tokens: int) -> None:
        """Of a prompt of so many tokens: nothing has arrived."""
        self._layout = layout
        self._tokens = tokens
        self.absent = layout.cells(tokens)
        self._total = self.absent
        marks: NDArray[np.uint8] = np.zeros(self.absent, np.uint8)
        self._parts: list[list[NDArray[np.uint8]]] = []
        start = 0
        for layer in layout.layers:
            found = []
            for part in layer.parts:
                shape = (part.heads, part.tokens(tokens))
                end = start + shape[0] * shape[1]
                found.append(marks[start:end].reshape(shape))
                start = end
            self._parts.append(found)

    @property
    def nbytes(self) -> int:
        """Bytes of the marks, which ``forget`` frees."""
        return self._total

    def part(self, header: Header) -> Part | None:
        """The part that the block belongs to, if the model has one there."""
        layers = self._layout.layers
        if header.layer >= len(layers) or header.part >= len(layers[header.layer].parts):
            return None
        return layers[header.layer].parts[header.part]

    def at(self, header: Header) -> NDArray[np.uint8]:
        """The block's marks, ``[heads, tokens]``."""
        return self._parts[header.layer][header.part][self.extent(header)]

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
        new = int(np.count_nonzero(marks != RESIDENT))
        if new:
            marks[...] = RESIDENT
        self.absent -= new
        return new

    def forget(self) -> None:
        """Let go of the marks: everything is there, or nothing will come any more."""
        self._parts = [
            [np.broadcast_to(np.uint8(RESIDENT), marks.shape) for marks in layer]
            for layer in self._parts
        ]

    def missing(self) -> str:
        """The first hole in words; "" when there is none."""
        # Part by part: a list of all holes would be larger than the cache.
        for layer, parts in enumerate(self._parts):
            for index, marks in enumerate(parts):
                holes = marks != RESIDENT
                if not holes.any():
                    continue
                head, token = map(int, np.unravel_index(holes.argmax(), holes.shape))
                row = holes[head, token:]
                last = token + (len(row) if row.all() else int(row.argmin())) - 1
                part = self._layout.layers[layer].parts[index]
                first = part.first(self._tokens)
                return (
                    f"layer {layer}, {part.name}, head {head}, "
                    f"{'tokens' if part.by_token else 'rows'} {first + token}..{first + last} "
                    f"({self.absent} of {self._total} cells are missing)"
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
        return ""
