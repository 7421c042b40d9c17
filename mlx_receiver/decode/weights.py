"""How much memory a model's weights take, known before they are loaded, and whether they fit."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

#: Of the memory that the model leaves, the share that sessions may reserve. Joining a running
#: batch copies it, so about as much again must be free.
KV_SHARE: Final = 0.4

#: Bytes of a value, by the names in a safetensors header, of those that ``--dtype`` casts.
_FLOATS: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_CAST: Final = {"float32": 4, "float16": 2, "bfloat16": 2}

#: What a Mac's system needs besides what the GPU may wire, at least.
_SYSTEM_BYTES: Final = 4 << 30

#: The system's own default for MLX's limit, read where it is raised.
_WIRED_LIMIT: Final = "iogpu.wired_limit_mb"

_MAX_HEADER: Final = 100 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a model and its KV may take; ``total`` is all of the machine's, ``metal`` whether
    the limit is that of a Mac's GPU."""

    limit: int
    total: int
    metal: bool


def memory() -> Memory | None:
    """This machine's; None beside a GPU that has memory of its own."""
    import mlx.core as mx

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    working_set = mx.device_info().get("max_recommended_working_set_size")
    if working_set is not None:
        return Memory(int(working_set), total, metal=True)
    if mx.default_device().type == mx.DeviceType.gpu:
        return None
    return Memory(available_memory(), total, metal=False)


def available_memory() -> int:
    """Bytes of main memory that are free or can be freed at once."""
    if sys.platform == "linux":
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    pages = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") // 2


def weights_nbytes(folder: Path, dtype: str = "auto") -> int | None:
    """Bytes of the weights in a model's folder once cast to ``dtype``, from the headers of its
    safetensors files; while they are not there, from their index. None where neither is."""
    files = sorted(folder.glob("model*.safetensors"))
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        expected = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        index, expected = {}, set()
    if files and expected <= {file.name for file in files}:
        return sum(_tensor_nbytes(tensor, dtype) for file in files for tensor in _tensors(file))
    try:
        return int(index["metadata"]["total_size"])
    except (KeyError, TypeError, ValueError):
        return None


def refusal(name: str, needed: int, session: int, memory: Memory) -> str | None:
    """Why weights of ``needed`` bytes do not fit beside KV of ``session`` bytes, the smallest that
    is of any use, and what to do; None if they do."""
    room = math.ceil(session / KV_SHARE)
    if needed + room <= memory.limit:
        return None
    what = "its GPU may use" if memory.metal else "are available"
    said = (
        f"{name} does not fit: its weights take {_gib(needed)} and its KV cache at least "
        f"{_gib(room)}, but of this machine's {_gib(memory.total)} {what} {_gib(memory.limit)}. "
    )
    smaller = (
        f"Take a model whose weights are below {_gib(max(0, memory.limit - room))}, e.g. the same "
        "one in 4 bits (https://huggingface.co/mlx-community)"
    )
    most = memory.total - max(_SYSTEM_BYTES, memory.total // 10)
    if not memory.metal or needed + room > most:
        return f"{said}{smaller}"
    wanted = min(most, needed + 2 * room + (1 << 30)) >> 20
    return f"{said}{smaller}, or let the GPU use more: sudo sysctl {_WIRED_LIMIT}={wanted}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _tensors(file: Path) -> Iterator[dict[str, Any]]:
    """What a safetensors file's header says of each tensor. Nothing of one that is none."""
    try:
        with file.open("rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            header = json.loads(data.read(min(length, _MAX_HEADER)))
    except (OSError, ValueError, struct.error):
        return
    yield from (tensor for name, tensor in header.items() if name != "__metadata__")


def _tensor_nbytes(tensor: dict[str, Any], dtype: str) -> int:
    start, end = tensor["data_offsets"]
    stored = _FLOATS.get(tensor["dtype"])
    if stored is None or dtype not in _CAST:
        return int(end - start)
    return int(end - start) // stored * _CAST[dtype]
