"""Windows of attention that mlx-lm makes shorter than vLLM does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_vllm_has_them(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in a model's configuration before mlx-lm reads it; {} for most.

    Of Cohere2 vLLM 0.32 attends to ``sliding_window`` tokens before the last one, "to match the
    training convention" (its ``commandr.py``), mlx-lm and transformers to that one and those
    before it, together as many. A prompt that vLLM has prefilled is continued as it began.
    """
    window = config.get("sliding_window")
    if config.get("model_type") == "cohere2" and isinstance(window, int):
        return {"sliding_window": window + 1}
    return {}
