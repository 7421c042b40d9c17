"""States of recurrent layers (Mamba, gated delta net, short convolution): one block of each text
holds what the layer has made of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.mamba import mamba_utils

from vllm_mac_decode.worker.paged_cache import LayoutError, PagedPart, Run
from vllm_mac_decode.worker.paged_layout import bits
from vllm_mac_decode.worker.state_shards import is_convolution


@dataclass(frozen=True)
class PagedStates:
    """See ``PagedCache``; a layer's cache is a list of tensors ``[blocks, heads, ...]``. A
    convolution's channels are rows of its kept inputs."""

    block_size: int
    parts: Sequence[PagedPart]

    @classmethod
    def of(
        cls,
        states: Sequence[torch.Tensor],
        block_size: int,
        runs: tuple[Run, ...] | None = None,
    ) -> PagedStates:
        """Of these tensors; ``block_size`` is the scheduler's, ``runs`` the convolution's channels
        that this worker sends."""
        parts = []
        for index, state in enumerate(states):
            convolution = is_convolution(index, state)
            parts.append(
                PagedPart(
                    f"state{index}",
                    state.shape[1],
                    1 if convolution else prod(state.shape[2:]),
                    str(state.dtype).removeprefix("torch."),
                    by_token=False,
                    dims=tuple(state.shape[2:]) if state.dim() > 3 else (),
                    rows=state.shape[2] if convolution else 1,
                    runs=runs if convolution else None,
                )
            )
        return cls(block_size, parts)

    def read(self, cache: Any, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        sizes = [part.nbytes(0) for part in self.parts]
        for state, target in zip(cache, out.split(sizes), strict=True):
            place = target.view(state.dtype).view(1, *state.shape[1:])
            if state.device.type == "cpu":
                np.copyto(bits(place), bits(state)[int(block_ids[0]), None])
            else:
                torch.index_select(state, 0, block_ids, out=place)


def states_of(layer: Any, mamba_type: Any = None) -> list[torch.Tensor]:
    """A recurrent layer's states ``[blocks, rows, ...]``, the convolution's as ``[blocks, kept
    inputs, channels]``, a gated delta net's as ``[blocks, heads, v_dim, k_dim]``. ``mamba_type`` is
    vLLM's. Raises LayoutError where it has none that can be read."""
    found: Any = getattr(layer, "kv_cache", None)
    while isinstance(found, (list, tuple)) and found and isinstance(found[0], (list, tuple)):
        found = found[0]  # vLLM up to 0.28 has one for each virtual engine
    if not isinstance(found, (list, tuple)) or not all(
        isinstance(state, torch.Tensor) and state.dim() >= 3 for state in found
    ):
        raise LayoutError(f"{type(layer).__name__} has no states of its own")
    states = list(found)
    dim_first = getattr(mamba_utils, "is_conv_state_dim_first", lambda: False)
    if dim_first() and states[0].dim() == 3:
        states[0] = states[0].transpose(1, 2)
    if "GDN" in str(mamba_type).upper() and len(states) > 1 and states[1].device.type == "cpu":
        # vLLM's CPU kernels take the same memory for ``[..., k_dim, v_dim]``
        # (``mamba/ops/cpu/gdn_attention.py``).
        blocks, heads, values, keys = states[1].shape
        states[1] = states[1].view(blocks, heads, keys, values).transpose(2, 3)
    return states
