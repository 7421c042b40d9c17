"""What the export must know of a layer's paged cache, whatever kind it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mlx_receiver import plugins
from mlx_receiver.wire.layout import ITEMSIZE, Held, LayerLayout, Part, beside

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class LayoutError(Exception):
    """The cache cannot be read back; the text says why."""


@dataclass(frozen=True)
class Run:
    """Rows of this worker's part that follow each other in the model's, too: ``count`` of them from
    ``first`` on, which are the model's from ``place`` on."""

    first: int
    place: int
    count: int


@dataclass(frozen=True)
class PagedPart:
    """One array of a layer, as far as this worker holds it: ``[heads, tokens, width]``, or
    ``[heads, rows, width]`` of the whole text where it is not ``by_token``.

    ``dtype`` is the wire's name of its numbers', ``dims`` and ``scale`` as in ``wire.layout.Part``.
    Workers divide a part by its heads, or by its rows: then ``runs`` says which of its own this one
    sends.
    """

    name: str
    heads: int
    width: int
    dtype: str
    by_token: bool = True
    dims: tuple[int, ...] = ()
    scale: float = 1.0
    rows: int = 1
    runs: tuple[Run, ...] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one head."""
        return self.width * ITEMSIZE[self.dtype]

    @property
    def rows_of_model(self) -> int:
        """The model's rows, as far as what this worker sends reaches."""
        if self.runs is None:
            return self.rows
        return max(run.place + run.count for run in self.runs)

    def nbytes(self, tokens: int) -> int:
        """Bytes of so many tokens' rows, or of all rows where it is not by token."""
        return self.heads * (tokens if self.by_token else self.rows) * self.row_bytes


class PagedCache(Protocol):
    """How to read a layer's paged cache."""

    @property
    def block_size(self) -> int:
        """Tokens in a block of the tensor, which may be a fraction of the scheduler's block."""

    @property
    def parts(self) -> Sequence[PagedPart]:
        """In the order of the layer's layout; all by token, or none."""

    def read(self, cache: Any, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Copy whole blocks into ``out``, uint8 ``[bytes]`` on the cache's device: part after
        part, each ``[heads, len(block_ids), block_size, width]``, or where it is not by token
        ``[heads, rows, width]`` of one block."""


@dataclass(frozen=True)
class AllocatedLayer:
    """A layer's cache as vLLM has allocated it.

    ``spec`` is its ``vllm.v1.kv_cache_interface.KVCacheSpec``, ``module`` the layer that writes it,
    ``cache`` what vLLM registered for it, with room for ``blocks`` of the scheduler's blocks.
    """

    name: str
    spec: Any
    module: Any
    cache: Any
    blocks: int
    config: VllmConfig


@dataclass(frozen=True)
class Readable:
    """How a layer is exported: as which ``kind``, and how its ``cache``, a tensor or several, is
    read.

    With a ``window`` only the last so many tokens of a prompt are exported, with a ``chunk`` those
    behind the last multiple of it. Under tensor
    parallelism workers have equal shares of the heads, or are ``replicated``: every one holds all
    of it. What is not by token says which part of the model's this worker has: by ``head_start``,
    and its parts' ``runs``.
    """

    kind: str
    layout: PagedCache
    cache: Any
    window: int | None = None
    chunk: int | None = None
    replicated: bool = False
    head_start: int | None = None


class PagedAdapter(Protocol):
    """What can read some of vLLM's caches, registered through the hook
    ``mac_decode_paged_caches``."""

    def readable(self, layer: AllocatedLayer) -> Readable | None:
        """How to read the layer; None for one that this adapter does not know. Raises
        LayoutError saying why one that it knows cannot be read."""


@dataclass(frozen=True)
class ExportedLayer:
    """One layer's cache, or one of several that it has: its place among the layers that have any,
    its kind, the tensor or tensors, and how to read them.

    ``first_part`` is the number of its first part in the layer, ``head_start`` the model's index of
    the worker's first head (tensor parallelism), ``group`` the KV cache group whose blocks hold the
    layer's tokens, ``block_size`` of them each; ``window`` and ``chunk`` as in ``Readable``. Where
    another worker ``sends`` the same heads, this one does not.
    """

    index: int
    cache: Any
    layout: PagedCache
    head_start: int
    kind: str
    block_size: int
    group: int = 0
    window: int | None = None
    first_part: int = 0
    sends: bool = True
    chunk: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        tensor = self.cache if isinstance(self.cache, torch.Tensor) else self.cache[0]
        return torch.device(tensor.device)

    @property
    def by_token(self) -> bool:
        """Whether it has rows for tokens, not for the text as a whole."""
        return self.layout.parts[0].by_token

    @property
    def split(self) -> int:
        """Blocks of the tensor that are one of the scheduler's."""
        return self.block_size // self.layout.block_size

    @cached_property
    def _part(self) -> Part:
        return self.described().parts[0]

    def start(self, prompt_tokens: int, held: Held) -> int:
        """The first token that leaves, of a prompt of so many of which some is held already."""
        return self._part.start(prompt_tokens, held)

    def read(self, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        """See ``PagedCache.read``. Raises RuntimeError naming who cannot."""
        try:
            self.layout.read(self.cache, block_ids, out)
        except Exception as error:
            raise RuntimeError(
                f"layer {self.index} cannot be read by {plugins.named(self.layout)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def head(self, part: PagedPart) -> int:
        """The model's index of the worker's first head of that part."""
        return self.head_start if part.runs is None else 0

    def described(self) -> LayerLayout:
        """For ``wire.layout.merged``: parts with as many heads and rows as end with this
        worker's."""
        parts = [
            Part(
                part.name,
                self.head(part) + part.heads,
                part.width,
                part.dtype,  # type: ignore[arg-type]
                by_token=part.by_token,
                window=self.window,
                chunk=self.chunk,
                dims=list(part.dims),
                scale=part.scale,
                rows=part.rows_of_model,
            )
            for part in self.layout.parts
        ]
        return LayerLayout(self.kind, parts)


def described(layers: Sequence[ExportedLayer]) -> dict[int, LayerLayout]:
    """Layers by their place in the model; of one with several caches the parts of all."""
    found: dict[int, list[LayerLayout]] = {}
    for layer in sorted(layers, key=lambda layer: layer.first_part):
        found.setdefault(layer.index, []).append(layer.described())
    return {
        index: caches[0] if len(caches) == 1 else beside(caches) for index, caches in found.items()
    }
