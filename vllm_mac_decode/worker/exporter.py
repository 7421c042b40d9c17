"""Worker half: reads each layer's new KV out of the paged cache and streams it.

The engine's thread only notes that a layer's K and V are written (``layer_written``: a queue
put, and on a GPU an event record). The threads of a ``Destination``, one for each receiver, do the
rest: one gathers blocks into a bounded ring of staging buffers, others send them (``sender``). The
blocks themselves are the backlog: vLLM keeps a finished request's blocks until the ledger says that
they have been read.

Nothing here may stop or slow down the engine: every fault ends the session, never the step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mac_decode.export import DataTarget, ExportSpan
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker.destination import Destination, Job
from vllm_mac_decode.worker.launch import LaunchGate
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.paged_cache import ExportedLayer
from vllm_mac_decode.worker.staging import DeviceClock, StagingRing


@dataclass(frozen=True)
class _Layer:
    """One layer of a step, and what becomes of each of the step's spans."""

    layer: ExportedLayer
    spans: Sequence[tuple[Destination, ExportSpan]]
    written: Any  # torch.cuda.Event, or None on the CPU
    computed_ns: int


class Exporter:
    """Streams spans of the paged cache to receivers, in the background."""

    def __init__(
        self,
        layers: dict[str, ExportedLayer],
        settings: Settings,
        ledger: BlockLedger,
    ) -> None:
        self._layers = layers
        self._ledger = ledger
        self._settings = settings
        self._device = next(iter(layers.values())).device
        #: Recurrent layers, which no hook surrounds, by their place; those of this step that were
        #: not put yet.
        self._hookless = sorted(
            (layer.index, name) for name, layer in layers.items() if not layer.by_token
        )
        self._to_come = deque(self._hookless)
        self._clock = DeviceClock() if self._device.type == "cuda" else None
        self._spans: list[tuple[Destination, ExportSpan]] = []
        self._unwritten: set[str] = set()
        self._gate = LaunchGate[_Layer](self._put)
        self._closing = False
        #: A fault has ended a thread; the connector switches off then.
        self.stopped = False
        # Pinning memory takes the driver milliseconds, in which a request would wait: the first
        # receiver's is taken now, and another's when there is one, in its own thread.
        self._destinations = {0: self._destination(at_once=True)}

    # --- the engine's thread ----------------------------------------------------------------

    def begin_step(
        self, spans: list[ExportSpan], ended: list[int], targets: Mapping[int, DataTarget]
    ) -> None:
        """What this step will write, and where each session's blocks go. Also called for steps that
        write nothing."""
        self._spans = []
        for span in spans:
            target = targets.get(span.session)
            if target is None or self._closing:
                # Its receiver was lost a moment ago, as the scheduler half hears by itself.
                self._ledger.announce(span.request_id, 0)
                continue
            self._ledger.announce(span.request_id, len(self._layers))
            if target.number not in self._destinations:
                self._destinations[target.number] = self._destination()
            destination = self._destinations[target.number]
            destination.aim(target)
            self._spans.append((destination, span))
        for destination in self._destinations.values():
            destination.bury(ended)
        self._gate.begin()
        self._unwritten = set(self._layers) if self._spans else set()
        self._to_come = deque(self._hookless)

    def layer_written(self, name: str) -> None:
        """The layer's K and V of this step are in the paged cache (in stream order), and so are
        the states of recurrent layers before it."""
        if name not in self._unwritten or self._closing:
            return
        while self._to_come and self._to_come[0][0] < self._layers[name].index:
            self._written(self._to_come.popleft()[1])
        self._written(name)

    def _written(self, name: str) -> None:
        if name not in self._unwritten:
            return
        self._unwritten.discard(name)
        written = None
        if self._device.type == "cuda":
            written = torch.cuda.Event(enable_timing=True)
            written.record()
        self._gate.add(_Layer(self._layers[name], self._spans, written, time.monotonic_ns()))

    def end_step(self) -> None:
        """The forward pass is queued: layers whose hook did not run (a full CUDA graph was
        replayed) are written by now, in stream order."""
        for name in [name for name in self._layers if name in self._unwritten]:
            self._written(name)
        self._gate.end()
        self._spans = []

    def take_unreachable(self) -> list[int]:
        """Sessions given up since the last call because no connection could be made."""
        return [s for d in self._destinations.values() for s in d.take_unreachable()]

    @property
    def threads(self) -> list[threading.Thread]:
        """All that gather and send."""
        return [thread for d in self._destinations.values() for thread in d.threads]

    def close(self, wait: bool = True) -> None:
        """Stop the threads, now or (without ``wait``) soon; what has not been sent is lost."""
        self._stop()
        ends = [
            threading.Thread(target=destination.end, name="mac-decode-end", daemon=True)
            for destination in self._destinations.values()
        ]
        for thread in ends:
            thread.start()
        for thread in ends if wait else []:
            thread.join()

    # --- inside -----------------------------------------------------------------------------

    def _stop(self) -> None:
        """Nothing is read any more: vLLM may reuse every block."""
        self._closing = True
        for destination in list(self._destinations.values()):
            destination.stop()
        self._ledger.release()

    def _failed(self) -> None:
        """A destination's thread ends by a fault."""
        self.stopped = True
        self._stop()

    def _put(self, written: _Layer) -> None:
        for destination, span in written.spans if not self._closing else ():
            destination.put(Job(written.layer, span, written.written, written.computed_ns))

    def _destination(self, at_once: bool = False) -> Destination:
        ring = StagingRing(self._settings.staging_mib << 20, self._device, at_once)
        return Destination(ring, self._settings, self._ledger, self._clock, self._failed)
