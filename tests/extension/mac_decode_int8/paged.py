"""vLLM's side: how the kind is read out of the paged cache."""

from dataclasses import replace

import torch

from mac_decode_int8 import KIND
from mlx_receiver.wire.layout import FULL
from vllm_mac_decode.worker.kinds import AttentionKV
from vllm_mac_decode.worker.paged_cache import PagedPart

FLOATS = ("bfloat16", "float16", "float32")


class Int8Adapter:
    """Layers that keep K and V of every token, which the built-in adapter finds in the blocks."""

    def __init__(self):
        self._attention = AttentionKV()

    def readable(self, layer):
        plain = self._attention.readable(layer)
        if plain is None or plain.kind != FULL or plain.layout.parts[0].dtype not in FLOATS:
            return None
        return replace(plain, kind=KIND, layout=Int8Paged(plain.layout))


class Int8Paged:
    """Reads what ``plain`` reads, and rounds it."""

    def __init__(self, plain):
        self._plain = plain
        self.block_size = plain.block_size
        scales = [PagedPart(f"{p.name}.scale", p.heads, 1, "bfloat16") for p in plain.parts]
        self.parts = scales + [PagedPart(p.name, p.heads, p.width, "int8") for p in plain.parts]

    def read(self, cache, block_ids, out):
        rows = len(block_ids) * self.block_size
        sizes = [part.heads * rows * part.row_bytes for part in self._plain.parts]
        read = torch.empty(sum(sizes), dtype=torch.uint8, device=out.device)
        self._plain.read(cache, block_ids, read)
        targets = out.split([part.heads * rows * part.row_bytes for part in self.parts])
        for index, plane in enumerate(read.split(sizes)):
            part = self._plain.parts[index]
            numbers = plane.view(getattr(torch, part.dtype)).view(part.heads, rows, part.width)
            numbers = numbers.float()
            scale = (numbers.abs().amax(-1, keepdim=True) / 127).bfloat16()
            rounded = (numbers / scale.float().clamp(min=1e-30)).round()
            targets[index].view(torch.bfloat16).copy_(scale.flatten())
            targets[index + len(sizes)].view(torch.int8).copy_(rounded.flatten())
