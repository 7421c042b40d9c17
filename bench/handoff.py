"""One machine, one run: what the connector costs vLLM and what a hand-off takes.

Three kinds of request with fresh random prompts: vLLM without the connector; with it, kept local
by a marker; with it, handed off to a receiver on this machine. On a machine without accelerators
both engines share the cores, so the absolute times say little; the ratios are the point.

    python -m bench.handoff
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench.lab import ALL_CORES, RESULTS, record, save
from tests.servers import Vllm, pair, start_vllm


def ask(vllm: Vllm, prompt: list[int], tokens: int, local: bool) -> list[float]:
    """Seconds from the request to each token, as a streaming client sees them."""
    body: dict[str, Any] = {
        "model": vllm.name,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    if local:
        body["vllm_xargs"] = {"keep": "local"}
    began, times = time.perf_counter(), []
    with httpx.stream("POST", f"{vllm.url}/v1/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    times += [time.perf_counter() - began] * len(choice["token_ids"] or ())
    assert len(times) == tokens, f"{len(times)} of {tokens} tokens came"
    return times


def milliseconds(values: list[float]) -> float:
    """The median in milliseconds."""
    return round(1000 * statistics.median(values), 1)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "handoff.json")
    options = parser.parse_args()
    model = options.model
    if model is None:
        from vllm_mac_decode.demo.model import fetch_smollm2

        model = fetch_smollm2()
    source = random.Random(11)

    def fresh() -> list[int]:
        return [source.randrange(20, 49000) for _ in range(options.prompt_tokens)]

    logs = Path(tempfile.mkdtemp(prefix="handoff-"))
    plain, local, handed, exposed, gaps = [], [], [], [], []
    with contextlib.ExitStack() as servers:
        # All of them run all the time and are asked in turns: what slows the machine slows each.
        bare = start_vllm(model, logs / "plain.log", env=ALL_CORES)
        servers.callback(bare.server.stop)
        vllm, receiver = servers.enter_context(pair(model, logs, env=ALL_CORES))
        base = f"{receiver.url}/handoffs"
        for server in (bare, vllm):
            ask(server, fresh(), options.tokens, False)
        kv_bytes = receiver.metric("mlx_receiver_kv_bytes_total")
        for _ in range(options.repeats):
            plain.append(ask(bare, fresh(), options.tokens, False))
            local.append(ask(vllm, fresh(), options.tokens, True))
            handed.append(ask(vllm, fresh(), options.tokens, False))
            summary = max(httpx.get(base).json(), key=lambda row: row["opened_ns"])
            blocks = httpx.get(f"{base}/{summary['request_id']}").json()["blocks"]
            exposed.append((summary["complete_ns"] - max(b["computed_ns"] for b in blocks)) / 1e9)
            gaps.append(handed[-1][1] - handed[-1][0])
        kv_bytes = (receiver.metric("mlx_receiver_kv_bytes_total") - kv_bytes) / options.repeats

    def rate(runs: list[list[float]]) -> float:
        return round(statistics.median((len(t) - 2) / (t[-1] - t[1]) for t in runs), 2)

    first = {
        name: milliseconds([t[0] for t in runs])
        for name, runs in (("plain", plain), ("local", local), ("handed_off", handed))
    }
    result = record("hand-off on one machine without accelerators, fp32") | {
        "model": model.name,
        "prompt_tokens": options.prompt_tokens,
        "repeats": options.repeats,
        "first_token_ms": first,
        "handed_off_over_plain": round(first["handed_off"] / first["plain"], 3),
        "handed_off_over_local": round(first["handed_off"] / first["local"], 3),
        "kv_bytes": kv_bytes,
        "cache_complete_after_last_layer_ms": milliseconds(exposed),
        "handoff_gap_ms": milliseconds(gaps),
        "tokens_per_second": {"vllm": rate(local), "receiver": rate(handed)},
    }
    table = Table(title=f"{model.name}, {options.prompt_tokens} tokens in, fp32, one machine")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for key in (
        "first_token_ms",
        "handed_off_over_plain",
        "handed_off_over_local",
        "kv_bytes",
        "cache_complete_after_last_layer_ms",
        "handoff_gap_ms",
        "tokens_per_second",
    ):
        table.add_row(key, str(result[key]))
    Console().print(table)
    save(result, options.out)


if __name__ == "__main__":
    main()
