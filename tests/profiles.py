"""Profiles that nobody measured, in the files in which both sides look for theirs."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_receiver.decode.model import find_model
from mlx_receiver.decode.speed import Speed
from mlx_receiver.planning import cached
from mlx_receiver.wire.profile import Profile


def keep(model: Path, vllm: Profile, receiver: Profile, **arguments: Any) -> None:
    """For ``tests.servers``, which use fp32; ``arguments`` are vLLM's, as its engine has them."""
    loaded: Any = SimpleNamespace(dtype="float32")
    budget: Any = SimpleNamespace()
    speed = Speed(find_model(str(model)), loaded, budget, most_rows=1, measures=False)
    for side, key, profile in (
        ("receiver", speed.key, receiver),
        ("vllm", _vllm_key(model, arguments), vllm),
    ):
        saved = cached.Saved(side=side, key=key, profile=profile, made=time.time())  # type: ignore[arg-type]
        assert cached.write(saved)


def _vllm_key(model: Path, arguments: dict[str, Any]) -> dict[str, str]:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_mac_decode.engine.machine import machine

    config = EngineArgs(
        model=str(model), dtype="float32", enforce_eager=True, max_model_len=2048, **arguments
    ).create_engine_config()
    core = SimpleNamespace(vllm_config=config, scheduler=SimpleNamespace(kv_cache_config=None))
    found = machine(core)
    assert found is not None
    return found.key
