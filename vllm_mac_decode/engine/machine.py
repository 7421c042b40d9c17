"""What decides how fast vLLM computes the model, as far as vLLM says it: never an operation of the
GPU's, whose context this process must not have."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine.core import DPEngineCoreProc
from vllm.version import __version__ as vllm_version

from vllm_mac_decode.engine import weights
from vllm_mac_decode.scheduler.port import Machine

logger = init_logger("vllm.mac_decode.engine")

#: Assumed where vLLM does not say how many texts it decodes at once.
_ROWS = 1


def machine(core: Any) -> Machine | None:
    """The engine core's; None where vLLM does not say what it must."""
    if isinstance(core, DPEngineCoreProc):
        # A step of one is a step of all, and only that one knows whether it is idle.
        logger.info("the engines step together: how fast one of them is cannot be measured")
        return None
    try:
        return _machine(core)
    except Exception:
        logger.exception("how fast vLLM is cannot be measured")
        return None


def _machine(core: Any) -> Machine:
    config = core.vllm_config
    model, scheduler = config.model_config, config.scheduler_config
    parallel = config.parallel_config
    device = _device()
    gpus = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if gpus > 1:
        device = f"{gpus} x {device}"
    limits = (scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold)
    cache = core.scheduler.kv_cache_config
    memory = sum(int(tensor.size) for tensor in getattr(cache, "kv_cache_tensors", ()))
    key = {
        "hardware": device,
        "vllm": str(vllm_version),
        "model": str(model.model),
        "revision": str(model.revision),
        "layers": str(getattr(model.hf_text_config, "num_hidden_layers", "")),
        "hf_overrides": str(model.hf_overrides),
        "weights": weights.precision(config),
        "dtype": str(model.dtype),
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "max_num_batched_tokens": str(scheduler.max_num_batched_tokens),
        "long_prefill_token_threshold": str(scheduler.long_prefill_token_threshold),
        "tensor_parallel_size": str(parallel.tensor_parallel_size),
        "pipeline_parallel_size": str(parallel.pipeline_parallel_size),
        "enforce_eager": str(model.enforce_eager),
        "speculative": str(config.speculative_config is not None),
    }
    return Machine(
        device=device,
        model=str(model.model),
        key={name: value[:1024] for name, value in key.items()},
        chunk=min(limit for limit in limits if limit),
        rows=int(getattr(scheduler, "max_num_seqs", _ROWS)),
        max_tokens=int(model.max_model_len),
        vocab_size=int(model.get_vocab_size()),
        kv_bytes=memory * gpus,
    )


def _device() -> str:
    """The GPU's name, which vLLM asks the driver for, or the processor's."""
    from vllm.platforms import current_platform

    name = ""
    try:
        name = str(current_platform.get_device_name())
    except Exception:  # not every platform has one
        logger.debug("the device has no name", exc_info=True)
    if name and name.lower() != "cpu":
        return name
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return name or "unknown"
