"""What is to be exported, and where to: how the scheduler half puts it and the workers take it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_receiver.wire.messages import DataTicket, Endpoint
from mlx_receiver.wire.quantised import RAW


@dataclass(frozen=True)
class ExportSpan:
    """Tokens ``start`` to ``end`` of one request's ``prompt_tokens``, to be exported in every layer
    of this step, in the session's ``codec``.

    ``block_ids`` are the scheduler's blocks that hold them, of each KV cache group: the first one
    holds token ``start - start % block_size``. Of a layer with a window some may be void, those of
    tokens that nobody needs any more. ``from_end``: the last tokens leave first.
    """

    session: int
    request_id: str
    start: int
    end: int
    prompt_tokens: int
    block_ids: list[list[int]]
    codec: str = RAW
    from_end: bool = False


@dataclass(frozen=True)
class DataTarget:
    """Where blocks go, and what opens the door; another ``receiver`` means a restart. ``number``
    tells the receivers apart that there are at a time.

    The ticket is a secret, and vLLM logs a step's metadata when its engine dies.
    """

    endpoint: Endpoint
    receiver: str
    ticket: DataTicket = field(repr=False)
    number: int = 0
