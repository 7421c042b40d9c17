"""Randomised faults under load: every response must complete, and be right.

One vLLM with the connector and one receiver; a few clients keep sending greedy requests in fp32
on a model where vLLM and MLX agree, so that any response must equal its undisturbed reference
whatever happened to the receiver meanwhile. Each trial does one thing to the receiver or to a
client, at a random moment:

- ``kill``: SIGKILL, and start it again;
- ``freeze``: SIGSTOP for up to ``--freeze`` seconds, then SIGCONT;
- ``leave``: a client closes its connection in the middle of a response.

    python -m bench.faults --trials 200 --seed 1 --out bench/results/faults.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from tests.servers import Receiver, Vllm, start_receiver, start_vllm

ACTIONS = ("kill", "freeze", "freeze", "leave")


@dataclass
class Load:
    """Clients in threads, and what became of their requests."""

    vllm: Vllm
    expected: list[tuple[list[int], list[int]]]
    stop: threading.Event = field(default_factory=threading.Event)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, seed: int) -> None:
        """Send requests until told to stop."""
        source = random.Random(seed)
        while not self.stop.is_set():
            prompt, tokens = source.choice(self.expected)
            began = time.monotonic()
            try:
                got = self.vllm.tokens(prompt, len(tokens))
                problem = "" if got == tokens else f"wrong: {len(prompt)} tokens in, {got}"
            except (AssertionError, httpx.HTTPError) as error:
                problem = f"failed: {error!r}"
            with self.lock:
                self.done["wrong" if problem else "right"] += 1
                self.slowest = max(self.slowest, time.monotonic() - began)
                if problem:
                    self.wrong.append(problem)


def references(vllm: Vllm, seed: int, count: int, tokens: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and their local greedy tokens; asked twice, so that prefix hits are in it."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        length = source.choice((1, 5, 40, 150, 300, 600))
        prompt = [source.randrange(20, 49000) for _ in range(length)]
        first = vllm.tokens(prompt, tokens)
        if vllm.tokens(prompt, tokens) == first:
            found.append((prompt, first))
    return found


def leave(vllm: Vllm, source: random.Random, prompt: list[int]) -> None:
    """Read a little of a streamed response and close the connection."""
    body = {"model": vllm.name, "prompt": prompt, "max_tokens": 400, "stream": True,
            "ignore_eos": True, "temperature": 0}  # fmt: skip
    until = source.randrange(0, 20)
    with httpx.stream("POST", f"{vllm.url}/v1/completions", json=body, timeout=60) as answer:
        for seen, _ in enumerate(answer.iter_lines()):
            if seen >= until:
                return


def run(
    model: Path,
    logs: Path,
    *,
    trials: int,
    seed: int,
    clients: int = 4,
    freeze: float = 3.0,
    tokens: int = 40,
    show: bool = False,
) -> dict[str, Any]:
    """Run the trials; the result says how many responses were right, wrong and slowest."""
    source = random.Random(seed)
    receiver = start_receiver(model, logs / "receiver-0.log")
    vllm: Vllm | None = None
    actions: Counter[str] = Counter()
    try:
        vllm = start_vllm(model, logs / "vllm.log", receiver=receiver.address,
                          args=("--max-num-batched-tokens", "256"),
                          env={"MAC_DECODE_STALL_TIMEOUT": "2"})  # fmt: skip
        # The reference is vLLM alone: hand-offs wait until the receiver is let run.
        receiver.server.signal(signal.SIGSTOP)
        time.sleep(3)
        expected = references(vllm, seed, 24, tokens)
        receiver.server.signal(signal.SIGCONT)
        vllm.wait_connected(receiver, 40)
        agreeing = [(p, t) for p, t in expected if vllm.tokens(p, len(t)) == t]
        load = Load(vllm, agreeing)
        threads = [threading.Thread(target=load.client, args=(seed + i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        with Progress(disable=not show) as progress:
            task = progress.add_task("trials", total=trials)
            for trial in range(trials):
                action = source.choice(ACTIONS)
                actions[action] += 1
                time.sleep(source.uniform(0.05, 1.0))
                if action == "kill":
                    receiver.server.signal(signal.SIGKILL)
                    receiver.server.stop()
                    time.sleep(source.uniform(0, 1.5))
                    receiver = _again(receiver, model, logs / f"receiver-{trial + 1}.log")
                elif action == "freeze":
                    receiver.server.signal(signal.SIGSTOP)
                    time.sleep(source.uniform(0.1, freeze))
                    receiver.server.signal(signal.SIGCONT)
                else:
                    leave(vllm, source, source.choice(agreeing)[0])
                progress.advance(task)
        load.stop.set()
        for thread in threads:
            thread.join()
        vllm.wait_connected(receiver, 90)  # it is used again
        fallbacks = vllm.metric("vllm:mac_decode_fallbacks_total")
        return {
            "trials": trials,
            "seed": seed,
            "actions": dict(actions),
            "responses_right": load.done["right"],
            "responses_wrong": load.done["wrong"],
            "problems": load.wrong[:20],
            "slowest_response_s": round(load.slowest, 2),
            "fell_back": fallbacks,
            "decoded_by_receiver": vllm.metric("vllm:mac_decode_tokens_total"),
        }
    finally:
        if vllm is not None:
            vllm.server.stop()
        receiver.server.stop()


def _again(receiver: Receiver, model: Path, log: Path) -> Receiver:
    return start_receiver(model, log, port=receiver.port, http_port=receiver.http_port)


def main() -> None:
    """Run and write JSON; exit 1 if any response failed or was wrong."""
    from tests.conftest import cached_model
    from tests.models import tiny_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--freeze", type=float, default=3.0)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    model = options.model or cached_model("tiny-llama", tiny_llama)
    logs = Path(tempfile.mkdtemp(prefix="faults-"))
    result = {
        "what": "randomised faults under load",
        "command": " ".join(sys.argv),
        "machine": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    } | run(model, logs, trials=options.trials, seed=options.seed, freeze=options.freeze, show=True)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["responses_wrong"]))


if __name__ == "__main__":
    main()
