"""Which part of a recurrent layer's states a worker holds under tensor parallelism.

Workers divide the heads of what the layer remembers. The channels of its convolution are those of
several projections, one behind the other (x, B and C of Mamba 2; queries, keys and values of a
gated delta net), and each of them is divided by itself: a worker's channels lie in as many places
of the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mac_decode.worker.paged_cache import LayoutError, Run


@dataclass(frozen=True)
class Shard:
    """``runs``: the convolution's channels that the worker sends, None if it has all;
    ``head_start``: the model's index of the first head of its other state."""

    runs: tuple[Run, ...] | None = None
    head_start: int = 0


@dataclass(frozen=True)
class _Projection:
    """``channels`` that follow each other in the model; every worker has an equal share of them,
    or all where they are ``replicated``."""

    channels: int
    replicated: bool = False


def is_convolution(index: int, state: torch.Tensor) -> bool:
    """Whether a layer's state ``[blocks, ...]`` is ``[blocks, kept inputs, channels]``."""
    return index == 0 and state.dim() == 3


def shard_of(
    layer: Any, states: Sequence[torch.Tensor], mamba_type: Any, rank: int, size: int
) -> Shard:
    """What worker ``rank`` of ``size`` holds: its ``states`` as ``paged_states.states_of`` gives
    them, of vLLM's layer of vLLM's ``mamba_type``. Raises LayoutError where that is not known, or
    where something is not divided evenly."""
    if size == 1:
        return Shard()
    heads = {s.shape[1] for index, s in enumerate(states) if not is_convolution(index, s)}
    if len(heads) > 1:
        raise LayoutError(f"the states of {type(layer).__name__} have different numbers of heads")
    head_start = rank * sum(heads)
    if not is_convolution(0, states[0]):
        return Shard(None, head_start)
    channels = int(states[0].shape[2])
    runs, first, place = [], 0, 0
    for projection in _projections(layer, mamba_type, channels, size):
        if projection.replicated:
            own, start = projection.channels, place
        else:
            own = projection.channels // size
            start = place + rank * own
        if rank == 0 or not projection.replicated:  # one worker sends what all have
            runs.append(Run(first, start, own))
        first += own
        place += projection.channels
    if first != channels:
        raise LayoutError(
            f"{type(layer).__name__} keeps {channels} channels of its convolution in each of "
            f"{size} workers, not {first}"
        )
    return Shard(tuple(runs), head_start)


def _projections(layer: Any, mamba_type: Any, channels: int, size: int) -> list[_Projection]:
    kind = str(mamba_type).upper()
    try:
        if "MAMBA2" in kind:
            # ``layer.n_groups`` counts the copies, too; the norm knows the model's.
            groups, state = int(layer.norm.n_groups), int(layer.ssm_state_size)
            single = groups == 1
            if not single:
                _even("groups", groups, size)
            group = _Projection(groups * state, replicated=single)
            return [_Projection(int(layer.intermediate_size)), group, group]
        if "GDN" in kind:
            _even("key heads", int(layer.num_k_heads), size)
            _even("value heads", int(layer.num_v_heads), size)
            keys = _Projection(int(layer.key_dim))
            return [keys, keys, _Projection(int(layer.value_dim))]
    except AttributeError as error:
        raise LayoutError(f"how {type(layer).__name__} is divided is not known: {error}") from None
    if "MAMBA1" in kind or "SHORT_CONV" in kind:
        return [_Projection(channels * size)]
    raise LayoutError(
        f"how recurrent layers of the kind {getattr(mamba_type, 'name', mamba_type)} are divided "
        "among tensor-parallel workers is not known"
    )


def _even(what: str, count: int, size: int) -> None:
    if count % size:
        raise LayoutError(
            f"the {count} {what} of its recurrent layers are not divided evenly among "
            f"{size} tensor-parallel workers"
        )
