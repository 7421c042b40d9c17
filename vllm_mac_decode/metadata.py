"""What the scheduler half and the worker half tell each other. Plain data, pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from mlx_receiver.wire.messages import DataTicket, Endpoint


@dataclass(frozen=True)
class ExportSpan:
    """Tokens ``start`` to ``end`` of one request, to be exported in every layer of this step.

    ``block_ids`` are the scheduler's blocks that hold them: the first one holds token
    ``start - start % block_size``.
    """

    session: int
    request_id: str
    start: int
    end: int
    block_ids: list[int]


@dataclass(frozen=True)
class BulkTarget:
    """Where blocks go, and what opens the door; another ``receiver`` means a restart.

    The ticket is a secret, and vLLM logs a step's metadata when its engine dies.
    """

    endpoint: Endpoint
    receiver: str
    ticket: DataTicket = field(repr=False)


@dataclass
class StepExports(KVConnectorMetadata):
    """One step's exports, and the sessions that ended since the last step."""

    spans: list[ExportSpan] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    target: BulkTarget | None = None


@dataclass
class WorkerReport(KVConnectorHandshakeMetadata):
    """What a worker found in its KV cache; ``problem`` is empty when it can export it."""

    kv_dtype: str
    problem: str = ""


@dataclass
class WorkerNews(KVConnectorWorkerMetadata):
    """What went wrong in a worker: a ``fault`` in the place it names, after which it exports
    nothing any more, and sessions for which it has no connection."""

    fault: str = ""
    unreachable: list[int] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both workers' news; one fault is as good as another."""
        assert isinstance(other, WorkerNews)
        return WorkerNews(self.fault or other.fault, [*self.unreachable, *other.unreachable])
