"""Randomised faults under load: every response must complete, and be right.

One vLLM with the connector and one receiver, each in its own network namespace where that is
allowed; a few clients keep sending greedy requests in fp32 on a model where vLLM and MLX agree, so
that any response must equal its undisturbed reference whatever happened to the receiver
meanwhile. Each trial does one thing to the receiver, to the network or to a client, at a random
moment:

- ``kill``: SIGKILL, and start it again;
- ``freeze``: SIGSTOP for up to ``--freeze`` seconds, then SIGCONT;
- ``unplug``: the link between the two is dead for up to ``--freeze`` seconds, and nobody is told;
- ``leave``: a client closes its connection in the middle of a response;
- ``crowd``: six more requests at once than the receiver's batch has room for;
- ``lie``: an impostor that knows the token takes the receiver's place for up to ``--freeze``
  seconds. It breaks the protocol in every way there is, floods its client, or answers slower and
  slower (``tests.lying_receiver``);
- ``no_data``: the same, with nobody listening where blocks should go.

    python -m bench.faults --trials 200 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from bench.lab import RESULTS, NoRights, Place, record, save, shaped_link
from mlx_receiver.planning.cost import Strategy
from tests.servers import Receiver, Server, Vllm, start_receiver, start_vllm
from tests.warm import RECEIVER

#: Both sides' token: a receiver that other machines reach does not start without one.
TOKEN = "bench-faults"

#: A request that is handed off whatever is planned.
_HANDED_OFF = {"vllm_xargs": {"mac_decode_offload": "always"}}


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
            self.request(*source.choice(self.expected))

    def crowd(self, source: random.Random, count: int) -> None:
        """So many requests at once."""
        with ThreadPoolExecutor(count) as pool:
            for _ in range(count):
                pool.submit(self.request, *source.choice(self.expected))

    def request(self, prompt: list[int], tokens: list[int]) -> None:
        """Send one and compare."""
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


def _plans(vllm: Vllm) -> dict[str, float]:
    """How often each strategy was chosen because both sides' profiles say so."""
    return {
        str(strategy): sum(
            vllm.metric("vllm:mac_decode_plans_total", strategy=str(strategy), reason=reason)
            for reason in ("fastest", "kept")
        )
        for strategy in Strategy
    }


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
    prompts: int = 24,
    link: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the trials; the result says how many responses were right, wrong and slowest. ``prompts``
    are asked for again and again, ``link`` is for ``shaped_link``."""

    def in_namespace() -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            mac, skipped = Place("127.0.0.1"), ""
            try:
                spark, mac = stack.enter_context(shaped_link(**link or {}))
                spark.enter()
            except NoRights as error:
                skipped = str(error)
            bench = Trials(model, logs, mac, random.Random(seed), freeze)
            stack.callback(bench.close)
            return bench.run(trials, seed, clients, tokens, show, prompts) | {
                "unplug_skipped": skipped
            }

    # A thread of its own: whoever enters a namespace cannot leave it.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(in_namespace).result()


class Trials:
    """The two servers, and what is done to them."""

    def __init__(
        self, model: Path, logs: Path, mac: Place, source: random.Random, seconds: float
    ) -> None:
        self._model, self._logs, self._mac = model, logs, mac
        self._source, self._seconds = source, seconds
        self._starts = 0
        self._receiver = self._start(0, 0)
        self._vllm: Vllm | None = None
        self._phases: Counter[str] = Counter()

    def close(self) -> None:
        """Stop both servers."""
        if self._vllm is not None:
            self._vllm.server.stop()
        self._receiver.server.stop()

    def run(
        self, trials: int, seed: int, clients: int, tokens: int, show: bool, prompts: int
    ) -> dict[str, Any]:
        """See ``run``."""
        receiver = self._receiver
        vllm = self._vllm = start_vllm(
            self._model,
            self._logs / "vllm.log",
            receiver=receiver.address,
            args=("--max-num-batched-tokens", "256"),
            env={"MAC_DECODE_STALL_TIMEOUT": "2", "MAC_DECODE_TOKEN": TOKEN},
        )
        # The reference is vLLM alone: hand-offs wait until the receiver is let run.
        receiver.server.signal(signal.SIGSTOP)
        time.sleep(3)
        expected = references(vllm, seed, prompts, tokens)
        receiver.server.signal(signal.SIGCONT)
        vllm.wait_connected(receiver, 40, **_HANDED_OFF)
        agreeing = [(p, t) for p, t in expected if vllm.tokens(p, len(t)) == t]
        load = Load(vllm, agreeing)
        threads = [threading.Thread(target=load.client, args=(seed + i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        self._answers = self._logs / "answers.json"
        self._answers.write_text(json.dumps([["any", p, t] for p, t in agreeing]))
        kinds = ["kill", "freeze", "leave", "crowd", "lie", "no_data"]
        kinds += ["unplug"] if self._mac.namespace else []
        actions: Counter[str] = Counter()
        try:
            with Progress(disable=not show) as progress:
                task = progress.add_task("trials", total=trials)
                for _ in range(trials):
                    action = self._source.choice(kinds)
                    actions[action] += 1
                    time.sleep(self._source.uniform(0.05, 1.0))
                    if action == "leave":
                        leave(vllm, self._source, self._source.choice(agreeing)[0])
                    elif action == "crowd":
                        load.crowd(self._source, 6)
                    else:
                        getattr(self, f"_{action}")()
                    progress.advance(task)
        finally:
            load.stop.set()
            for thread in threads:
                thread.join()
            if show:
                print(dict(load.done), *load.wrong[:20], sep="\n", file=sys.stderr)
        vllm.wait_connected(self._receiver, 90, **_HANDED_OFF)  # it is used again
        planned = _plans(vllm)
        for prompt, answer in agreeing:
            load.request(prompt, answer)
        again = _plans(vllm)
        until = time.monotonic() + 5
        while sum(again.values()) - sum(planned.values()) < len(agreeing):
            if time.monotonic() > until:
                break
            time.sleep(0.2)  # a step's counts come with the next one
            again = _plans(vllm)
        return {
            "trials": trials,
            "seed": seed,
            "clients": clients,
            "actions": dict(actions),
            "sessions_when_killed": dict(self._phases),
            "responses_right": load.done["right"],
            "responses_wrong": load.done["wrong"],
            "problems": load.wrong[:20],
            "slowest_response_s": round(load.slowest, 2),
            "fell_back": {
                reason: vllm.metric("vllm:mac_decode_fallbacks_total", reason=reason)
                for reason in (
                    "lost",
                    "stalled",
                    "queued",
                    "unreachable",
                    "failed_block",
                    "failed_protocol",
                    "refused_capacity",
                    "preempted",
                )
            }
            | {"all": vllm.metric("vllm:mac_decode_fallbacks_total")},
            "decoded_by_receiver": vllm.metric("vllm:mac_decode_tokens_total"),
            "plans": planned,
            "asked_afterwards": len(agreeing),
            "plans_afterwards": {
                strategy: again[strategy] - planned[strategy] for strategy in again
            },
        }

    def _kill(self) -> None:
        with contextlib.suppress(httpx.HTTPError):  # a link that was just plugged in again
            health = self._receiver.health()
            self._phases["decoding"] += health["decoding"]
            self._phases["before decoding"] += health["sessions"] - health["decoding"]
        self._receiver.server.signal(signal.SIGKILL)
        self._receiver.server.stop()
        time.sleep(self._source.uniform(0, 1.5))
        self._receiver = self._start(self._receiver.port, self._receiver.http_port)

    def _freeze(self) -> None:
        self._receiver.server.signal(signal.SIGSTOP)
        time.sleep(self._source.uniform(0.1, self._seconds))
        self._receiver.server.signal(signal.SIGCONT)

    def _unplug(self) -> None:
        self._mac.plug(False)
        time.sleep(self._source.uniform(0.1, self._seconds))
        self._mac.plug(True)

    def _lie(self) -> None:
        self._replace()

    def _no_data(self) -> None:
        self._replace("--no-data")

    def _replace(self, *arguments: str) -> None:
        """Have an impostor in the receiver's place for a while."""
        receiver = self._receiver
        receiver.server.stop()
        impostor = Server(
            [sys.executable, "-m", "tests.lying_receiver", str(receiver.port), str(self._model),
             str(self._answers), "--host", self._mac.address, *arguments],
            self._logs / f"impostor-{self._starts}.log",
            {"MAC_DECODE_TOKEN": TOKEN},
            RECEIVER,
            tuple(self._mac.command([])),
        )  # fmt: skip
        time.sleep(2 + self._source.uniform(0.5, self._seconds))
        impostor.stop()
        self._receiver = self._start(receiver.port, receiver.http_port)

    def _start(self, port: int, http_port: int) -> Receiver:
        self._starts += 1
        return start_receiver(
            self._model,
            self._logs / f"receiver-{self._starts}.log",
            host=self._mac.address,
            port=port,
            http_port=http_port,
            args=("--token", TOKEN, "--max-batch", "3"),
            key=TOKEN,
            inside=tuple(self._mac.command([])),
        )


def main() -> None:
    """Run and write JSON; exit 1 if any response failed or was wrong."""
    from tests.conftest import cached_model
    from tests.models import tiny_llama

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--freeze", type=float, default=3.0, help="seconds at most")
    parser.add_argument("--model", type=Path, default=None, help="default: a tiny random Llama")
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    options = parser.parse_args()
    model = options.model or cached_model("tiny-llama", tiny_llama)
    logs = Path(tempfile.mkdtemp(prefix="faults-"))
    result: dict[str, Any] = record("randomised faults under load")
    result |= run(
        model, logs, trials=options.trials, seed=options.seed, freeze=options.freeze, show=True
    )
    save(result, options.out)
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["responses_wrong"]))


if __name__ == "__main__":
    main()
