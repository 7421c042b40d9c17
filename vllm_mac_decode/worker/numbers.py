"""What numbers a paged cache's elements are: floats as they are, or 8-bit floats times a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from vllm_mac_decode.worker.paged_cache import LayoutError


@dataclass(frozen=True)
class Numbers:
    """Element ``e`` of K (or V) stands for ``e.view(stored) * scales[0]`` (or ``[1]``).

    ``written`` is the dtype that the backend's own cache update takes K and V in.
    """

    stored: torch.dtype
    written: torch.dtype
    scales: tuple[float, float] = (1.0, 1.0)

    @property
    def name(self) -> str:
        """The wire's name of ``stored``."""
        return str(self.stored).removeprefix("torch.").removesuffix("fn")

    @property
    def integers(self) -> int:
        """1 to so many are held exactly, whatever the dtype (up to 127)."""
        return {torch.float8_e4m3fn: 16, torch.float8_e5m2: 8}.get(self.stored, 127)

    def to_write(self, integers: torch.Tensor, part: int) -> torch.Tensor:
        """What K (part 0) or V must be for the cache to hold these numbers, which it can."""
        if self.stored.itemsize > 1:
            return integers.to(self.written)
        # A little more: some kernels round to the nearest 8-bit float, vLLM's for CPUs cuts off.
        return (integers * (self.scales[part] * (1 + 2**-6))).to(self.written)


#: By ``Attention.kv_cache_dtype``. The tensor's own dtype says ``uint8`` for all of them.
_FLOAT8: Final = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def numbers_of(
    attention: Any, cache: torch.Tensor, written: torch.dtype, calculated: bool = False
) -> Numbers:
    """Those of a layer's cache; ``written`` is the model's dtype, ``calculated`` whether vLLM
    finds the scales itself. Raises LayoutError for a quantisation that cannot be undone with one
    scale for K and one for V."""
    if cache.is_floating_point() and cache.element_size() > 1:
        return Numbers(cache.dtype, cache.dtype)
    name = str(getattr(attention, "kv_cache_dtype", cache.dtype))
    stored = _FLOAT8.get(name)
    # AMD's older GPUs have other 8-bit floats by the same names.
    if stored is None or cache.element_size() > 1 or torch.version.hip is not None:
        raise LayoutError(
            f"its numbers are {name} in {cache.dtype}: only bfloat16, float16, float32, fp8_e4m3 "
            "and fp8_e5m2 caches can be exported (use --kv-cache-dtype auto)"
        )
    if calculated or getattr(attention, "calculate_kv_scales", False):
        raise LayoutError(
            "its fp8 scales follow from the first prompt: leave --calculate-kv-scales out"
        )
    return Numbers(stored, written, (_scale(attention, "_k_scale"), _scale(attention, "_v_scale")))


def _scale(attention: Any, name: str) -> float:
    scale = getattr(attention, name, None)
    if isinstance(scale, torch.Tensor) and scale.numel() > 1:
        raise LayoutError(f"its fp8 cache has {scale.numel()} scales, not one")
    # The number beside the tensor is what backends without a kernel for the tensor use.
    return float(getattr(attention, f"{name}_float", 1.0 if scale is None else scale))
