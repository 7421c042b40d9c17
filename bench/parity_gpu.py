"""Greedy parity on a CUDA GPU: vLLM CUDA prefill -> MLX CUDA decode against MLX alone.

For each attention backend and dtype: a small random Llama, prompts around block boundaries,
chunked prefill, prefix-cache hits, CUDA graphs on. Tokens must equal MLX's own in fp32; in bf16
the first token that differs is reported, with MLX's margin between its two best logits there.

    python -m bench.parity_gpu
    python -m bench.parity_gpu --models FOLDER ...   # small models of other families
    python -m bench.parity_gpu --models FOLDER@FLASHMLA --dtype bfloat16 --add
    python -m bench.parity_gpu --kv-cache-dtype fp8  # where tokens need not be equal: see the proof
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.lab import RESULTS, record, save
from bench.overlap_gpu import Engine, ReceiverProcess, prompt_of, write_model

ROWS = (("TRITON_ATTN", "float32"), ("FLASH_ATTN", "bfloat16"), ("TRITON_ATTN", "bfloat16"))
LENGTHS = (1, 2, 15, 16, 17, 33, 128, 129, 700, 3000)
TOKENS = 32
#: What makes a row another than those that are there.
ROW = ("model", "backend", "dtype", "kv_cache_dtype", "gdn_prefill_backend")
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
from mlx_lm.models.cache import make_prompt_cache
from mlx_receiver.decode.model import find_model, load_model
path, prompts, n, dtype = json.load(sys.stdin)
model = load_model(find_model(path), dtype).model
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


def one(what: str, dtype: str, kv: str, gdn: str, out: Path) -> dict[str, Any]:
    """One engine, all prompts, each three times: fresh, a full prefix hit, a longer one.

    ``what``: a backend, or a model's folder, whose backend vLLM chooses unless it follows behind
    an ``@``. ``kv``: vLLM's ``--kv-cache-dtype``. ``gdn``: its ``--gdn-prefill-backend``.
    """
    import torch

    folder, _, backend = what.partition("@")
    model, options = Path(folder), {"additional_config": {"gdn_prefill_backend": gdn}}
    if not model.is_dir():
        backend = folder
        model = Path(tempfile.gettempdir()) / f"small-{backend}-{dtype}"
        write_model(model, dtype, **SHAPE)
    if backend:
        options["attention_backend"] = backend
    config = json.loads((model / "config.json").read_text())
    vocabulary, longest = config["vocab_size"], min(4096, config["max_position_embeddings"])

    def prompt(length: int, seed: int) -> list[int]:
        return [token % vocabulary for token in prompt_of(length, seed)]

    own = model / "mlx" if (model / "mlx").is_dir() else model
    receiver = ReceiverProcess(own, dtype, out.with_suffix(".receiver.log"))
    try:
        engine = Engine(
            model, True, receiver.address, dtype=dtype,
            max_model_len=longest, max_num_batched_tokens=512, max_num_seqs=8,
            gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 30, disable_log_stats=True,
            kv_cache_dtype=kv,
            **options,
        )  # fmt: skip
        receiver.wait(240)
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
        "backend": backend or "auto",
        "model": config["model_type"],
        "dtype": dtype,
        "kv_cache_dtype": kv,
        **({} if gdn == "auto" else {"gdn_prefill_backend": gdn}),
        "equal": sum(row["equal"] for row in rows),
        "of": len(rows),
        "vllm_alone_equal": sum(vllm_rows),
        "of_vllm_alone": len(vllm_rows),
        "differing": [row for row in rows if not row["equal"]],
        "decoded_by_receiver": handed,
        "proof": proofs[0] if proofs else "",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def process(what: str, dtype: str, kv: str, gdn: str, out: Path) -> dict[str, Any]:
    """``one`` in a process of its own: a row, or what it ended with."""
    part = out.with_suffix(f".{Path(what).name}.{dtype}.json")
    again = ["-m", "bench.parity_gpu", "--one", what, dtype, kv, gdn, "--out", str(part)]
    log = part.with_suffix(".engine.log")
    with log.open("wb") as file:
        code = subprocess.run(
            [sys.executable, *again], check=False, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if code:
        tail = log.read_text(errors="replace")[-1500:]
        return {"model": what, "dtype": dtype, "exit": code, "log": tail}
    return dict(json.loads(part.read_text()))


def main() -> None:
    """Rows beside each other: only their tokens matter, and starting takes most of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "parity_gpu.json")
    parser.add_argument("--models", nargs="+", default=[], metavar="FOLDER[@BACKEND]|BACKEND")
    parser.add_argument("--dtype", default="float32", help="of --models")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--gdn-prefill-backend", default="auto")
    parser.add_argument("--at-once", type=int, default=8, help="engines beside each other")
    parser.add_argument("--add", action="store_true", help="keep the other rows of --out")
    parser.add_argument("--one", nargs=4, metavar=("WHAT", "DTYPE", "KV", "GDN"))
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
    if options.add and options.out.exists():
        earlier = json.loads(options.out.read_text())
        result["command"] = f"{earlier['command']}; {result['command']}"
        result["rows"] = earlier["rows"]
    rows = [(_absolute(model), options.dtype) for model in options.models] or ROWS
    settings = (options.kv_cache_dtype, options.gdn_prefill_backend, options.out)
    with ThreadPoolExecutor(options.at_once) as pool:
        for done in as_completed([pool.submit(process, *pair, *settings) for pair in rows]):
            row = done.result()
            print(json.dumps(row), flush=True)
            if "gpu" in row:
                result["machine"]["gpu"] = row.pop("gpu")
                row["date"] = result["date"]
                replaced = [r for r in result["rows"] if _same(r, row)]
                result["rows"] = [r for r in result["rows"] if r not in replaced] + [row]
                save(result, options.out)


def _absolute(what: str) -> str:
    folder, at, backend = what.partition("@")
    return f"{Path(folder).resolve()}{at}{backend}" if Path(folder).is_dir() else what


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ROW)


if __name__ == "__main__":
    main()
