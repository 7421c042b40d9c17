"""Greedy parity on a CUDA GPU: vLLM CUDA prefill -> MLX CUDA decode against MLX alone.

For each attention backend and dtype: a small random Llama, prompts around block boundaries,
chunked prefill, prefix-cache hits, CUDA graphs on. Tokens must equal MLX's own in fp32; in bf16
the first token that differs is reported, with MLX's margin between its two best logits there.

    python -m bench.parity_gpu
    python -m bench.parity_gpu --models FOLDER ...   # small models of other families
    python -m bench.parity_gpu --kv-cache-dtype fp8  # where tokens need not be equal: see the proof
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.lab import RESULTS, record, save
from bench.overlap_gpu import Engine, ReceiverProcess, prompt_of, write_model

ROWS = (("TRITON_ATTN", "float32"), ("FLASH_ATTN", "bfloat16"), ("TRITON_ATTN", "bfloat16"))
LENGTHS = (1, 2, 15, 16, 17, 33, 128, 129, 700, 3000)
TOKENS = 32
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128256,
}

_ALONE = """
import json, sys
import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import load_model
from mlx_lm.models.cache import make_prompt_cache
from pathlib import Path
path, prompts, n, dtype = json.load(sys.stdin)
model, _ = load_model(Path(path))
model.update(tree_map(lambda p: p.astype(getattr(mx, dtype)), model.parameters()))
out = []
for prompt in prompts:
    cache = make_prompt_cache(model)
    logits = model(mx.array([prompt]), cache=cache)
    tokens, margins = [], []
    for _ in range(n):
        last = logits[0, -1].astype(mx.float32)
        best = mx.sort(last)[-2:]
        margins.append(float((best[1] - best[0]).item()))
        tokens.append(int(mx.argmax(last).item()))
        logits = model(mx.array([[tokens[-1]]]), cache=cache)
    out.append([tokens, margins])
json.dump(out, sys.stdout)
"""


def mlx_alone(model: Path, prompts: list[list[int]], dtype: str) -> list[Any]:
    """For each prompt MLX's own greedy tokens, and the margin of each choice."""
    done = subprocess.run(
        [sys.executable, "-c", _ALONE],
        input=json.dumps([str(model), prompts, TOKENS, dtype]),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def compare(got: list[int], alone: list[Any]) -> dict[str, Any]:
    """Where the tokens part, if they do."""
    tokens, margins = alone
    for i, (a, b) in enumerate(zip(got, tokens, strict=True)):
        if a != b:
            return {"equal": False, "first_difference": i, "mlx_margin_there": round(margins[i], 4)}
    return {"equal": True}


def one(backend: str, dtype: str, kv: str, out: Path) -> dict[str, Any]:
    """One engine, all prompts, each three times: fresh, a full prefix hit, a longer one.

    ``backend`` may be a model's folder instead: then it is the one that vLLM chooses. ``kv``:
    vLLM's ``--kv-cache-dtype``.
    """
    import torch

    model, options = Path(backend), {}
    if not model.is_dir():
        model = Path(tempfile.gettempdir()) / f"small-{backend}-{dtype}"
        write_model(model, dtype, **SHAPE)
        options["attention_backend"] = backend
    config = json.loads((model / "config.json").read_text())
    vocabulary, longest = config["vocab_size"], min(4096, config["max_position_embeddings"])

    def prompt(length: int, seed: int) -> list[int]:
        return [token % vocabulary for token in prompt_of(length, seed)]

    own = model / "mlx" if (model / "mlx").is_dir() else model
    receiver = ReceiverProcess(own, dtype, out.with_suffix(f".{model.name}.{dtype}.log"))
    try:
        engine = Engine(
            model, True, receiver.address, dtype=dtype,
            max_model_len=longest, max_num_batched_tokens=512, max_num_seqs=8,
            gpu_memory_utilization=0.2, kv_cache_memory_bytes=1 << 30, disable_log_stats=True,
            kv_cache_dtype=kv,
            **options,
        )  # fmt: skip
        receiver.wait(120)
        time.sleep(6)
        engine.run(prompt(64, 1), 4, local=False)
        lengths = [n for n in LENGTHS if n + 40 + TOKENS < longest]
        fresh = [prompt(n, 1000 + n) for n in lengths]
        prompts = fresh + fresh + [p + prompt(40, len(p)) for p in fresh]
        before = receiver.decoded_tokens()
        got = [engine.run(p, TOKENS, local=False)["ids"] for p in prompts]
        local = [engine.run(p, TOKENS, local=True)["ids"] for p in fresh]
        handed = receiver.decoded_tokens() - before
        proofs = list(receiver.json("/health")["proofs"].values())
    finally:
        receiver.stop()
    alone = mlx_alone(own, prompts, dtype)
    rows = [
        {"prompt_tokens": len(p)} | compare(g, a)
        for p, g, a in zip(prompts, got, alone, strict=True)
    ]
    vllm_rows = [compare(g, a)["equal"] for g, a in zip(local, alone, strict=False)]
    return {
        "backend": "auto" if Path(backend).is_dir() else backend,
        "model": config["model_type"],
        "dtype": dtype,
        "kv_cache_dtype": kv,
        "equal": sum(row["equal"] for row in rows),
        "of": len(rows),
        "vllm_alone_equal": sum(vllm_rows),
        "of_vllm_alone": len(vllm_rows),
        "differing": [row for row in rows if not row["equal"]],
        "decoded_by_receiver": handed,
        "proof": proofs[0] if proofs else "",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def process(backend: str, dtype: str, kv: str, out: Path) -> dict[str, Any]:
    """``one`` in a process of its own: a row, or what it ended with."""
    part = out.with_suffix(f".{Path(backend).name}.{dtype}.json")
    again = ["-m", "bench.parity_gpu", "--one", backend, dtype, kv, "--out", str(part)]
    log = part.with_suffix(".engine.log")
    with log.open("wb") as file:
        code = subprocess.run(
            [sys.executable, *again], check=False, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if code:
        tail = log.read_text(errors="replace")[-1500:]
        return {"backend": backend, "dtype": dtype, "exit": code, "log": tail}
    return dict(json.loads(part.read_text()))


def main() -> None:
    """All rows at once: only their tokens matter, and each spends most of its time starting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "parity_gpu.json")
    parser.add_argument("--models", type=Path, nargs="+", default=[])
    parser.add_argument("--dtype", default="float32", help="of --models")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--one", nargs=3, metavar=("BACKEND", "DTYPE", "KV"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.one:
        result = one(*options.one, options.out)
        options.out.write_text(json.dumps(result))
        return
    result = record(
        "greedy tokens of vLLM CUDA prefill + MLX CUDA decode against MLX CUDA alone; 30 prompts a "
        "row (fresh, prefix hit, extended), chunked prefill, CUDA graphs on"
    )
    result["rows"] = []
    rows = [(str(model.resolve()), options.dtype) for model in options.models] or ROWS
    kv = options.kv_cache_dtype
    with ThreadPoolExecutor(len(rows)) as pool:
        for row in pool.map(lambda pair: process(*pair, kv, options.out), rows):
            if "gpu" in row:
                result["machine"]["gpu"] = row.pop("gpu")
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            save(result, options.out)


if __name__ == "__main__":
    main()
