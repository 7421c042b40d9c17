"""What shadow prefill gains a conversation's next turn, and what it costs whoever comes meanwhile.

One receiver, and two vLLMs in one run: one with shadow prefill, one without. A conversation's
second turn contains the first one's answer, so its time to first token says how much of that is in
vLLM's prefix cache.

Then answers end while vLLM is busy, so that their shadows wait and run one after the other as soon
as it is not; short requests come at random moments among them. vLLM's engine itself writes down
(``bench.step_log``) when each came to it, when the step began that computed it, and what it
computed of shadows from the one to that step's end.

Both engines share the machine's cores, so absolute times say nothing of a Spark or a Mac.

    python -m bench.shadow
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from bench.lab import ALL_CORES, RESULTS, record, save
from tests.conftest import free_port
from tests.models import tiny_llama
from tests.servers import Vllm, start_receiver, start_vllm

#: A model whose prefill of some hundred tokens takes longer than HTTP does.
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "vocab_size": 8192}
PROMPT, ANSWER, QUESTION, CHUNK = 300, 480, 16, 256
#: Tokens that keep vLLM busy while the answers come: many more than it decodes meanwhile.
LONGEST = 16_384
#: What the names of shadows' requests have in them.
SHADOW = "mac-decode-shadow"
LOCAL = {"vllm_xargs": {"keep": "local"}}


def prompt_of(length: int, source: random.Random) -> list[int]:
    """Random tokens."""
    return [source.randrange(20, 8000) for _ in range(length)]


def first_token(vllm: Vllm, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token of a completion, and its cached tokens."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    began = time.perf_counter()
    answer = httpx.post(f"{vllm.url}/v1/completions", json=body, timeout=120)
    seconds = time.perf_counter() - began
    assert answer.status_code == 200, answer.text
    details = answer.json()["usage"]["prompt_tokens_details"] or {}
    return seconds, details.get("cached_tokens") or 0


def shadowed(vllm: Vllm) -> float:
    """Tokens so far."""
    return vllm.metric("vllm:mac_decode_shadow_tokens_total")


def rest(vllm: Vllm) -> None:
    """Wait until nothing is shadowed any more."""
    last, since = -1.0, time.monotonic()
    while time.monotonic() - since < 1.5:
        if (value := shadowed(vllm)) != last:
            last, since = value, time.monotonic()
        time.sleep(0.1)


def turns(servers: dict[str, Vllm], rounds: int, source: random.Random) -> dict[str, Any]:
    """The second turns of as many conversations on each server, the servers in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    cached: dict[str, int] = {}
    answers: list[list[int]] = []
    for vllm in servers.values():  # what is compiled with a first long prompt
        first_token(vllm, prompt_of(PROMPT + ANSWER, source))
    for _ in range(rounds):
        prompt, question = prompt_of(PROMPT, source), prompt_of(QUESTION, source)
        for name, vllm in servers.items():
            answer = vllm.tokens(prompt, ANSWER)
            rest(vllm)
            took, cached[name] = first_token(vllm, [*prompt, *answer, *question])
            seconds[name].append(took)
            answers.append(answer)
        assert all(answer == answers[-1] for answer in answers[-len(servers) :])
    return {
        name: {
            "ttft_ms": [round(1e3 * one, 1) for one in values],
            "median_ttft_ms": round(1e3 * statistics.median(values), 1),
            "cached_tokens": cached[name],
        }
        for name, values in seconds.items()
    }


def keep_busy(vllm: Vllm, prompt: list[int], until: threading.Event) -> bool:
    """Have vLLM decode a response of its own until then; whether it lasted so long."""
    most = LONGEST - len(prompt)
    body = {"model": "m", "prompt": prompt, "max_tokens": most, "stream": True, "ignore_eos": True}
    url = f"{vllm.url}/v1/completions"
    with httpx.stream("POST", url, json=body | LOCAL, timeout=120) as answer:
        for _ in answer.iter_lines():
            if until.is_set():
                return True
    return False


def waits(vllm: Vllm, log: Path, rounds: int, source: random.Random) -> dict[str, Any]:
    """What short requests among shadows waited for, by the engine's own account."""
    for _ in range(rounds):
        prompts = [prompt_of(PROMPT, source) for _ in range(8)]
        with ThreadPoolExecutor(1) as pool:
            ended = threading.Event()
            busy = pool.submit(keep_busy, vllm, prompt_of(8, source), ended)
            time.sleep(0.5)
            vllm.complete(prompts, ANSWER, ignore_eos=True)
            before = shadowed(vllm)
            ended.set()
            assert busy.result(), "vLLM must be busy until the answers have ended"
        total = 8 * ((PROMPT + ANSWER) // 128 - PROMPT // 128) * 128
        until = time.monotonic() + 30
        while shadowed(vllm) - before < total and time.monotonic() < until:
            time.sleep(source.uniform(0, 0.2))
            first_token(vllm, prompt_of(QUESTION, source))
        rest(vllm)
    return account(log)


def account(log: Path) -> dict[str, Any]:
    """Of each request that came while shadows were computed: how many tokens of them were computed
    from then to its own step's end, and how long it waited for its step, as a share of the time
    that those took from their beginnings: never more than 1 of a single one."""
    came: dict[str, float] = {}
    steps: list[dict[str, Any]] = []
    under_way: dict[int, dict[str, Any]] = {}
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if "came" in event:
            came[event["came"]] = event["at"]
        elif "scheduled" in event:
            tokens = event["tokens"]
            step = {"begin": event["at"], "end": None, "requests": set(tokens)}
            step["shadow"] = sum(n for name, n in tokens.items() if SHADOW in name)
            steps.append(step)
            under_way[event["scheduled"]] = step
        elif step := under_way.pop(event["done"], None):
            step["end"] = event["at"]
    steps = [step for step in steps if step["end"] is not None]
    for before, step in itertools.pairwise(steps):
        # A step that is scheduled while another one runs begins when that ends.
        step["begin"] = max(step["begin"], before["end"])
    shares, tokens = [], []
    for name, at in came.items():
        own = next((i for i, step in enumerate(steps) if name in step["requests"]), None)
        if own is None:
            continue
        those = [step for step in steps[: own + 1] if step["end"] > at and step["shadow"]]
        if those:
            took = sum(step["end"] - step["begin"] for step in those)
            shares.append((steps[own]["begin"] - at) / took)
            tokens.append(sum(step["shadow"] for step in those))
    return {
        "requests": len(shares),
        "most_shadow_tokens": max(tokens),
        "waited_share_of_chunk": {
            "p50": round(statistics.median(shares), 2),
            "p90": round(statistics.quantiles(shares, n=10, method="inclusive")[-1], 2),
            "most": round(max(shares), 2),
        },
    }


def run(rounds: int, scratch: Path) -> dict[str, Any]:
    """One process's figures."""
    model = tiny_llama(scratch / "model", **SHAPE, max_position_embeddings=LONGEST)
    source = random.Random(int(time.time()))
    port = free_port()
    args = (
        *("--enable-prompt-tokens-details", "--num-gpu-blocks-override", "256"),
        *("--max-model-len", str(LONGEST)),
        *("--scheduler-cls", "bench.step_log.LoggingScheduler"),
    )
    with contextlib.ExitStack() as stack:

        def started(name: str, shadow: bool) -> Vllm:
            found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
            env = ALL_CORES | {
                # vLLM imports its scheduler from here.
                "PYTHONPATH": os.pathsep.join(
                    [str(Path(__file__).parents[1]), *filter(None, found)]
                ),
                "BENCH_STEP_LOG": str(scratch / f"{name}.steps"),
                "MAC_DECODE_SHADOW_PREFILL": str(shadow).lower(),
                "MAC_DECODE_SHADOW_CHUNK": str(CHUNK),
                "MAC_DECODE_STALL_TIMEOUT": "60",
            }
            vllm = start_vllm(
                model,
                scratch / f"{name}.log",
                receiver=f"127.0.0.1:{port}",
                args=args,
                env=env,
                wait=False,
            )
            stack.callback(vllm.server.stop)
            return vllm

        servers = {
            "with shadow prefill": started("with", True),
            "without": started("without", False),
        }
        receiver = start_receiver(model, scratch / "receiver.log", port=port)
        stack.callback(receiver.server.stop)
        for vllm in servers.values():
            vllm.wait_healthy()
        for vllm in servers.values():
            vllm.wait_connected(receiver)
        second = turns(servers, rounds, source)
        servers["without"].server.stop()
        vllm = servers["with shadow prefill"]
        return {"second_turn": second, "waits": waits(vllm, scratch / "with.steps", 8, source)}


def main() -> None:
    """Measure, add the process to the result file, and show it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "shadow.json")
    parser.add_argument("--add", action="store_true", help="keep the file's other processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(options.rounds, Path(folder))
    result = record("second turns and delays with and without shadow prefill, fp32, on a CPU") | {
        "sizes": {
            "prompt": PROMPT,
            "answer": ANSWER,
            "question": QUESTION,
            "chunk": CHUNK,
            "model": SHAPE,
        },
        "processes": [],
    }
    if options.add and options.out.exists():
        result["processes"] = json.loads(options.out.read_text())["processes"]
    result["processes"].append(figures)
    save(result, options.out)
    Console().print_json(json.dumps(figures))


if __name__ == "__main__":
    main()
