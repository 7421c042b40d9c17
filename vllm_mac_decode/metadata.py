"""What the scheduler half and the worker half tell each other. Plain data, pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from mlx_receiver.wire.layout import LayerLayout
from vllm_mac_decode.export import DataTarget, ExportSpan


@dataclass
class StepExports(KVConnectorMetadata):
    """One step's exports, where each session's blocks go, and the sessions that ended since the
    last step. A session without a target has lost its receiver."""

    spans: list[ExportSpan] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    targets: dict[int, DataTarget] = field(default_factory=dict)


@dataclass
class WorkerReport(KVConnectorHandshakeMetadata):
    """What a worker found in its KV cache: its ``layers`` by their place in the model, for
    ``wire.layout.merged``. ``problem`` is empty when it can export them. For a token it sends
    ``token_bytes`` of raw KV; ``coding``: so many bytes of it a second it quantises, by codec."""

    problem: str = ""
    layers: dict[int, LayerLayout] = field(default_factory=dict)
    token_bytes: int = 0
    coding: dict[str, float] = field(default_factory=dict)


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
