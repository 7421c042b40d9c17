"""What vLLM does on this machine, found out by starting it: one layer of the model, random weights.

No version is asked for. A child process makes the engine as ``vllm serve`` would, with the
connector switched off; what our hooks need is there or it is not, and the KV cache of the attention
backend that vLLM chose reads back or does not.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from typing import Any, Final

import msgspec

from vllm_mac_decode.tools.check.finding import Finding, fine, warning, wrong

#: Seconds for the child; a machine that compiles kernels for the first time needs them.
CHILD_SECONDS: Final = 300.0

#: What vLLM may take of a memory that the system lives in as well.
SHARED_UTILIZATION: Final = 0.85
#: vLLM's own default is this or a little less.
_USUAL_UTILIZATION: Final = 0.92

_MARK: Final = "mac-decode check: "


class EngineFacts(msgspec.Struct, kw_only=True):
    """What the child found. Sizes are in bytes, 0 where there is no GPU."""

    device: str = ""
    #: CPU and GPU share one memory.
    integrated: bool = False
    free: int = 0
    total: int = 0
    hooks: bool = False
    backend: str = ""
    kv_dtype: str = ""
    #: Layers leave while their attention is computed, not only after it.
    early: bool = False
    #: Why the KV cache cannot be exported; "" where it can.
    problem: str = ""
    #: What ended the child's work, with the step that it was in.
    error: str = ""


def ask_child(model: str, seconds: float = CHILD_SECONDS) -> EngineFacts:
    """Run the child; with an empty ``model`` no engine is made."""
    command = [sys.executable, "-m", "vllm_mac_decode.tools.check.engine", model]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.TemporaryFile("w+") as output:
        try:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return EngineFacts(error=f"it did not get ready within {seconds:.0f} s")
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith(_MARK):
            return msgspec.json.decode(line.removeprefix(_MARK), type=EngineFacts)
    last = lines[-1] if lines else "without a word"
    return EngineFacts(error=f"it ended with status {status}: {last}")


def judge(facts: EngineFacts, model: str) -> tuple[list[Finding], float | None]:
    """Findings, and the ``--gpu-memory-utilization`` to start vLLM with, None for its own."""
    findings = []
    memory, utilization = _memory(facts)
    if memory is not None:
        findings.append(memory)
    if not facts.hooks:
        findings.append(
            wrong(
                "hooks",
                f"This vLLM has not got what the hand-off hooks into: {facts.error}",
                "Please report it with vLLM's version; releases 0.26 to 0.33 have it",
            )
        )
        return findings, utilization
    findings.append(fine("hooks", "This vLLM has everything that the hand-off hooks into"))
    if facts.error:
        findings.append(
            warning(
                "engine",
                f"vLLM did not start with one layer of {model}: {facts.error}",
                "Does `vllm serve` start without --kv-connector? If another vLLM runs here, stop "
                "it first",
            )
        )
    elif facts.problem:
        findings.append(
            wrong(
                "layout",
                f"The KV cache of {facts.backend} cannot be exported: {facts.problem}",
                "Leave --kv-cache-dtype at auto or fp8; else try another --attention-backend",
            )
        )
    elif facts.backend:
        when = "during" if facts.early else "after"
        findings.append(
            fine(
                "layout",
                f"The KV cache of {facts.backend} reads back as it was written, in "
                f"{facts.kv_dtype}; a layer leaves {when} its attention",
                backend=facts.backend,
            )
        )
    return findings, utilization


def _memory(facts: EngineFacts) -> tuple[Finding | None, float | None]:
    if not facts.total:
        seen = "No GPU that vLLM uses: prefill on a CPU is slow"
        remedy = "Nothing, if this is a trial; else see nvidia-smi and vLLM's installation"
        return warning("memory", seen, remedy), None
    free = facts.free / facts.total
    most = SHARED_UTILIZATION if facts.integrated else _USUAL_UTILIZATION
    shared = ", shared with the system" if facts.integrated else ""
    seen = (
        f"{facts.device}: {facts.free / 2**30:.0f} of {facts.total / 2**30:.0f} GiB{shared} are "
        "free"
    )
    figures: dict[str, str | float] = {"device": facts.device, "free": facts.free}
    if free < most:
        # vLLM refuses to start when it cannot have its whole share at once.
        fits = max(0.05, int(20 * (free - 0.02)) / 20)
        remedy = f"Free some, or start vLLM with --gpu-memory-utilization {fits:.2f} or less"
        return warning("memory", seen, remedy, **figures), fits
    return fine("memory", seen, **figures), SHARED_UTILIZATION if facts.integrated else None


# --- the child ------------------------------------------------------------------------------


def _look(model: str) -> EngineFacts:
    facts = EngineFacts()
    try:
        _look_at_memory(facts)
        from vllm_mac_decode.engine import adapter

        adapter.install()
        facts.hooks = True
        if model:
            _look_at_engine(facts, model)
    except BaseException as error:
        first = str(error).strip().partition("\n")[0]
        facts.error = f"{type(error).__name__}: {first}"[:500]
    return facts


def _look_at_memory(facts: EngineFacts) -> None:
    import torch

    if not torch.cuda.is_available():
        return
    properties = torch.cuda.get_device_properties(0)
    facts.device = properties.name
    facts.integrated = bool(getattr(properties, "is_integrated", False))
    facts.free, facts.total = torch.cuda.mem_get_info(0)
    if facts.integrated:
        # CUDA counts the system's file cache as taken.
        import psutil  # type: ignore[import-untyped]

        facts.free = max(facts.free, min(facts.total, psutil.virtual_memory().available))


def _look_at_engine(facts: EngineFacts, model: str) -> None:
    from vllm import LLM
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    options: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "hf_overrides": {"num_hidden_layers": 1},
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 64 << 20,
        "distributed_executor_backend": "uni",
        "kv_transfer_config": {
            "kv_connector": "mac_decode",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"enabled": False},
        },
    }
    if facts.total:
        # One layer and the embeddings: little, also beside a vLLM that runs.
        options["gpu_memory_utilization"] = min(0.5, max(0.05, (8 << 30) / facts.total))
    engine = LLM(model=model, **options)
    worker: Any = get_kv_transfer_group()
    report = worker.get_handshake_metadata()
    dtypes = {part.dtype for layer in report.layers.values() for part in layer.parts}
    facts.kv_dtype = ", ".join(sorted(dtypes))
    facts.problem, facts.early = report.problem, worker._early
    context = worker._vllm_config.compilation_config.static_forward_context
    backends = {
        layer.get_attn_backend().get_name()
        for layer in context.values()
        if hasattr(layer, "get_attn_backend")  # experts are there, too
    }
    facts.backend = ", ".join(sorted(backends))
    del engine  # which takes its connector along


if __name__ == "__main__":
    found = _look(sys.argv[1])
    print("\n" + _MARK + msgspec.json.encode(found).decode(), flush=True)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # Taking the engine and the libraries down lasts seconds, and some of them fail at it.
    os._exit(0)
