"""Limits of a recurrent layer's time steps that mlx-lm assumes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def unlimited_steps(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in a model's configuration before mlx-lm reads it; {} for most.

    Granite 4's published ones do not say what limits Mamba's time steps: nothing does in vLLM
    (``mamba_mixer2.py``, ``dt_limit``) and transformers, mlx-lm 0.32 lets none be below 0.001. Of
    such a step a state would forget more, with every token.
    """
    if config.get("model_type") == "granitemoehybrid" and not config.get("time_step_limit"):
        return {"time_step_limit": [0.0, math.inf]}
    return {}
