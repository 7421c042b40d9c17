"""``mac_decode`` as vLLM sees it: a thin facade over the scheduler half and the worker half.

Scheduler half (in the engine's process): ``Relay`` decides and follows the sessions, ``Fleet``
talks to the receivers, ``ExportPlan`` says what each step writes. Worker half (one a worker):
``Exporter``. They meet only in what ``metadata`` holds.

No exception may leave a method that vLLM calls while it serves: a fault switches the connector
off, with one log line, and everything decodes locally.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.version import __version__ as vllm_version

from mlx_receiver import plugins
from mlx_receiver.planning.coding import of_workers
from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import merged
from mlx_receiver.wire.ranges import MAX_NAME
from mlx_receiver.wire.signature import signature_from_config
from vllm_mac_decode import settings
from vllm_mac_decode.engine import adapter, weights
from vllm_mac_decode.metadata import StepExports, WorkerNews, WorkerReport
from vllm_mac_decode.scheduler import eligibility
from vllm_mac_decode.scheduler.export_plan import ExportPlan
from vllm_mac_decode.scheduler.fleet import Fleet
from vllm_mac_decode.scheduler.relay import Relay
from vllm_mac_decode.scheduler.step_outputs import ROUTER_KEY
from vllm_mac_decode.stats import MacDecodePromMetrics, MacDecodeStats, stats_from
from vllm_mac_decode.worker import coding
from vllm_mac_decode.worker.exporter import Exporter
from vllm_mac_decode.worker.layers import exported_layers, updates_before_hook
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.paged_cache import LayoutError, described

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.mac_decode.connector")

_F = TypeVar("_F", bound=Callable[..., Any])


def _guarded(default: Callable[[], Any]) -> Callable[[_F], _F]:
    """A method that answers ``default()`` and switches the connector off when it fails."""

    def decorate(method: _F) -> _F:
        @functools.wraps(method)
        def guarded(self: MacDecodeConnector, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception:
                self.fault(method.__name__)
                return default()

        return guarded  # type: ignore[return-value]

    return decorate


class MacDecodeConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module's text."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = settings.load(self._kv_transfer_config.kv_connector_extra_config)
        self._exporter: Exporter | None = None
        self._report = WorkerReport("the KV caches were never registered")
        self._early = False
        self._attached = False
        self._ledger = BlockLedger()
        self._fault = ""  # where there was one: everything is local from then on
        self.relay: Relay | None = None
        self._fleet: Fleet | None = None
        self._plan: ExportPlan | None = None
        if role is KVConnectorRole.SCHEDULER:
            adapter.install()
            self.relay = Relay(self._settings)
            groups = kv_cache_config.kv_cache_groups
            self._plan = ExportPlan([int(group.kv_cache_spec.block_size) for group in groups])

    @property
    def requires_kv_delivery(self) -> bool:
        """No: a hand-off that preemption breaks goes on locally."""
        return False

    def fault(self, where: str) -> None:
        """Log the exception being handled and switch off for good; once."""
        if self._fault:
            return
        logger.exception("a fault in %s; decoding locally from now on", where)
        self._switch_off(where)

    def _switch_off(self, where: str) -> None:
        self._fault = where
        relay, exporter = self.relay, self._exporter
        self._exporter = None
        if exporter is not None:
            exporter.close(wait=False)  # vLLM is in the middle of a step
        fleet, self._fleet = self._fleet, None
        if relay is not None and fleet is not None:
            try:
                relay.close()
            except Exception:  # the relay may be what is broken
                logger.exception("responses that a receiver was decoding are lost")
            fleet.close(wait=False)  # vLLM is in the middle of a step

    # --- worker half ------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find out how to read the caches, and start the exporter. Never raises."""
        try:
            layers = exported_layers(self._vllm_config, self._kv_cache_config, kv_caches)
            report = WorkerReport(layers=described(list(layers.values())))
            sent = {name: layer for name, layer in layers.items() if layer.sends}
            if sent:
                self._early = updates_before_hook(self._vllm_config, sent)
                self._exporter = Exporter(sent, self._settings, self._ledger)
                report.token_bytes = coding.token_bytes(sent.values())
                if self._settings.profile:
                    blocks = int(self._kv_cache_config.num_blocks)
                    report.coding = coding.measured(sent.values(), blocks)
            self._report = report
        except (LayoutError, ValueError) as error:
            self._report = WorkerReport(str(error))
        except Exception as error:
            logger.exception("the KV export cannot start")
            self._report = WorkerReport(f"its export cannot start: {error}")

    def get_handshake_metadata(self) -> WorkerReport:
        """What ``register_kv_caches`` found, for the scheduler half."""
        return self._report

    @_guarded(lambda: None)
    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins: tell the exporter what it will write."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepExports)
        meta = connector_metadata
        # Whatever happens now, and without an exporter (another worker holds the same heads, or a
        # fault switched it off), vLLM waits for this worker's word.
        for span in meta.spans:
            self._ledger.announce(span.request_id, 0)
        if self._exporter is not None:
            self._exporter.begin_step(meta.spans, meta.ended, meta.targets)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing is loaded into vLLM's cache."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """The layer's K and V are written by now where the backend updates its cache first:
        exporting from here overlaps with the layer's attention and MLP."""
        if self._early:
            self._layer_written(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """The layer's K and V are written by now in any case."""
        self._layer_written(layer_name)

    @_guarded(lambda: None)
    def _layer_written(self, layer_name: str) -> None:
        if self._exporter is not None:
            self._exporter.layer_written(layer_name)

    @_guarded(lambda: None)
    def wait_for_save(self) -> None:
        """Does not wait: vLLM keeps the blocks until ``get_finished`` reports them read."""
        if self._exporter is not None:
            self._exporter.end_step()

    @_guarded(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks have been read, so that vLLM can free them."""
        return self._ledger.finished(finished_req_ids) or None, None

    def build_connector_worker_meta(self) -> WorkerNews | None:
        """Tell the scheduler half of a fault, and of sessions that cannot be reached: it would wait
        until they stall."""
        if self._exporter is not None and self._exporter.stopped:
            self._switch_off("the KV export")
        unreachable = self._exporter.take_unreachable() if self._exporter is not None else []
        news = WorkerNews(self._fault, unreachable)
        return news if news.fault or news.unreachable else None

    # --- scheduler half ---------------------------------------------------------------------

    @_guarded(lambda: None)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers say after a step."""
        # vLLM's engine dies of a word about a request that it does not wait for, and a fault may
        # have kept ``request_finished`` from asking it to wait.
        sent = connector_output.finished_sending
        if sent and self._plan is not None:
            connector_output.finished_sending = self._plan.released(sent)
        meta = connector_output.kv_connector_worker_meta
        if not isinstance(meta, WorkerNews) or self._fault:
            return
        if meta.fault:
            logger.error("a worker had a fault in %s; decoding locally from now on", meta.fault)
            self._switch_off(meta.fault)
        elif self.relay is not None:
            self.relay.unreachable(meta.unreachable)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """The workers' reports: only if every worker can export will anything be handed off."""
        self._worker_reports = list(metadata.values())

    def attach_engine(self, core: Any) -> None:
        """The engine is complete: connect to the receiver, unless something rules it out."""
        self._attached = True
        try:
            self._connect(core)
        except (RuntimeError, ValueError) as error:
            logger.warning("decoding locally: %s", error)
        except Exception:
            self.fault("attach_engine")

    def _connect(self, core: Any) -> None:
        assert self.relay is not None
        config = self._vllm_config.model_config.hf_text_config.to_dict()
        signature = signature_from_config(config)
        reports: list[WorkerReport] = getattr(self, "_worker_reports", [])
        problems = sorted({report.problem for report in reports if report.problem})
        if problems:
            raise ValueError(f"the KV cache cannot be exported: {'; '.join(problems)}")
        if not reports:
            raise ValueError("no worker reported its KV cache")
        if not self._settings.enabled:
            raise ValueError("mac_decode is switched off (enabled=false)")
        layout = merged([report.layers for report in reports])
        self.relay.engine = adapter.EngineAdapter(core)
        self.relay.vocab_size = signature.vocab_size
        if self.relay.engine.machine is not None:
            told = of_workers([(report.token_bytes, report.coding) for report in reports])
            self.relay.profiling.begin(self.relay.engine.machine, told)
        self.relay.layout = layout
        model = str(self._vllm_config.model_config.model)
        me = Introduction(
            signature,
            layout,
            client=uuid.uuid4().hex,
            engine=", ".join([f"vllm {vllm_version}", *plugins.packages()])[:MAX_NAME],
            model=model,
            weights=weights.precision(self._vllm_config),
            fingerprint=weights.fingerprint(self._vllm_config),
        )
        self._fleet = Fleet(self._settings, me, self.relay.join)

    @_guarded(lambda: None)
    def on_new_request(self, request: Request) -> None:
        """vLLM accepted a request: the relay has seen it before (``engine.adapter``)."""
        if not self._attached:  # no busy loop runs this engine: say once that nothing can be done
            self.attach_engine(None)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Nothing comes from elsewhere."""
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Nothing to do: ``build_connector_meta`` sees the blocks."""

    @_guarded(StepExports)
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepExports:
        """What the workers export in this step."""
        relay, plan = self.relay, self._plan
        if relay is not None:
            relay.steps()
        if relay is None or plan is None or self._fault:
            return StepExports()
        for new in scheduler_output.scheduled_new_reqs:
            session = relay.scheduled(new.req_id, new.num_computed_tokens)
            if session is not None:
                tokens, meets = session.request.num_prompt_tokens, session.strategy is Strategy.MEET
                plan.add(new.req_id, session.session, tokens, session.codec, from_end=meets)
        taken = set(scheduler_output.preempted_req_ids or ())
        for request_id in taken.union(plan.preempted(scheduler_output)):
            relay.preempted(request_id)
            plan.drop(request_id)
        # A session may end at any moment: a span that is withheld must not count as announced.
        spans = plan.step(scheduler_output, relay.alive)
        targets = relay.targets({span.session for span in spans})
        return StepExports(spans=spans, ended=relay.take_ended(), targets=targets)

    @_guarded(lambda: (False, None))
    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks while workers may still be reading them; answer a router."""
        params = None
        relay, reason = self.relay, str(request.get_finished_reason())
        if relay is not None and reason == "abort":
            relay.aborted(request.request_id)
        elif relay is not None and reason in ("stop", "length") and eligibility.is_routed(request):
            # What the decoding server of a router is told, beside what such servers expect.
            params = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": self._kv_transfer_config.engine_id,
                ROUTER_KEY: relay.prefilled(request),
            }
        return self._plan is not None and self._plan.forget(request.request_id), params

    @_guarded(lambda: False)
    def has_pending_push_work(self) -> bool:
        """Whether the engine must step although no request of its own asks for it: once for every
        session that ended, or that vLLM never had, for the workers and the metrics, and while it
        waits for every response to end. vLLM asks it when it has nothing else to do, on its own
        thread."""
        relay = self.relay
        if relay is None or relay.engine is None or self._fault:
            return False
        relay.rest()
        return relay.has_news() or (relay.engine.draining and relay.busy())

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same for models with several KV cache groups."""
        return self.request_finished(request, [])

    # --- reporting --------------------------------------------------------------------------

    @_guarded(lambda: None)
    def get_kv_connector_stats(self) -> MacDecodeStats | None:
        """Counts since the last call (scheduler half)."""
        return stats_from(self.relay) if self.relay is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> MacDecodeStats:
        return MacDecodeStats(data=data) if data else MacDecodeStats()

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> MacDecodePromMetrics:
        return MacDecodePromMetrics(*args, **kwargs)

    def shutdown(self) -> None:
        """Close sockets and threads."""
        if self._fleet is not None:
            self._fleet.close()
            self._fleet = None
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None
