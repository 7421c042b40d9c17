"""Prefill on a CUDA GPU with the KV export on and off, side by side in one engine.

Both kinds of request go through the same vLLM engine, alternating: one kind is handed off to an
MLX receiver on this machine, the other carries an ``extra_args`` marker that keeps it local.
What differs between their times to the first token is what exporting costs.

    python -m bench.overlap_gpu --receiver-gpu 1     # a machine with two GPUs
    python -m bench.overlap_gpu --null-model         # with one, see bench/null_model.py
    python -m bench.overlap_gpu --null-model --add   # once more, pooled with what --out holds

One process is one sample of what differs between processes: run several, on several machines.

The model has Llama-3.1-8B's shape and random weights, written once to ``--model``. The link is TCP
over loopback; what two plain programs get out of it is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from argparse import Namespace
from pathlib import Path
from typing import Any

from bench import transport
from bench.lab import LOOPBACK, RESULTS, record, save
from vllm_mac_decode.tools.demo.services import free_ports

SHAPE_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}


def write_model(folder: Path, dtype: str, **shape: Any) -> None:
    """A random model of the 8B shape (or with other ``shape`` keys) as safetensors, one file a
    layer; written once."""
    import torch
    from safetensors.torch import save_file

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = SHAPE_8B | {"torch_dtype": dtype} | shape
    layers = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    torch.manual_seed(0)

    def random_weight(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns, device=device, dtype=torch.float32) * columns**-0.5).to(
            kind
        )

    h, f = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    vocabulary = config["vocab_size"]
    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, Any]) -> None:
        save_file(
            {k: v.cpu().contiguous() for k, v in tensors.items()},
            folder / name,
            metadata={"format": "pt"},
        )
        index.update(dict.fromkeys(tensors, name))

    for i in range(layers):
        p = f"model.layers.{i}."
        save(f"model-layer-{i}.safetensors", {
            p + "self_attn.q_proj.weight": random_weight(heads, h),
            p + "self_attn.k_proj.weight": random_weight(kv, h),
            p + "self_attn.v_proj.weight": random_weight(kv, h),
            p + "self_attn.o_proj.weight": random_weight(h, heads),
            p + "mlp.gate_proj.weight": random_weight(f, h),
            p + "mlp.up_proj.weight": random_weight(f, h),
            p + "mlp.down_proj.weight": random_weight(h, f),
            p + "input_layernorm.weight": torch.ones(h, dtype=kind),
            p + "post_attention_layernorm.weight": torch.ones(h, dtype=kind),
        })  # fmt: skip
    save("model-outer.safetensors", {
        "model.embed_tokens.weight": random_weight(vocabulary, h) * h**0.5 * 0.5,
        "model.norm.weight": torch.ones(h, dtype=kind),
        "lm_head.weight": random_weight(vocabulary, h),
    })  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


class ReceiverProcess:
    """``mlx-receiver start`` on this machine."""

    def __init__(
        self, model: Path, dtype: str, log: Path, gpu: str = "", null_model: bool = False
    ) -> None:
        """``gpu``: the only one that it sees; by default the first, beside vLLM. ``null_model``: it
        computes nothing, on no GPU."""
        port, self.http = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self.log = log
        real = "from mlx_receiver.cli import main; main()"
        program = ["-m", "bench.null_model"] if null_model else ["-c", real]
        self.process = subprocess.Popen(
            [sys.executable, *program,
             "start", "--model", str(model), *([] if null_model else ["--dtype", dtype]),
             "--port", str(port), "--http-port", str(self.http)],
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
            stdout=log.open("wb"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self, seconds: float) -> None:
        """Until ``GET /health`` answers."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.http}/health", timeout=2)
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(self.log.read_text(errors="replace")[-3000:])

    def json(self, path: str) -> Any:
        """``GET path``."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=10) as answer:
            return json.load(answer)

    def decoded_tokens(self) -> int:
        """How many tokens it has decoded."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith("mlx_receiver_decoded_tokens_total "):
                    return int(float(line.split()[1]))
        return 0

    def stop(self) -> None:
        """End it."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Engine:
    """vLLM, stepped by hand so that the first token's time is seen."""

    def __init__(
        self,
        model: Path,
        connector: bool,
        receiver: str,
        streams: str = "auto",
        proof: bool = True,
        **options: Any,
    ) -> None:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        from vllm.v1.engine.llm_engine import LLMEngine

        if "attention_backend" in options:
            options["attention_backend"] = AttentionBackendEnum[options["attention_backend"]]
        if connector:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="mac_decode",
                kv_role="kv_producer",
                kv_connector_extra_config={
                    "receiver": receiver,
                    "offload": "always",
                    "streams": int(streams) if streams.isdigit() else streams,
                    "proof": proof,
                },
            )
        arguments = EngineArgs(model=str(model), skip_tokenizer_init=True, **options)
        self.engine = LLMEngine.from_engine_args(arguments, enable_multiprocessing=True)
        self.count = 0

    def run(self, prompt: list[int], tokens: int, local: bool) -> dict[str, Any]:
        """One greedy request: token ids, seconds to the first token and between the others."""
        from vllm import SamplingParams

        self.count += 1
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args={"keep": "local"} if local else None,
        )  # fmt: skip
        began = time.perf_counter()
        self.engine.add_request(f"r{self.count}", {"prompt_token_ids": prompt}, params)
        times, ids = [], []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                now = time.perf_counter() - began
                ids = list(output.outputs[0].token_ids)
                times += [now] * (len(ids) - len(times))
        return {"ids": ids, "times": times}


def prompt_of(length: int, seed: int) -> list[int]:
    """Random token ids, so that no prefix is cached, nor held by the receiver."""
    source = random.Random(f"{length} {seed}")
    return [source.randrange(1000, 120000) for _ in range(length)]


def summary(values: list[float]) -> dict[str, float]:
    """Median, 90th percentile and range of milliseconds."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 2),
        "p90": round(ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))], 2),
        "min": round(ordered[0], 2),
        "max": round(ordered[-1], 2),
    }


def pooled(row: dict[str, Any]) -> dict[str, Any]:
    """The row with figures over the samples of all its processes, and each process's median gap."""
    runs = [process["samples"] for process in row["processes"]]
    figures = {
        name: summary([value for run in runs for value in run.get(name, ())]) for name in runs[0]
    }
    local, handed = figures["first_token_local_ms"], figures["first_token_handed_off_ms"]
    return {
        **row,
        **figures,
        "samples": sum(len(run["handoff_gap_ms"]) for run in runs),
        "slowdown_percent": round(100 * (handed["median"] / local["median"] - 1), 2),
        "process_gaps_ms": [round(statistics.median(run["handoff_gap_ms"]), 2) for run in runs],
    }


def measure(
    engine: Engine, receiver: ReceiverProcess | None, length: int, tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Alternate local and handed-off requests of one length; short ones more often, because what
    else the machine does is a larger part of them. Milliseconds of each kind."""
    repeats *= max(1, min(8, 8192 // length))
    local, handed, gaps, local_tpot, remote_tpot, seconds, lags = [], [], [], [], [], [], []
    for i in range(repeats + 1):
        a = engine.run(prompt_of(length, 2 * i), tokens, local=True)
        b = engine.run(prompt_of(length, 2 * i + 1), tokens, local=False)
        if i == 0:
            continue  # buffers, kernels and caches are made in the first round
        local.append(a["times"][0])
        handed.append(b["times"][0])
        gaps.append(b["times"][1] - b["times"][0])
        if tokens > 2:
            local_tpot.append((a["times"][-1] - a["times"][1]) / (tokens - 2))
            remote_tpot.append((b["times"][-1] - b["times"][1]) / (tokens - 2))
            seconds.append(b["times"][2] - b["times"][1])  # it joins the batch for this one
        if receiver is not None:
            lags.append(exposed(receiver))
    samples = {
        "first_token_local_ms": local,
        "first_token_handed_off_ms": handed,
        "handoff_gap_ms": gaps,
    }
    if tokens > 2:
        samples["local_ms_per_token"] = local_tpot
        samples["receiver_ms_per_token"] = remote_tpot
        samples["receiver_second_token_ms"] = seconds
    known = [lag for lag in lags if lag is not None]
    for name in known[0] if known else ():
        samples[f"{name}_ms"] = [lag[name] for lag in known]
    return {name: [round(1000 * value, 3) for value in values] for name, values in samples.items()}


def latest_timeline(receiver: ReceiverProcess) -> Any:
    """The latest hand-off, as the receiver saw it; None before the first."""
    handoffs = receiver.json("/handoffs")
    if not handoffs:
        return None
    latest = max(handoffs, key=lambda row: row["opened_ns"])
    return receiver.json(f"/handoffs/{latest['request_id']}")


def exposed(receiver: ReceiverProcess) -> dict[str, float] | None:
    """Seconds of the latest hand-off, as the receiver saw it."""
    timeline = latest_timeline(receiver)
    if timeline is None or not timeline["complete_ns"]:
        return None
    computed = [block["computed_ns"] for block in timeline["blocks"]]
    ready = max(timeline["complete_ns"], timeline["started_ns"])
    return {
        "cache_complete_after_last_layer": (timeline["complete_ns"] - max(computed)) / 1e9,
        "export_span": (timeline["complete_ns"] - min(computed)) / 1e9,
        "ready_to_first_decoded": (timeline["first_decoded_ns"] - ready) / 1e9,
    }


def link(tokens: int) -> dict[str, float]:
    """What two plain programs get out of this machine's loopback, for that prompt's KV."""
    options = Namespace(layers=32, tokens=tokens, frame_kib=0, repeats=5, no_verify=True)
    row = transport.measure(LOOPBACK, "sockets", options)
    return {key: row[key] for key in ("gb_per_s", "cpu_s_per_gb_both")}


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("/tmp/llama-8b-shape"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 1024, 4096, 16384, 32768])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=None, help="max tokens of one step")
    parser.add_argument("--streams", default="auto", help="connections to the receiver")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--no-connector", action="store_true", help="plain vLLM, for comparison")
    parser.add_argument("--memory", type=float, default=0.6)
    receivers = parser.add_mutually_exclusive_group()
    receivers.add_argument(
        "--receiver-gpu",
        default="",
        help="the receiver's own GPU, as on another machine: two processes on one take turns",
    )
    receivers.add_argument(
        "--null-model", action="store_true", help="a receiver that lands KV and computes nothing"
    )
    parser.add_argument("--add", action="store_true", help="add the rows to those in --out")
    parser.add_argument("--out", type=Path, default=RESULTS / "overlap_gpu.json")
    options = parser.parse_args()

    import torch

    write_model(options.model, "bfloat16", num_hidden_layers=options.layers)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = record("prefill with KV export on and off, one engine, alternating requests")
    result["machine"] |= {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpus": 2 if options.receiver_gpu else 1,
    }
    result["receiver"] = "null model" if options.null_model else "mlx"
    result["rows"] = []
    if options.add:
        earlier = json.loads(options.out.read_text())
        result["command"] = f"{earlier['command']}; {result['command']}"
        result["rows"] = earlier["rows"]
    receiver = None
    if not options.no_connector:
        result["loopback"] = link(8192)
        receiver = ReceiverProcess(
            options.model,
            "bfloat16",
            options.out.with_suffix(".receiver.log"),
            gpu=options.receiver_gpu,
            null_model=options.null_model,
        )
    longest = max(options.lengths) + options.tokens
    try:
        engine = Engine(
            options.model,
            not options.no_connector,
            "" if receiver is None else receiver.address,
            options.streams,
            proof=not options.null_model,
            max_model_len=longest + 16,
            max_num_batched_tokens=options.chunk or longest,
            gpu_memory_utilization=options.memory,
            enforce_eager=options.eager,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        if receiver is not None:
            receiver.wait(180)
            time.sleep(6)  # the link's retry interval
            warm = engine.run(prompt_of(256, 99), 8, local=False)  # compiles MLX's kernels
            result["warm_gap_s"] = round(warm["times"][1] - warm["times"][0], 2)
        for length in options.lengths:
            samples = measure(engine, receiver, length, options.tokens, options.repeats)
            what = {
                "prompt_tokens": length,
                "streams": options.streams,
                "step_tokens": options.chunk,
            }
            process = {
                "date": result["date"],
                "loopback_gb_per_s": result.get("loopback", {}).get("gb_per_s"),
                "samples": samples,
            }
            same = [r for r in result["rows"] if what.items() <= r.items()]
            row = pooled({**what, "processes": [*(same[0]["processes"] if same else ()), process]})
            if same:
                result["rows"][result["rows"].index(same[0])] = row
            else:
                result["rows"].append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "processes"}), flush=True)
            save(result, options.out)
            if receiver is not None:
                timeline = options.out.with_suffix(f".{length}.timeline.json")
                timeline.write_text(json.dumps(latest_timeline(receiver)))
    finally:
        if receiver is not None:
            receiver.stop()


if __name__ == "__main__":
    main()
