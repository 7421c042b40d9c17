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
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.lab import ALL_CORES, RESULTS, record, save
from tests.servers import Receiver, Vllm, pair, start_vllm


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


def exposed_seconds(receiver: Receiver) -> float:
    """From the end of the last layer's compute to the complete cache, in the latest hand-off."""
    base = f"{receiver.url}/handoffs"
    summary = max(httpx.get(base).json(), key=lambda row: row["opened_ns"])
    blocks = httpx.get(f"{base}/{summary['request_id']}").json()["blocks"]
    return (summary["complete_ns"] - max(block["computed_ns"] for block in blocks)) / 1e9


def milliseconds(values: list[float]) -> float:
    """The median in milliseconds."""
    return round(1000 * statistics.median(values), 1)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / "handoff.json")
    options = parser.parse_args()
    model = options.model
    if model is None:
        from vllm_mac_decode.tools.demo.model import fetch_smollm2

        model = fetch_smollm2()
    source = random.Random(11)

    def fresh() -> list[int]:
        return [source.randrange(20, 49000) for _ in range(options.prompt_tokens)]

    logs = Path(tempfile.mkdtemp(prefix="handoff-"))
    runs: dict[str, list[list[float]]] = {"plain": [], "local": [], "handed_off": []}
    exposed = []
    with contextlib.ExitStack() as servers:
        # All of them run all the time and are asked in turns: what slows the machine slows each.
        bare = start_vllm(model, logs / "plain.log", env=ALL_CORES)
        servers.callback(bare.server.stop)
        vllm, receiver = servers.enter_context(pair(model, logs, env=ALL_CORES))
        for server in (bare, vllm):
            ask(server, fresh(), options.tokens, False)
        kv_bytes = receiver.metric("mlx_receiver_kv_bytes_total")
        for _ in track(range(options.repeats), "rounds"):
            for name in source.sample(list(runs), len(runs)):
                server = bare if name == "plain" else vllm
                runs[name].append(ask(server, fresh(), options.tokens, name == "local"))
                if name == "handed_off":
                    exposed.append(exposed_seconds(receiver))
        kv_bytes = (receiver.metric("mlx_receiver_kv_bytes_total") - kv_bytes) / options.repeats

    first = {name: [times[0] for times in found] for name, found in runs.items()}
    # A response's second token from the receiver takes longer: the first one was shown early.
    steps = {
        name: [
            statistics.median(later - sooner for sooner, later in pairwise(t[2:])) for t in found
        ]
        for name, found in runs.items()
    }
    gaps = [times[1] - times[0] for times in runs["handed_off"]]

    def ratio(name: str) -> float:
        """Of first tokens asked for in the same round."""
        pairs = zip(first["handed_off"], first[name], strict=True)
        return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)

    result = record("hand-off on one machine without accelerators, fp32") | {
        "model": model.name,
        "prompt_tokens": options.prompt_tokens,
        "repeats": options.repeats,
        "first_token_ms": {name: milliseconds(found) for name, found in first.items()},
        "handed_off_over_plain": ratio("plain"),
        "handed_off_over_local": ratio("local"),
        "kv_bytes": kv_bytes,
        "cache_complete_after_last_layer_ms": milliseconds(exposed),
        "handoff_gap_ms": milliseconds(gaps),
        "handoff_gap_beyond_a_step_ms": milliseconds(
            [gap - step for gap, step in zip(gaps, steps["handed_off"], strict=True)]
        ),
        "decode_step_ms": {name: milliseconds(found) for name, found in steps.items()},
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
        "handoff_gap_beyond_a_step_ms",
        "decode_step_ms",
    ):
        table.add_row(key, str(result[key]))
    Console().print(table)
    save(result, options.out)


if __name__ == "__main__":
    main()
