"""A bounded ring of staging buffers between the paged cache and the network.

On a GPU the buffers are pinned, and a copy runs on a side stream: wait for the layer's event,
gather into device memory, copy to the pinned buffer, record an event that ``Slot.wait`` waits
for. On the CPU the gather writes the buffer directly.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable
from typing import Any

import torch

#: Small enough to pipeline gather and send, large enough to amortise a frame's overhead.
SLOT_BYTES = 8 << 20


class Slot:
    """One staging buffer, in use from ``StagingRing.acquire`` to ``release``."""

    def __init__(self, buffer: torch.Tensor, device_buffer: torch.Tensor | None) -> None:
        self._buffer = buffer
        self._device_buffer = device_buffer
        self._copied: Any = torch.cuda.Event() if device_buffer is not None else None
        self._after: Callable[[], None] | None = None
        #: The event after which the layer's K and V were in the cache (None on the CPU).
        self.written: Any = None

    @classmethod
    def marker(cls, after: Callable[[], None]) -> Slot:
        """No buffer: calls ``after`` when everything queued before it has been waited for."""
        slot = cls.__new__(cls)
        slot._buffer, slot._device_buffer = torch.empty(0), None
        slot._copied, slot._after, slot.written = None, after, None
        return slot

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer; 0 for a marker."""
        return self._buffer.nbytes

    def copy_in(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        gather: Callable[[torch.Tensor], None],
        written: Any,
        stream: Any,
    ) -> torch.Tensor:
        """Run ``gather(out)`` for an ``out`` of this dtype and shape; returns the staged tensor
        (on the host, valid once ``wait`` returned)."""
        used = math.prod(shape) * dtype.itemsize
        staged = self._buffer[:used].view(dtype).view(shape)
        if self._device_buffer is None:
            gather(staged)
            return staged
        self.written = written
        with torch.cuda.stream(stream):
            stream.wait_event(written)
            on_device = self._device_buffer[:used].view(dtype).view(shape)
            gather(on_device)
            staged.copy_(on_device, non_blocking=True)
            self._copied.record(stream)
        return staged

    def wait(self) -> None:
        """Block until the copy is done (without holding the GIL)."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._after is not None:
            self._after()


class StagingRing:
    """``total_bytes`` of staging, in slots of SLOT_BYTES. Thread-safe."""

    def __init__(self, total_bytes: int, device: torch.device) -> None:
        self.slot_bytes = SLOT_BYTES
        self._device = device
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._unmade = max(1, total_bytes // SLOT_BYTES)

    def acquire(self, nbytes: int) -> Slot:
        """A slot of at least ``nbytes``; blocks while all are in use.

        A piece larger than a slot (one very large block) gets a buffer of its own.
        """
        if nbytes > self.slot_bytes:
            return self._make(nbytes)
        if self._unmade and self._free.empty():
            self._unmade -= 1
            return self._make(self.slot_bytes)
        return self._free.get()

    def release(self, slot: Slot) -> None:
        """Give a slot back."""
        if slot.nbytes == self.slot_bytes:
            self._free.put(slot)

    def _make(self, nbytes: int) -> Slot:
        cuda = self._device.type == "cuda"
        buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
        on_device = torch.empty(nbytes, dtype=torch.uint8, device=self._device) if cuda else None
        return Slot(buffer, on_device)
