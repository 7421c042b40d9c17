"""Serving figures by vLLM's own client, ``vllm bench serve``, for three servers in one run.

vLLM alone, vLLM with a receiver on the same machine, and the receiver alone, all in fp32 and on
whatever cores there are: on one machine the two halves share them, so the figures compare the
ways of serving with each other and say nothing of a Spark or a Mac.

Of the relay two figures. Its own time for a decode step is ``vllm:mac_decode_relay_seconds``, from
the step's arrival in vLLM's engine process to its place in vLLM's output queue. A token's whole way
to a client holds everything: control channel, relay, vLLM's output path, HTTP. The receiver notes
when it hands over a request's first and last token, and a client on the same machine, and so on the
same monotonic clock, notes when they arrive.

    python -m bench.serving

``vllm bench serve`` with its random data set needs nothing beside vLLM; pandas and datasets
(vLLM's extra ``bench``) only for its other data sets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from bench.lab import ALL_CORES, RESULTS, record, save
from tests.servers import BIN, Receiver, Vllm, pair, start_vllm

NAME = "m"
#: Columns of the table: the client's own names, and how they are shown.
FIGURES = {
    "median_ttft_ms": "TTFT p50", "p99_ttft_ms": "TTFT p99",
    "median_tpot_ms": "TPOT p50", "p99_tpot_ms": "TPOT p99",
    "median_itl_ms": "ITL p50", "p99_itl_ms": "ITL p99",
    "output_throughput": "tokens/s",
}  # fmt: skip


def measure(
    base_url: str,
    model: Path,
    scratch: Path,
    *,
    requests: int,
    prompt: int,
    output: int,
    at_once: int,
) -> dict[str, float]:
    """One run of ``vllm bench serve``; times in milliseconds."""
    command = [
        str(BIN / "vllm"), "bench", "serve", "--backend", "openai", "--base-url", base_url,
        "--model", NAME, "--tokenizer", str(model), "--dataset-name", "random",
        "--random-input-len", str(prompt), "--random-output-len", str(output),
        "--num-prompts", str(requests), "--max-concurrency", str(at_once), "--ignore-eos",
        "--num-warmups", "4", "--temperature", "0", "--seed", "1", "--disable-tqdm",
        "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99",
        "--save-result", "--result-dir", str(scratch), "--result-filename", "result.json",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = json.loads((scratch / "result.json").read_text())
    if result["completed"] != requests:
        raise RuntimeError(f"{result['completed']} of {requests} requests completed")
    return {name: round(result[name], 2) for name in FIGURES}


def relay_latency(vllm: Vllm, receiver: Receiver, requests: int, output: int) -> dict[str, float]:
    """Milliseconds from the receiver's hand-over of a token to its arrival at an HTTP client."""
    source = random.Random(3)
    first, last = [], []
    with httpx.Client(base_url=vllm.url, timeout=60) as http:
        for number in range(requests):
            name = f"relay-latency-{number}"
            arrivals = _arrivals(
                http, name, [source.randrange(20, 49000) for _ in range(64)], output
            )
            known = httpx.get(f"{receiver.url}/handoffs").json()
            (said,) = (one for one in known if f"-{name}-" in one["request_id"])
            # Chunks that arrive together would blur which of them is meant.
            if len(arrivals) == output:
                first.append((arrivals[1] - said["first_decoded_ns"]) / 1e6)
                last.append((arrivals[-1] - said["ended_ns"]) / 1e6)
    both = sorted(first + last)
    return {
        "samples": len(both),
        "p50_ms": round(statistics.median(both), 2),
        "p99_ms": round(both[int(len(both) * 0.99) - 1], 2),
        "first_remote_token_p50_ms": round(statistics.median(first), 2),
        "last_token_p50_ms": round(statistics.median(last), 2),
    }


def relay_time(vllm: Vllm) -> dict[str, float]:
    """Milliseconds that a decode step spends in the relay: quantiles, linear within a bucket."""
    vllm.tokens([1, 2, 3], 1)  # vLLM collects the times when its engine steps
    name = "vllm:mac_decode_relay_seconds"
    buckets: dict[float, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{vllm.url}/metrics").text):
        for sample in family.samples:
            if sample.name == f"{name}_bucket":
                edge = float(sample.labels["le"])
                buckets[edge] = buckets.get(edge, 0) + sample.value

    def quantile(part: float) -> float:
        below, seen = 0.0, 0.0
        for edge, count in sorted(buckets.items()):
            if count >= part * buckets[math.inf]:
                inside = (part * buckets[math.inf] - seen) / (count - seen)
                return round(1000 * (below + (edge - below) * inside), 3)
            below, seen = edge, count
        raise AssertionError("a histogram's last bucket holds everything")

    return {"steps": buckets[math.inf], "p50_ms": quantile(0.5), "p99_ms": quantile(0.99)}


def _arrivals(http: httpx.Client, name: str, prompt: list[int], output: int) -> list[int]:
    """When each chunk of a streamed completion came (monotonic, ns)."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": output, "temperature": 0,
            "ignore_eos": True, "stream": True, "return_token_ids": True}  # fmt: skip
    found = []
    headers = {"X-Request-Id": name}
    with http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                found.append(time.monotonic_ns())
    return found


def step_ms(receiver: Receiver, before: tuple[float, float]) -> float:
    """The mean decode step since ``steps`` was ``before``, in milliseconds."""
    seconds, count = (now - then for now, then in zip(steps(receiver), before, strict=True))
    return round(1000 * seconds / count, 2) if count else 0.0


def steps(receiver: Receiver) -> tuple[float, float]:
    """Seconds in decode steps, and their number, so far."""
    name = "mlx_receiver_decode_step_seconds"
    return receiver.metric(f"{name}_sum"), receiver.metric(f"{name}_count")


def run(model: Path, logs: Path, *, requests: int, prompt: int, output: int) -> dict[str, Any]:
    """All servers, one after the other."""
    sizes = {"requests": requests, "prompt": prompt, "output": output}
    rows: list[dict[str, Any]] = []

    def add(server: str, url: str, receiver: Receiver | None) -> None:
        for at_once in (1, 8):
            before = steps(receiver) if receiver else (0.0, 0.0)
            row = {"server": server, "concurrency": at_once}
            row |= measure(url, model, logs, at_once=at_once, **sizes)
            if receiver:
                row["receiver_step_mean_ms"] = step_ms(receiver, before)
            rows.append(row)

    alone = start_vllm(model, logs / "alone.log", env=ALL_CORES)
    try:
        add("vLLM alone", alone.url, None)
    finally:
        alone.server.stop()
    named = ("--served-model-name", NAME)
    with pair(model, logs, receiver_args=named, env=ALL_CORES) as (vllm, receiver):
        add("vLLM and receiver", vllm.url, receiver)
        counts = {
            name: vllm.metric(f"vllm:mac_decode_{name}_total") for name in ("tokens", "fallbacks")
        }
        latency = relay_latency(vllm, receiver, requests, output)
        own = relay_time(vllm)
        vllm.server.stop()
        add("receiver alone", receiver.url, receiver)
    return {
        "sizes": sizes,
        "rows": rows,
        "relay_time": own,
        "relay_latency": latency,
        "decoded_by_receiver": counts["tokens"],
        "fell_back": counts["fallbacks"],
    }


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("server", "at once", *FIGURES.values(), title="milliseconds, tokens a second")
    for row in result["rows"]:
        figures = [f"{row[name]:.1f}" for name in FIGURES]
        table.add_row(row["server"], str(row["concurrency"]), *figures)
    console = Console(width=120)
    console.print(table)
    latency = result["relay_latency"]
    own = result["relay_time"]
    console.print(
        f"The relay's own time for a decode step: {own['p50_ms']} ms p50, {own['p99_ms']} ms p99 "
        f"({own['steps']:.0f} steps)"
    )
    console.print(
        f"From the receiver's hand-over of a token to the client: {latency['p50_ms']} ms p50, "
        f"{latency['p99_ms']} ms p99 ({latency['samples']} tokens)"
    )


def main() -> None:
    """Run, show, and write JSON."""
    from tests.conftest import cached_model
    from tests.models import tiny_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="default: a tiny random Llama")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    options = parser.parse_args()
    model = options.model or cached_model("tiny-llama", tiny_llama)
    logs = Path(tempfile.mkdtemp(prefix="serving-"))
    result = record(
        "vllm bench serve against vLLM alone, vLLM with a receiver, the receiver alone; fp32"
    )
    result["model"] = model.name
    result |= run(
        model, logs, requests=options.requests, prompt=options.prompt, output=options.output
    )
    show(result)
    save(result, options.out)


if __name__ == "__main__":
    main()
