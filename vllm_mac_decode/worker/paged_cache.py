"""What the export must know of a layer's paged cache, whatever kind it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mlx_receiver.wire.layout import LayerLayout, Part


@dataclass(frozen=True)
class PagedPart:
    """One array of a layer, as far as this worker holds it: ``[heads, tokens, width]``."""

    name: str
    heads: int
    width: int


class PagedCache(Protocol):
    """How to read a layer's paged cache."""

    @property
    def block_size(self) -> int:
        """Tokens in a block of the tensor, which may be a fraction of the scheduler's block."""

    @property
    def parts(self) -> Sequence[PagedPart]:
        """In the order of the layer's layout."""

    def read(self, cache: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Copy whole blocks into ``out`` ``[numbers]``, on the cache's device: part after part,
        each ``[heads, len(block_ids), block_size, width]``."""


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of this worker: its place in the model, its kind, its cache and how to read it.

    ``head_start`` is the model's index of the worker's first head (tensor parallelism), ``group``
    the KV cache group whose blocks hold the layer's tokens, ``block_size`` of them each. With a
    ``window`` only the last so many tokens of a prompt are exported.
    """

    index: int
    cache: torch.Tensor
    layout: PagedCache
    head_start: int
    kind: str
    block_size: int
    group: int = 0
    window: int | None = None

    @property
    def dtype(self) -> str:
        """Of the numbers in the cache, as the wire calls it."""
        return str(self.cache.dtype).removeprefix("torch.")

    @property
    def split(self) -> int:
        """Blocks of the tensor that are one of the scheduler's."""
        return self.block_size // self.layout.block_size

    def described(self) -> LayerLayout:
        """For ``wire.layout.merged``: parts with as many heads as end with this worker's."""
        parts = [
            Part(
                part.name,
                self.head_start + part.heads,
                part.width,
                self.dtype,  # type: ignore[arg-type]
                window=self.window,
            )
            for part in self.layout.parts
        ]
        return LayerLayout(self.kind, parts)
