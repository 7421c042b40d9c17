"""A bounded ring of staging buffers between the paged cache and the network.

On a GPU the host's buffers are pinned. A piece is gathered on one stream into device memory, once
its layer's K and V are written, and copied from there on another. Were it one stream, each gather
would wait for the copy before it, and then for a place between the compute kernels: those of a long
prefill keep the whole GPU for some 10 ms each.

Where CPU and GPU have one memory (DGX Spark) the gather writes the host's buffer itself. On the CPU
it does so, too.
"""

from __future__ import annotations

import functools
import queue
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from vllm.logger import init_logger

logger = init_logger("vllm.mac_decode.staging")

#: Small enough to pipeline gather and send, large enough to amortise a frame's overhead.
SLOT_BYTES: Final = 8 << 20

#: How long one event serves as the zero of a device's clock, in nanoseconds.
_ZERO_NS: Final = 60 * 10**9

#: Free memory of a discrete GPU of which staging takes nothing: vLLM's next step may need it.
_SPARE_BYTES: Final = 1 << 30

#: Of a CUDA stream; compute runs at 0. Else a gather waits behind a kernel that has begun to start.
_HIGH_PRIORITY: Final = -5


class Slot:
    """One staging buffer, in use from ``StagingRing.acquire`` to ``release``."""

    def __init__(
        self, host: torch.Tensor, device: torch.Tensor | None, gathers: Any, copies: Any
    ) -> None:
        """``host`` and ``device``: uint8 ``[bytes]``, the latter what a GPU gathers into, on the
        stream ``gathers``; with ``copies`` None both are the same memory."""
        self._host = host
        self._device = device
        self._gathers, self._copies = gathers, copies
        on_gpu = device is not None
        self._gathered: Any = torch.cuda.Event() if on_gpu and copies is not None else None
        self._staged: Any = torch.cuda.Event() if on_gpu else None
        #: The event after which the layer's K and V were in the cache (None on the CPU).
        self.written: Any = None
        #: The host's bytes, valid once ``wait`` returned.
        self.memory = memoryview(host.numpy())

    def fill(self, nbytes: int, gather: Callable[[torch.Tensor], None], written: Any) -> None:
        """Run ``gather(out)`` for an ``out`` of uint8 ``[nbytes]`` at the buffer's start, behind
        the event ``written``. On a GPU this only queues."""
        self.written = written
        if self._device is None:
            gather(self._host[:nbytes])
            return
        with torch.cuda.stream(self._gathers):
            self._gathers.wait_event(written)
            gather(self._device[:nbytes])
            if self._copies is None:
                self._staged.record(self._gathers)
                return
            self._gathered.record(self._gathers)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._gathered)
            self._host[:nbytes].copy_(self._device[:nbytes], non_blocking=True)
            self._staged.record(self._copies)

    def wait(self) -> None:
        """Block until the bytes are there (without holding the GIL)."""
        if self._staged is not None:
            self._staged.synchronize()


class DeviceClock:
    """Turns the times of CUDA events into the host's monotonic clock. Thread-safe.

    CUDA tells the time between two events as milliseconds in a float32: a step of 4 µs after a
    minute, of 1 ms after three hours. So the event that counts as zero is replaced now and then.
    """

    def __init__(
        self,
        make_event: Callable[[], Any] | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``make_event`` returns an event that has just happened."""
        self._make_event = make_event or _EventMaker()
        self._now_ns = now_ns
        self._zero = self._made()

    def ns(self, event: Any) -> int:
        """When a finished event happened."""
        if self._now_ns() - self._zero[1] > _ZERO_NS:
            self._zero = self._made()
        zero, zero_ns = self._zero
        return zero_ns + int(zero.elapsed_time(event) * 1e6)  # below 0 for an earlier event

    def _made(self) -> tuple[Any, int]:
        return self._make_event(), self._now_ns()


class _EventMaker:
    """Events on a stream of their own, where nothing has to be waited for."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def __call__(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        event.synchronize()
        return event


class NoStaging(Exception):
    """There is no memory to stage anything in; the text says why."""


class StagingRing:
    """``total_bytes`` of staging, in slots of SLOT_BYTES. ``acquire`` is for one thread."""

    def __init__(self, total_bytes: int, device: torch.device, at_once: bool = True) -> None:
        """``at_once`` takes all memory now, else it is taken as it is needed: pinning some takes
        the driver milliseconds, and must not happen while vLLM captures a CUDA graph."""
        self.device = device
        #: Where a GPU gathers, and what a gather needs is best put there; None on the CPU.
        self.stream: Any = None
        self._copies: Any = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=_HIGH_PRIORITY)
            if not _one_memory(device):
                self._copies = torch.cuda.Stream(device, priority=_HIGH_PRIORITY)
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._most = max(1, total_bytes // SLOT_BYTES)
        self._made = 0
        while at_once and self._made < self._most:
            self._free.put(self._make(SLOT_BYTES))
            self._made += 1

    def enter(self) -> None:
        """Called first in every thread that uses its slots: one starts on device 0."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def acquire(self, nbytes: int) -> Slot:
        """A slot of at least ``nbytes``; blocks while all are in use. Raises NoStaging.

        A piece larger than a slot (one very large block) gets a buffer of its own.
        """
        try:
            if nbytes > SLOT_BYTES:
                return self._make(nbytes)
            if self._free.empty() and self._made < self._most:
                if self._made and not self._room():
                    raise MemoryError("the GPU's is needed for computing")
                slot = self._make(SLOT_BYTES)
                self._made += 1
                return slot
        except (MemoryError, RuntimeError) as error:
            if nbytes > SLOT_BYTES or not self._made:
                raise NoStaging(f"no memory to stage blocks in: {error}") from None
            self._most = self._made
            logger.warning(
                "KV is staged in %d MiB: there is no more memory", self._made * SLOT_BYTES >> 20
            )
        return self._free.get()

    def _room(self) -> bool:
        """Whether a GPU of its own memory can spare some: vLLM has divided it up already."""
        if self._copies is None:
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return free > _SPARE_BYTES

    def release(self, slot: Slot) -> None:
        """Give a slot back."""
        if slot.memory.nbytes == SLOT_BYTES:
            self._free.put(slot)

    def settle(self) -> None:
        """Block until every gather that was asked for has read its cache."""
        if self.stream is not None:
            self.stream.synchronize()

    def _make(self, nbytes: int) -> Slot:
        if self.stream is None:
            return Slot(torch.empty(nbytes, dtype=torch.uint8), None, None, None)
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        if self._copies is None:
            device = _device_view(host)
        else:
            device = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return Slot(host, device, self.stream, self._copies)


@functools.cache
def _one_memory(device: torch.device) -> bool:
    """Whether the GPU shares the CPU's memory and writes pinned memory as its own: tried out,
    because no such machine was at hand to develop this on."""
    if not getattr(torch.cuda.get_device_properties(device), "is_integrated", False):
        return False
    try:
        host = torch.zeros(4096, dtype=torch.uint8, pin_memory=True)
        _device_view(host).fill_(171)
        torch.cuda.synchronize(device)
        if bool((host == 171).all()):
            return True
        reason = "what the GPU writes does not arrive"
    except Exception as error:
        reason = str(error)
    logger.warning("KV is copied to pinned memory although the memory is unified: %s", reason)
    return False


def _device_view(host: torch.Tensor) -> torch.Tensor:
    """Pinned memory as a tensor of the GPU."""
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    return get_accelerator_view_from_cpu_tensor(host)
